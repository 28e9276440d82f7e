"""A LoRA adapter on disk, as PEFT saves it: read without torch or peft, checked, and made to fit a compiled graph."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from QEfficient.errors import InputError, ModelLoadError, UnsupportedModelError
from QEfficient.safetensors_io import TensorRef, WeightMap, read_header
from QEfficient.suggest import did_you_mean
from QEfficient.targets.manifest import TensorSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
#: The parameter that holds every module's scaling, in the sorted order of module names.
SCALING = "lora_scaling"

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A|lora_B)\.weight")
#: Settings of PEFT's LoraConfig that change what an adapter computes, in ways a compiled graph has no place for.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "lora_bias": "lora_bias",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "activated LoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "use_qalora": "QALoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
}
#: Initialisations that leave the base model as it is; the others move part of it into the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
#: Bytes per element -> how numpy reads it; bfloat16 is widened by hand.
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class LoraTensors:
    """One adapted module: its two matrices (A [rank, in], B [out, rank]) where they lie, and its scaling."""

    a: TensorRef
    b: TensorRef
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter directory; tensors are read when asked for.

    Attributes:
        modules: full module name in the base model -> its tensors, sorted by name.
        base_model: what ``adapter_config.json`` says it was trained on, and its revision there.
    """

    directory: Path
    modules: dict[str, LoraTensors]
    base_model: str | None
    base_revision: str | None

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(tensors.rank for tensors in self.modules.values())

    def check(self, parameters: Sequence[TensorSpec]) -> None:
        """Raises InputError when the adapter does not fit a graph with these parameters; reads no tensor."""
        places = {spec.name: spec.shape for spec in parameters}
        names = lora_modules(parameters)
        for module, tensors in self.modules.items():
            if module not in names:
                raise InputError(
                    f"the adapter in {self.directory} adapts {module!r}, which the package was compiled without: load "
                    f"it before compile(), or name the module in target_modules.{did_you_mean(module, names)}"
                )
            (rank, inside), (outside, _) = places[key(module, "lora_A")], places[key(module, "lora_B")]
            if tensors.a.shape[1] != inside or tensors.b.shape[0] != outside:
                raise InputError(
                    f"the adapter in {self.directory} fits another base model: {module} takes {inside} values to "
                    f"{outside} here and {tensors.a.shape[1]} to {tensors.b.shape[0]} there."
                )
            if tensors.rank > int(rank):
                raise InputError(
                    f"the adapter in {self.directory} has rank {tensors.rank}, more than the {rank} the package was "
                    f"compiled for: compile with max_rank={self.rank}."
                )

    def arrays(self, parameters: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
        """Values for every LoRA parameter: float32, padded with zeros to the graph's rank, zeros where it has none.

        Raises:
            InputError: it does not fit. ModelLoadError: a tensor holds something that is not a number.
        """
        self.check(parameters)
        out = empty(parameters)
        for i, module in enumerate(lora_modules(parameters)):
            tensors = self.modules.get(module)
            if tensors is not None:
                out[key(module, "lora_A")][: tensors.rank] = _read(tensors.a, module)
                out[key(module, "lora_B")][:, : tensors.rank] = _read(tensors.b, module)
                out[SCALING][i] = tensors.scaling
        return out


def warn_of_another_base(adapter: AdapterFile, base: str | None, stacklevel: int = 3) -> None:
    """Warns when an adapter says it was trained on a model other than ``base``; without both names nothing is known."""
    if base and adapter.base_model and not same_model(adapter.base_model, base):
        warnings.warn(
            f"the adapter in {adapter.directory} was trained on {adapter.base_model} and is used on {base}: unless "
            "both have the same weights, what it computes is meaningless.",
            stacklevel=stacklevel,
        )


def same_model(one: str, other: str) -> bool:
    """Whether two names or paths may be of one model: the same place, or the same last part (a hub id and its copy)."""
    return (
        _model_name(one) == _model_name(other) or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
    )


def _model_name(name: str) -> str:
    path = Path(name)
    # The hub's cache: models--org--name/snapshots/<commit>.
    cached = next((part for part in path.parts if part.startswith("models--")), None)
    return path.name if cached is None else cached.rpartition("--")[2]


def key(module: str, part: str) -> str:
    """The name PEFT gives a tensor in its file, which is also the package's parameter."""
    return f"base_model.model.{module}.{part}.weight"


def lora_modules(parameters: Sequence[TensorSpec]) -> list[str]:
    """The modules a graph can adapt, sorted: the order of its scaling vector."""
    found = (_KEY.fullmatch(spec.name) for spec in parameters)
    return sorted({match["module"] for match in found if match is not None})


def empty(parameters: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """Zeros for every LoRA parameter: the base model."""
    names = {key(module, part) for module in lora_modules(parameters) for part in ("lora_A", "lora_B")} | {SCALING}
    return {spec.name: np.zeros([int(d) for d in spec.shape], spec.dtype) for spec in parameters if spec.name in names}


def read_adapter(directory: str | Path) -> AdapterFile:
    """Reads the configuration and the tensor directory of an adapter saved by PEFT.

    Raises:
        ModelLoadError: a file is missing, malformed, pickled, or the two contradict each other.
        UnsupportedModelError: an adapter of a kind that cannot be a package's input.
    """
    place = Path(directory).expanduser()
    if not place.is_dir():
        raise ModelLoadError(f"{place} is no directory: pass the one that PEFT's save_pretrained() wrote.")
    config = _config(place)
    if not (place / WEIGHTS_FILE).is_file():
        pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(place.glob(pattern))]
        if pickled:
            raise ModelLoadError(
                f"{place} has only pickled tensors ({pickled[0]}), which can run code when loaded: save the adapter "
                "again with safe_serialization=True where you trust it."
            )
        raise ModelLoadError(f"{place} has no {WEIGHTS_FILE}: save the adapter with PEFT's save_pretrained().")
    _refuse(config, place)
    pairs = _pairs(read_header(place / WEIGHTS_FILE), place)
    modules = {name: _tensors(name, *pairs[name], config, place) for name in sorted(pairs)}
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    return AdapterFile(
        place, modules, base if isinstance(base, str) else None, revision if isinstance(revision, str) else None
    )


def _config(place: Path) -> dict[str, Any]:
    path = place / CONFIG_FILE
    if not path.is_file():
        raise ModelLoadError(f"{place} has no {CONFIG_FILE}: pass a directory that PEFT's save_pretrained() wrote.")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ModelLoadError(f"{path} is not a JSON object: save the adapter again.")
    return body


def _refuse(config: Mapping[str, Any], place: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{place} holds an adapter of the kind {kind!r}: only LoRA adapters can be loaded, others must be merged "
            "into the base model first (qefficient merge)."
        )
    for setting, name in _REFUSED.items():
        if config.get(setting):
            raise UnsupportedModelError(
                f"the adapter in {place} uses {name}, which a compiled package has no inputs for: merge it into the "
                "base model with merge_and_unload() instead."
            )
    if config.get("bias", "none") != "none":
        raise UnsupportedModelError(
            f"the adapter in {place} trained biases (bias={config['bias']!r}), which a compiled package has no inputs "
            "for: merge it into the base model with merge_and_unload() instead."
        )
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise UnsupportedModelError(
            f"the adapter in {place} starts from init_lora_weights={start!r}, which changes the base model: convert it "
            "to plain LoRA (path_initial_model_for_weight_conversion of PEFT's save_pretrained)."
        )


def _pairs(tensors: WeightMap, place: Path) -> dict[str, tuple[TensorRef, TensorRef]]:
    """Module -> (A, B)."""
    found: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            what = "an adapter of an embedding" if ".lora_embedding_" in name else "no LoRA matrix of a linear layer"
            raise UnsupportedModelError(
                f"{place / WEIGHTS_FILE} holds {name!r}, {what}, which a compiled package has no input for: merge the "
                "adapter into the base model with merge_and_unload() instead."
            )
        if ref.dtype not in _FLOATS:
            raise ModelLoadError(f"{place / WEIGHTS_FILE} holds {name!r} as {ref.dtype}: save it in floating point.")
        found.setdefault(match["module"], {})[match["part"]] = ref
    if not found:
        raise ModelLoadError(f"{place / WEIGHTS_FILE} holds no tensors: save the adapter again.")
    for module, parts in found.items():
        if len(parts) != 2:
            raise ModelLoadError(f"{place / WEIGHTS_FILE} has only {next(iter(parts))} of {module}: save it again.")
    return {module: (parts["lora_A"], parts["lora_B"]) for module, parts in found.items()}


def _tensors(module: str, a: TensorRef, b: TensorRef, config: Mapping[str, Any], place: Path) -> LoraTensors:
    rank = _setting(config, "r", "rank_pattern", module, place)
    alpha = _setting(config, "lora_alpha", "alpha_pattern", module, place)
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise ModelLoadError(
            f"{place} contradicts itself: {module} has shapes {a.shape} and {b.shape}, its configuration says rank "
            f"{rank:g}; save the adapter again."
        )
    # PEFT's formula (LoraLayer.update_layer); rank-stabilised LoRA divides by the root (arXiv 2312.03732).
    return LoraTensors(a, b, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _setting(config: Mapping[str, Any], name: str, pattern_name: str, module: str, place: Path) -> float:
    """A number of the configuration; an entry of its pattern wins where it matches the end of the module's name."""
    value, patterns = config.get(name, 8), config.get(pattern_name) or {}
    if not isinstance(patterns, dict):
        raise ModelLoadError(f"{place / CONFIG_FILE} has a {pattern_name} that is not an object: save it again.")
    try:
        hit = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)
    except re.error:
        raise ModelLoadError(f"{place / CONFIG_FILE} has a {pattern_name} that is not a pattern.") from None
    value = value if hit is None else patterns[hit]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ModelLoadError(f"{place / CONFIG_FILE} has {name}={value!r}, which must be a positive number.")
    return float(value)


def _read(ref: TensorRef, module: str) -> np.ndarray:
    """float32 values of a tensor."""
    with ref.file.open("rb") as file:
        file.seek(ref.offset)
        raw = np.frombuffer(file.read(ref.length), _FLOATS[ref.dtype]).reshape(ref.shape)
    if ref.dtype == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    array = raw.astype(np.float32)
    if not np.isfinite(array).all():
        raise ModelLoadError(f"{ref.file} has values of {module} that are not finite: the adapter is broken.")
    return array

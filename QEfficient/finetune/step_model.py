"""A model as a training step needs it: a skeleton to capture, what trains, and where the other weights are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from blake3 import blake3
from torch import nn

from QEfficient.errors import UnsupportedModelError
from QEfficient.exporter.adapters import adapter_parameters, base_name, lora_modules, scaling_vector
from QEfficient.exporter.conversion import save_module_weights
from QEfficient.exporter.program import model_facts
from QEfficient.exporter.training.program import choose_trained
from QEfficient.exporter.training.steps import ClassificationStep, TokenStep, output_head
from QEfficient.models.keys import library_versions
from QEfficient.models.source import VOLATILE, MemorySource
from QEfficient.safetensors_io import WeightMap
from QEfficient.store.digest import json_digest
from QEfficient.transforms.pytorch.patching import use_our_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Fields of a PEFT configuration that change values or bookkeeping, but not the graph of the step.
_NOT_GEOMETRY = {
    "base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version",
    "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights", "init_ia3_weights",
}  # fmt: skip
#: Adapters whose forward pass has been checked against torch in a step.
_ADAPTERS = ("LORA", "IA3")


@dataclass
class StepModel:
    """What `build_step` and `CompiledStep` take.

    Attributes:
        name: for people.
        skeleton: module tree whose frozen parameters have shapes but no content; trained ones require grad.
        trained: parameter name in the wrapped model -> float32 parameter with its content, in the model's order.
        file_names: parameter name -> name in adapter or checkpoint files; the graph uses these.
        adapter: name of the PEFT adapter that trains, None without one.
        scaling: float32 [LoRA modules] for the adapter; None where there are none.
        identity: JSON-ready content that decides the graph and its frozen weights.
        find_weights: workspace directory -> frozen weights by graph name; may write files there.
        facts: what the package says about the model.
        config: the model's configuration (transformers).
        peft_config: the adapter's configuration (peft), None without one.
        own_config: ``config`` is not the base checkpoint's, so that an adapter needs it beside it.
    """

    name: str
    skeleton: nn.Module
    trained: dict[str, nn.Parameter]
    file_names: dict[str, str]
    adapter: str | None
    scaling: np.ndarray | None
    identity: dict[str, Any]
    find_weights: Callable[[Path], WeightMap]
    facts: dict[str, Any]
    config: Any
    peft_config: Any = None
    own_config: bool = False

    @property
    def vocabulary(self) -> int | None:
        """Tokens the head predicts; None for a classifier."""
        base = self.skeleton.get_base_model() if self.adapter is not None else self.skeleton  # type: ignore[operator]
        return None if is_classifier(base) else int(self.facts.get("vocab_size") or 1)

    def step(self, teacher_top: int = 0) -> TokenStep | ClassificationStep:
        """The module to capture."""
        base = self.skeleton.get_base_model() if self.adapter is not None else self.skeleton  # type: ignore[operator]
        if is_classifier(base):
            return ClassificationStep(self.skeleton, self.adapter)
        return TokenStep(self.skeleton, output_head(base), self.adapter, teacher_top)

    @property
    def is_partial(self) -> bool:
        """Whether some weights of the model stay as they are."""
        return not all(p.requires_grad for p in self.skeleton.parameters())

    def aliases(self) -> dict[str, str]:
        """Graph names of tensors that share storage -> the one name their bytes are kept under."""
        groups: dict[int, list[str]] = {}
        for name, parameter in self.skeleton.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(self.file_names.get(name) or base_name(name))
        return {name: names[0] for names in groups.values() for name in names}


def is_classifier(model: nn.Module) -> bool:
    """Whether a transformers model classifies sequences."""
    return type(model).__name__.endswith("ForSequenceClassification")


def from_module(model: Any, trainable: Sequence[str] | None = None) -> StepModel:
    """A transformers or PEFT model in memory; its ``requires_grad`` flags say what trains.

    Args:
        trainable: name patterns to train instead of what the flags say.

    Raises:
        UnsupportedModelError: not such a model, or an adapter of a kind that is not supported.
        OptionError: nothing trains, or a pattern matches nothing.
    """
    adapter, peft_config = _adapter_of(model)
    base = model.get_base_model() if adapter is not None else model
    check_kind(base)
    if trainable is not None:
        choose_trained(model, trainable)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    skeleton = skeleton_of(model, set(trained))
    choose_trained(skeleton, None)
    names = file_names_of(model, adapter)
    identity = {
        "kind": "memory",
        "class": f"{type(base).__module__}.{type(base).__qualname__}",
        "config": {k: v for k, v in MemorySource(base).raw_config().items() if k not in VOLATILE},
        "weights": _frozen_digest(model, set(trained)),
    }

    def find(workspace: Path) -> WeightMap:
        stored = save_module_weights(model, workspace / "frozen.safetensors")
        return {names.get(name) or base_name(name): ref for name, ref in stored.items()}

    return StepModel(
        name=getattr(base, "name_or_path", "") or type(base).__name__,
        skeleton=skeleton,
        trained={name: nn.Parameter(p.detach().float().clone()) for name, p in trained.items()},
        file_names=names,
        adapter=adapter,
        scaling=scaling_of(model, adapter),
        identity=identity_of(identity, trained, names, adapter, peft_config, model),
        find_weights=find,
        facts=model_facts(base),
        config=base.config,
        peft_config=peft_config,
        own_config=is_classifier(base),
    )


def _adapter_of(model: Any) -> tuple[str | None, Any]:
    config = getattr(model, "peft_config", None)
    if not isinstance(config, dict):
        return None, None
    active = model.active_adapter
    name = active if isinstance(active, str) else active[0]
    kind = str(getattr(config[name].peft_type, "value", config[name].peft_type))
    if kind not in _ADAPTERS:
        raise UnsupportedModelError(
            f"adapters of the kind {kind} cannot train through a compiled step: use LoRA or IA3."
        )
    return name, config[name]


def scaling_of(model: nn.Module, adapter: str | None) -> np.ndarray | None:
    """The adapter's scaling, None where no LoRA layer takes one."""
    return scaling_vector(model, adapter) if adapter is not None and lora_modules(model) else None


def check_kind(base: Any) -> None:
    for attribute in ("config", "named_parameters", "forward"):
        if not hasattr(base, attribute):
            raise UnsupportedModelError(
                f"a training step takes a transformers or PEFT model, got {type(base).__name__}."
            )
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(base).__name__} is an encoder-decoder: training takes decoders and encoders."
        )


def skeleton_of(model: nn.Module, trained: set[str]) -> nn.Module:
    """A copy without the frozen weights, in evaluation mode (no dropout), with our attention."""
    memo: dict[int, Any] = {}
    for name, p in model.named_parameters():
        if name in trained:
            # Memory that is never touched: capturing looks at shapes only.
            memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=torch.float32))
        else:
            dtype = torch.float32 if p.is_floating_point() else p.dtype
            memo[id(p)] = nn.Parameter(torch.zeros((), dtype=dtype).expand(p.shape), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.float() if buffer.is_floating_point() else buffer.clone()
    twin = copy.deepcopy(model, memo)
    base: PreTrainedModel = twin.get_base_model() if hasattr(twin, "peft_config") else twin  # type: ignore
    base.config.dtype = torch.float32
    for module in twin.modules():
        if isinstance(vars(module).get("dtype"), torch.dtype):  # modules remember their dtype and cast to it
            vars(module)["dtype"] = torch.float32
    use_our_attention(base)
    return twin.eval()


def file_names_of(model: nn.Module, adapter: str | None) -> dict[str, str]:
    """Parameter name -> its name in files: the adapter's key, or what the checkpoint calls it; shared ones share."""
    keys = {} if adapter is None else {id(p): key for key, p in adapter_parameters(model, adapter).items()}
    names: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = keys.get(id(parameter)) or base_name(name) if adapter is not None else name
        names[name] = first.setdefault(id(parameter), own)
    return names


def _frozen_digest(model: nn.Module, trained: set[str]) -> str:
    """One digest over the tensors that do not train: values of those that do are inputs and decide nothing."""
    digests = {}
    for name, tensor in model.state_dict().items():
        if name not in trained:
            data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            hasher = blake3(max_threads=blake3.AUTO)
            hasher.update(memoryview(data.numpy()))
            digests[base_name(name)] = [str(tensor.dtype), list(tensor.shape), hasher.hexdigest()]
    return json_digest(digests)


def identity_of(
    source: dict[str, Any],
    trained: dict[str, nn.Parameter],
    names: dict[str, str],
    adapter: str | None,
    peft_config: Any,
    model: nn.Module,
) -> dict[str, Any]:
    geometry: dict[str, Any] = {"trained": {names[name]: list(p.shape) for name, p in trained.items()}}
    if adapter is not None:
        entries = {k: v for k, v in peft_config.to_dict().items() if k not in _NOT_GEOMETRY}
        geometry["peft"] = json.loads(json.dumps(entries, default=_plain, sort_keys=True))
        geometry["modules"] = [name for name, _ in lora_modules(model)]
    return {"source": source, "geometry": geometry, "peft": library_versions(("peft",))}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)

"""The transform queue: resolves what a user names into transforms and runs them in order."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
from blake3 import blake3

from QEfficient.errors import OptionError, QEfficientError, TransformError
from QEfficient.store.digest import json_digest
from QEfficient.suggest import did_you_mean
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.cache_functions import CacheFunctions
from QEfficient.transforms.onnx.chunked_loss import ChunkedLoss
from QEfficient.transforms.onnx.fix_training_ops import FixTrainingOps
from QEfficient.transforms.onnx.fold_casts import FoldCasts
from QEfficient.transforms.onnx.fp16_clip import FP16Clip
from QEfficient.transforms.onnx.fuse_attention import FuseAttention
from QEfficient.transforms.onnx.fuse_encoder_attention import FuseEncoderAttention
from QEfficient.transforms.onnx.fuse_norms import FuseNorms
from QEfficient.transforms.onnx.fuse_silu import FuseSiLU
from QEfficient.transforms.onnx.keep_logits import KeepLogits
from QEfficient.transforms.onnx.lora_adapters import LoraAdapters
from QEfficient.transforms.onnx.lower_opset import LowerOpset
from QEfficient.transforms.onnx.merge_products import MergeProducts
from QEfficient.transforms.onnx.mxfp6_weights import MXFP6Weights
from QEfficient.transforms.onnx.mxint8_state import MXINT8State
from QEfficient.transforms.onnx.name_layers import NameLayers
from QEfficient.transforms.onnx.no_bfloat16 import NoBfloat16
from QEfficient.transforms.onnx.quantize_base import QuantizeBase
from QEfficient.transforms.onnx.quantize_weights import QuantizeWeights
from QEfficient.transforms.onnx.recompute import Recompute
from QEfficient.transforms.onnx.rotary_tables import RotaryTables
from QEfficient.transforms.onnx.round_to_float16 import RoundToFloat16
from QEfficient.transforms.onnx.row_scaled import RowScaledProducts
from QEfficient.transforms.onnx.schedule import Schedule
from QEfficient.transforms.onnx.split_weights import SplitWeights
from QEfficient.transforms.onnx.state_only import StateOnly
from QEfficient.user_file import run_source

#: What a user may pass for a transform: its name, "name:parameter=value,…", "file.py:Class", a class or an instance.
TransformLike = str | type | OnnxTransform | Callable[[ir.Model], Any]

_BUILT_IN: tuple[type[OnnxTransform], ...] = (
    CacheFunctions,
    ChunkedLoss,
    FP16Clip,
    FixTrainingOps,
    FoldCasts,
    FuseAttention,
    FuseEncoderAttention,
    FuseNorms,
    FuseSiLU,
    KeepLogits,
    LoraAdapters,
    LowerOpset,
    MergeProducts,
    MXFP6Weights,
    MXINT8State,
    NameLayers,
    NoBfloat16,
    QuantizeBase,
    QuantizeWeights,
    Recompute,
    RotaryTables,
    RoundToFloat16,
    RowScaledProducts,
    Schedule,
    SplitWeights,
    StateOnly,
)
BUILT_IN: dict[str, type[OnnxTransform]] = {t.name: t for t in _BUILT_IN}


class CustomTransform(OnnxTransform):
    """Wraps a user's own transform so that its code, too, is part of the cache key.

    Takes an `OnnxTransform` subclass or instance, or any callable ``f(model: onnx_ir.Model)`` that changes the model
    in place.
    """

    name: ClassVar[str] = "CustomTransform"

    def __init__(self, wrapped: OnnxTransform | Callable[[ir.Model], Any], label: str, source: str) -> None:
        self.wrapped, self.label = wrapped, label
        self.digest = blake3(source.encode()).hexdigest()[:32]
        try:
            json_digest(self.parameters())
        except TypeError as error:
            raise TransformError(f"the parameters of {label} must be JSON values: {error}") from None

    def parameters(self) -> dict[str, Any]:
        own = self.wrapped.identity() if isinstance(self.wrapped, OnnxTransform) else {}
        return {"label": self.label, "source_digest": self.digest, **({"wrapped": own} if own else {})}

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        if isinstance(self.wrapped, OnnxTransform):
            return self.wrapped.apply(model, workspace)
        self.wrapped(model)
        return TransformResult(modified=True)


def resolve(transforms: Sequence[TransformLike]) -> list[OnnxTransform]:
    """Turns what the user wrote into transforms.

    Raises:
        OptionError: an unknown name or parameter, with the nearest known one.
        TransformError: a custom transform cannot be loaded.
    """
    if isinstance(transforms, str) or not isinstance(transforms, Sequence):
        raise OptionError(f"transforms must be a list of names, classes or 'file.py:Class', got {transforms!r}.")
    return [_resolve(item) for item in transforms]


def run_queue(
    model: ir.Model,
    transforms: Sequence[OnnxTransform],
    workspace: Path,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Applies the transforms in order; returns one manifest record each.

    Raises:
        TransformError: a transform failed, or left a graph whose inputs or outputs differ.
    """
    records = []
    before = _signature(model)
    for number, transform in enumerate(transforms):
        progress(transform.name, number, len(transforms))
        # A place of its own: two transforms may choose the same file name.
        place = workspace / str(number)
        place.mkdir()
        try:
            result = transform.apply(model, place)
        except (QEfficientError, OSError):  # errors with a meaning of their own, such as a full disk
            raise
        except Exception as error:
            label = transform.label if isinstance(transform, CustomTransform) else transform.name
            raise TransformError(f"{label} failed: {type(error).__name__}: {error}") from error
        if not isinstance(result, TransformResult):
            raise TransformError(
                f"{transform.name}.apply() must return a TransformResult, got {type(result).__name__}."
            )
        after = _signature(model)
        if after != before and not transform.changes_interface:
            raise TransformError(f"{transform.name} changed the names of the graph's inputs or outputs: not allowed.")
        before = after
        records.append({**transform.identity(), "modified": result.modified, "facts": result.facts})
    return records


def _signature(model: ir.Model) -> tuple[list[str | None], list[str | None]]:
    return [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]


def _resolve(item: TransformLike) -> OnnxTransform:
    if isinstance(item, OnnxTransform):
        return item if type(item) in BUILT_IN.values() else _custom(item)
    if isinstance(item, type):
        if item in BUILT_IN.values():
            return item()
        return _custom(_instantiate(item, str(item.__qualname__)))
    if callable(item):
        return _custom(item)
    if not isinstance(item, str):
        raise OptionError(f"a transform is a name, a class or 'file.py:Class', got {item!r}.")
    head, _, tail = item.partition(":")
    if head.endswith(".py"):
        return _from_file(Path(head), tail)
    if head not in BUILT_IN:
        raise OptionError(
            f"there is no transform {head!r}; built in: {sorted(BUILT_IN)}, your own as 'file.py:Class'."
            f"{did_you_mean(head, BUILT_IN)}"
        )
    return _with_parameters(BUILT_IN[head], tail)


def _with_parameters(cls: type[OnnxTransform], text: str) -> OnnxTransform:
    """``SplitWeights:max_shard_size=500MB`` -> the transform."""
    if not text:
        return cls()
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if not separator or key not in known:
            raise OptionError(
                f"{cls.name} takes {sorted(known)} as parameter=value, got {part!r}.{did_you_mean(key, known)}"
            )
        kind = str(known[key].type)
        values[key] = _converted(value, kind)
    return cls(**values)


def _converted(text: str, kind: str) -> Any:
    """A parameter's value; where both a number and words are allowed, what looks like a number is one."""
    if "str" in kind:
        return int(text) if "int" in kind and text.isdigit() else text
    return _flag(text) if "bool" in kind else _number(text)


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise OptionError(f"{text!r} is neither true nor false.")
    return text.lower() in ("true", "1")


def _number(text: str) -> float:
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise OptionError(f"{text!r} is not a number.") from None


def _custom(item: Any) -> CustomTransform:
    cls = item if inspect.isfunction(item) else type(item)
    label = getattr(cls, "__qualname__", type(item).__qualname__)
    _check_plain(item, label)
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        raise TransformError(
            f"the source of {label} cannot be read, so its results could not be cached safely: put it in a file and "
            "pass 'file.py:Class'."
        ) from None
    return CustomTransform(item, label, source)


def _check_plain(item: Any, label: str) -> None:
    """Refuses what two of may differ although their source is one: the cache could not tell them apart."""
    if isinstance(item, OnnxTransform):
        return
    if not inspect.isfunction(item) or item.__closure__ or item.__defaults__ or item.__kwdefaults__:
        raise TransformError(
            f"{label} must be an OnnxTransform or a plain function without captured variables or default arguments: "
            "give what it remembers to an OnnxTransform's fields."
        )


def _from_file(path: Path, name: str) -> CustomTransform:
    if not path.is_file():
        raise TransformError(f"the transform file {path} does not exist.")
    if not name:
        raise OptionError(f"name the class or function in {path.name}: '{path}:Class'.")
    source = path.read_text(encoding="utf-8")
    try:
        module = run_source(source, path)
    except Exception as error:
        raise TransformError(f"{path} failed while loading: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise TransformError(f"{path} has no {name!r}.{did_you_mean(name, names)}")
    found = getattr(module, name)
    item = _instantiate(found, name) if isinstance(found, type) else found
    _check_plain(item, name)
    return CustomTransform(item, name, source)


def _instantiate(cls: type, name: str) -> OnnxTransform | Callable[[ir.Model], Any]:
    if not issubclass(cls, OnnxTransform):
        raise TransformError(f"{name} must derive from QEfficient.transforms.onnx.base.OnnxTransform.")
    try:
        return cls()
    except TypeError as error:
        raise TransformError(f"{name} needs arguments: pass an instance instead ({error}).") from None

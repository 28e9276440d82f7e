"""Would a graph compile for Cloud AI? What the public facts about its compiler say, node by node."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from QEfficient.targets.manifest import Manifest
from QEfficient.targets.qaic_files import RETAINED

if TYPE_CHECKING:
    import onnx_ir as ir

#: Operators in graphs known to have been sent to the compiler; evidence, not a guarantee, and others may compile too.
SEEN = frozenset({
    "Add", "And", "ArgMax", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv", "CumSum", "Div", "Dropout",
    "Einsum", "Equal", "Erf", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gemm", "Greater",
    "Identity", "InstanceNormalization", "LayerNormalization", "Less", "LessOrEqual", "Log", "MatMul", "Mod", "Mul",
    "Neg", "Not", "Or", "Pow", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape",
    "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign", "Slice", "Softmax", "Sqrt", "Squeeze", "Sub", "Tanh",
    "Tile", "TopK", "Transpose", "Unsqueeze", "Where", "Xor", "BitShift", "CastLike", "DequantizeLinear", "MatMulNBits",
})  # fmt: skip
#: Their output's shape depends on data, and the compiler takes exact shapes only.
DATA_DEPENDENT = frozenset({"NonZero", "Unique", "Compress", "StringSplit", "NonMaxSuppression"})
MOST_OPSET, MOST_IR = 18, 8
#: Operators whose output's size their inputs' contents decide, and which inputs those are.
_SHAPED_BY = {
    "Slice": (1, 2), "Range": (0, 1, 2), "Expand": (1,), "Reshape": (1,), "ConstantOfShape": (0,), "Tile": (1,),
    "Split": (1,), "TopK": (1,), "Pad": (1,), "OneHot": (1,),
}  # fmt: skip
#: What one protobuf file can hold.
MOST_PROTOBUF = 2 << 30
INT32_MAX = (1 << 31) - 1
FP16_MAX = 65504.0
#: Constants larger than this are weights: their range is what FP16Clip looked at.
_SMALL = 1 << 16


@dataclass(frozen=True)
class Finding:
    """Something the compiler may stumble over.

    Attributes:
        certain: a documented rule is broken; otherwise nothing public says whether it compiles.
        change: what to do about it.
    """

    certain: bool
    what: str
    change: str


def check_graph(model: ir.Model, manifest: Manifest, path: Path) -> list[Finding]:
    """All findings for a graph and the sizes it is to be compiled for; certain ones first."""
    found = [
        *_versions(model, path),
        *_operators(model),
        *_shapes(model),
        *_sizes(model, manifest),
        *_states(model),
        *_constants(model),
        *_weights(model),
    ]
    return sorted(found, key=lambda finding: not finding.certain)


def _versions(model: ir.Model, path: Path) -> Iterator[Finding]:
    opset = model.graph.opset_imports.get("") or 0
    if opset > MOST_OPSET:
        yield Finding(True, f"opset {opset} is above {MOST_OPSET}", "run the transform LowerOpset")
    if model.ir_version > MOST_IR:
        yield Finding(True, f"IR version {model.ir_version} is above {MOST_IR}", "run the transform LowerOpset")
    if path.stat().st_size > MOST_PROTOBUF:
        yield Finding(True, f"{path.name} is larger than a protobuf file can be", "keep weights as external data")


def _operators(model: ir.Model) -> Iterator[Finding]:
    bodies = set(model.functions)
    unknown: Counter[str] = Counter()
    where: dict[str, str] = {}
    for node in _nodes(model):
        kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        where.setdefault(kind, str(node.name))
        if node.domain and node.op_identifier() not in bodies and node.op_type not in SEEN:
            yield Finding(True, f"{kind} ({node.name}) has no body in the graph", "give it a body, or replace it")
        elif not node.domain and node.op_type not in SEEN | DATA_DEPENDENT:
            unknown[kind] += 1
        if node.op_type == "Loop" and not _constant(node.inputs[0]):
            yield Finding(
                True, f"Loop ({node.name}) has a computed trip count", "unroll it, or give it a constant count"
            )
    for kind, count in sorted(unknown.items()):
        times = f"{count} times" if count > 1 else "once"
        change = "list the SDK's operators with qaic-compile -operators-supported=onnx, or rewrite it with a transform"
        yield Finding(False, f"{kind} ({times}, first {where[kind]}) is in no graph known to compile", change)


def _shapes(model: ir.Model) -> Iterator[Finding]:
    node = data_dependent(model)
    if node is not None:
        change = "write the model without shapes that depend on data"
        yield Finding(True, f"{node.op_type} ({node.name}) gives a shape that depends on data", change)


def data_dependent(model: ir.Model) -> ir.Node | None:
    """The first node whose output's size depends on data, and not only on the sizes of inputs; None when all are exact.

    The experts of a mixture-of-experts layer that take the rows routed to them are such a case.
    """
    fixed: set[ir.Value] = {v for v in model.graph.initializers.values() if not v.is_graph_input()}
    for node in model.graph:
        if node.op_type in DATA_DEPENDENT and not node.domain:
            return node
        read = list(node.inputs)
        places = _SHAPED_BY.get(node.op_type, ()) if not node.domain else ()
        if any(place < len(read) and (v := read[place]) is not None and v not in fixed for place in places):
            return node
        if node.op_type in ("Shape", "Size", "Constant") or all(v is None or v in fixed for v in read):
            fixed.update(node.outputs)
    return None


def _sizes(model: ir.Model, manifest: Manifest) -> Iterator[Finding]:
    for value in model.graph.inputs:
        if not value.name:
            yield Finding(True, "an input has no name", "name every input")
        if value.shape is None:
            yield Finding(True, f"the input {value.name} has no shape", "give it one")
            continue
        for place, dim in enumerate(value.shape):
            symbol = dim if isinstance(dim, int) else dim.value
            if symbol is None:
                yield Finding(True, f"dimension {place} of the input {value.name} has no name", "name or fix it")
            missing = [s.name for s in manifest.specializations if isinstance(symbol, str) and symbol not in s.symbols]
            if missing:
                yield Finding(True, f"the dimension {symbol} has no size in {', '.join(missing)}", "pass its option")
        if value.dtype is not None and value.dtype.name == "INT32" and value.name in ("input_ids", "position_ids"):
            yield Finding(True, f"{value.name} is int32, and the runtime sends int64", "export it as int64")
    for value in model.graph.outputs:
        if not value.name:
            yield Finding(True, "an output has no name", "name every output")


def _states(model: ir.Model) -> Iterator[Finding]:
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = {str(value.name): value for value in model.graph.outputs}
    for name, value in outputs.items():
        if not name.endswith(RETAINED):
            continue
        source = inputs.get(name.removesuffix(RETAINED))
        if source is None:
            yield Finding(True, f"{name} has no input {name.removesuffix(RETAINED)}", "pair state by name")
        elif source.dtype != value.dtype or str(source.shape) != str(value.shape):
            yield Finding(True, f"{source.name} and {name} differ in type or shape", "make them equal")
    for name in map(str, inputs):
        if name.startswith("past_") and f"{name}{RETAINED}" not in outputs:
            yield Finding(True, f"{name} has no output {name}{RETAINED}", "give the new state this name")


def _constants(model: ir.Model) -> Iterator[Finding]:
    """Indices and numbers beyond what the card's 16 bits, or a bounds check elsewhere, can take."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.size > _SMALL or tensor.size == 0:
            continue
        array = tensor.numpy()
        if array.dtype.kind in "iu" and bool((array == INT32_MAX).any()):
            readers = {use.node.op_type for use in value.uses()}
            if readers & {"Gather", "GatherND", "GatherElements", "ScatterND", "ScatterElements", "Where"}:
                change = "keep indices inside the buffer and mask what they read"
                yield Finding(True, f"{value.name} holds the index {INT32_MAX}, which leaves every buffer", change)
        if tensor.dtype.is_floating_point():
            peak = float(abs(array.astype("float64")).max())
            if peak > FP16_MAX and not math.isnan(peak):
                change = "run the transform FP16Clip, or keep its readers in float32 (node_precision_info)"
                yield Finding(False, f"{value.name} holds {peak:.3g}, beyond the range of float16", change)
    for node in model.graph.all_nodes():
        if node.op_type in ("ScatterND", "GatherND") and not node.domain:
            indices = node.inputs[1]
            if indices is not None and indices.dtype is not None and indices.dtype.name == "INT32":
                yield Finding(True, f"{node.op_type} ({node.name}) has int32 indices, ONNX wants int64", "cast them")


def _weights(model: ir.Model) -> Iterator[Finding]:
    names = Counter(str(value.name) for value in model.graph.initializers.values())
    stored = [value for value in model.graph.initializers.values() if value.const_value is not None]
    for value in stored:
        if value.const_value is not None and value.const_value.dtype.name == "BFLOAT16":
            yield Finding(True, f"{value.name} is bfloat16, which AI 100 does not have", "run the transform NoBfloat16")
            break
    inside = sum(v.const_value.nbytes for v in stored if v.const_value is not None and not _external(v.const_value))
    if inside > MOST_PROTOBUF:
        yield Finding(True, f"{inside / 1e9:.1f} GB of weights lie in the graph itself", "keep them as external data")
    for name, count in names.items():
        if count > 1:
            yield Finding(True, f"{count} weights are called {name}", "give each its own name")


def _external(tensor: ir.TensorProtocol) -> bool:
    from QEfficient.onnx_io import FileTensor

    return isinstance(tensor, FileTensor)


def _constant(value: ir.Value | None) -> bool:
    if value is None:
        return True
    maker = value.producer()
    return value.const_value is not None or (maker is not None and maker.op_type == "Constant")


def operators(model: ir.Model) -> Mapping[str, int]:
    """How often each operator occurs in the graph and the bodies of its functions."""
    return Counter(node.op_type for node in _nodes(model))


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()

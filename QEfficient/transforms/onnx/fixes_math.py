"""Rules of FixTrainingOps: activations, normalisation, reductions and arithmetic in basic operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from QEfficient.errors import TransformError
from QEfficient.transforms.onnx.graph import Maker
from QEfficient.transforms.onnx.sizes import Sizes

#: A node -> values that replace its outputs; None for an output nobody uses.
Rule = Callable[[Maker, ir.Node], Sequence[ir.Value | None]]
MATH_RULES: dict[str, Rule] = {}


def attribute(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return found.as_int() if found is not None else default


def dtype(value: ir.Value) -> ir.DataType:
    return Sizes(2).dtype(value)


def rank(node: ir.Node, value: ir.Value) -> int:
    """The number of dimensions.

    Raises:
        TransformError: the graph does not say.
    """
    if value.shape is None and value.const_value is None and value.producer() is None:
        raise TransformError(f"FixTrainingOps: the rank of {value.name}, an input of {node.op_type}, is not known.")
    return len(Sizes(2).shape(value))


def known(value: ir.Value | None) -> np.ndarray | None:
    """The contents of a constant."""
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def required(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None
    return value


def scalar(make: Maker, value: float, like: ir.Value) -> ir.Value:
    """A 0-d constant of another value's type."""
    return make.constant(value, dtype(like))


def count_along(make: Maker, value: ir.Value, axis: int) -> ir.Value:
    """0, 1, ... along an axis, int64."""
    length = make.op("Squeeze", make.op("Shape", value, start=axis, end=axis + 1), make.constant([0]))
    return make.op("Range", make.constant(0), length, make.constant(1))


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            MATH_RULES[name] = function
        return function

    return register


@rule("Gelu")
def gelu(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    x = required(node, 0)
    found = node.attributes.get("approximate")
    if found is not None and found.as_string() == "tanh":
        cube = make.op("Mul", make.op("Mul", x, x), x)
        inner = make.op("Add", x, make.op("Mul", cube, scalar(make, 0.044715, x)))
        curve = make.op("Tanh", make.op("Mul", inner, scalar(make, math.sqrt(2 / math.pi), x)))
    else:
        curve = make.op("Erf", make.op("Mul", x, scalar(make, math.sqrt(0.5), x)))
    half = make.op("Mul", x, scalar(make, 0.5, x))
    return [make.op("Mul", half, make.op("Add", curve, scalar(make, 1, x)))]


@rule("LayerNormalization")
def layer_norm(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    """With the mean and the inverse deviation, which the backward pass reads."""
    x, scale = required(node, 0), required(node, 1)
    dims = rank(node, x)
    axes = make.constant(list(range(attribute(node, "axis", -1) % dims, dims)))
    epsilon = node.attributes.get("epsilon")
    mean = make.op("ReduceMean", x, axes, keepdims=1)
    centred = make.op("Sub", x, mean)
    variance = make.op("ReduceMean", make.op("Mul", centred, centred), axes, keepdims=1)
    deviation = make.op("Sqrt", make.op("Add", variance, scalar(make, epsilon.as_float() if epsilon else 1e-5, x)))
    inverse = make.op("Div", scalar(make, 1, x), deviation)
    y = make.op("Mul", make.op("Mul", centred, inverse), scale)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        y = make.op("Add", y, node.inputs[2])
    return [y, mean, inverse][: len(node.outputs)]


def _shifted(make: Maker, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    x = required(node, 0)
    axes = make.constant([attribute(node, "axis", -1)])
    return make.op("Sub", x, make.op("ReduceMax", x, axes, keepdims=1)), axes


@rule("LogSoftmax")
def log_softmax(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    shifted, axes = _shifted(make, node)
    total = make.op("ReduceSum", make.op("Exp", shifted), axes, keepdims=1)
    return [make.op("Sub", shifted, make.op("Log", total))]


@rule("Softmax")
def softmax(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    shifted, axes = _shifted(make, node)
    powers = make.op("Exp", shifted)
    return [make.op("Div", powers, make.op("ReduceSum", powers, axes, keepdims=1))]


@rule("IsNaN")
def is_nan(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    x = required(node, 0)
    return [make.op("Not", make.op("Equal", x, x))]


@rule("IsInf")
def is_inf(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    x = required(node, 0)
    wanted = [s for s, n in ((1, "detect_positive"), (-1, "detect_negative")) if attribute(node, n, 1)]
    if len(wanted) == 2:
        return [make.op("Equal", make.op("Abs", x), scalar(make, math.inf, x))]
    if not wanted:
        return [make.op("Less", x, x)]
    return [make.op("Equal", x, scalar(make, wanted[0] * math.inf, x))]


@rule("Xor")
def xor(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    return [make.op("Not", make.op("Equal", required(node, 0), required(node, 1)))]


@rule("Sign")
def sign(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    x = required(node, 0)
    zero, kind = scalar(make, 0, x), dtype(x).value
    above, below = make.op("Greater", x, zero), make.op("Less", x, zero)
    return [make.op("Sub", make.op("Cast", above, to=kind), make.op("Cast", below, to=kind))]


@rule("Reciprocal")
def reciprocal(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    x = required(node, 0)
    return [make.op("Div", scalar(make, 1, x), x)]


@rule("ReduceMean")
def reduce_mean(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    x = required(node, 0)
    keep, axes = attribute(node, "keepdims", 1), node.inputs[1] if len(node.inputs) > 1 else None
    places = known(axes)
    if axes is not None and places is None:
        raise TransformError(f"FixTrainingOps: the axes of {node.name} (ReduceMean) are not constant.")
    dims = rank(node, x)
    used = range(dims) if places is None or not places.size else [int(axis) % dims for axis in places]
    count: ir.Value | None = None
    for axis in used:
        size = make.op("Squeeze", make.op("Shape", x, start=axis, end=axis + 1), make.constant([0]))
        count = size if count is None else make.op("Mul", count, size)
    total = make.op("ReduceSum", x, make.constant(list(used)), keepdims=keep)
    assert count is not None
    return [make.op("Div", total, make.op("Cast", count, to=dtype(x).value))]


@rule("Gemm")
def gemm(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    a, b = required(node, 0), required(node, 1)
    if attribute(node, "transA", 0):
        a = make.op("Transpose", a, perm=[1, 0])
    if attribute(node, "transB", 0):
        b = make.op("Transpose", b, perm=[1, 0])
    y = make.op("MatMul", a, b)
    alpha, beta = node.attributes.get("alpha"), node.attributes.get("beta")
    if alpha is not None and alpha.as_float() != 1:
        y = make.op("Mul", y, scalar(make, alpha.as_float(), a))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = node.inputs[2]
        if beta is not None and beta.as_float() != 1:
            bias = make.op("Mul", bias, scalar(make, beta.as_float(), a))
        y = make.op("Add", y, bias)
    return [y]


@rule("Trilu")
def trilu(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    x = required(node, 0)
    dims = rank(node, x)
    columns = make.op("Unsqueeze", count_along(make, x, dims - 1), make.constant([0]))
    rows = make.op("Unsqueeze", count_along(make, x, dims - 2), make.constant([1]))
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        rows = make.op("Add", rows, node.inputs[1])
    kept = make.op("GreaterOrEqual" if attribute(node, "upper", 1) else "LessOrEqual", columns, rows)
    return [make.op("Where", kept, x, scalar(make, 0, x))]


@rule("CumSum")
def cumulative_sum(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    """A sum over a triangle of pairs: quadratic along the axis, which is short where training graphs count."""
    x, place = required(node, 0), known(required(node, 1))
    if place is None:
        raise TransformError(f"FixTrainingOps: the axis of {node.name} (CumSum) is not constant.")
    dims = rank(node, x)
    axis = int(place) % dims
    order = [a for a in range(dims) if a != axis] + [axis]
    moved = make.op("Transpose", x, perm=order)
    numbers = count_along(make, moved, dims - 1)
    result, source = (
        make.op("Unsqueeze", numbers, make.constant([1])),
        make.op("Unsqueeze", numbers, make.constant([0])),
    )
    inside = ("Less", "Greater") if attribute(node, "exclusive", 0) else ("LessOrEqual", "GreaterOrEqual")
    counted = make.op(inside[attribute(node, "reverse", 0)], source, result)
    pairs = make.op("Where", counted, make.op("Unsqueeze", moved, make.constant([-2])), scalar(make, 0, x))
    total = make.op("ReduceSum", pairs, make.constant([-1]), keepdims=0)
    return [make.op("Transpose", total, perm=[order.index(a) for a in range(dims)])]

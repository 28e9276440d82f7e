"""Lowering rules: element-wise arithmetic, comparisons, casts and reductions."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from QEfficient.errors import ExportError
from QEfficient.exporter.training.builder import DTYPES
from QEfficient.exporter.training.lowering import Lowering, dtype_of, is_tensor, rule
from QEfficient.exporter.training.rules_shape import joined_halves

_UNARY = {
    "neg": "Neg", "exp": "Exp", "log": "Log", "cos": "Cos", "sin": "Sin", "sigmoid": "Sigmoid", "erf": "Erf",
    "tanh": "Tanh", "sqrt": "Sqrt", "abs": "Abs", "reciprocal": "Reciprocal", "relu": "Relu", "logical_not": "Not",
    "bitwise_not": "Not", "ceil": "Ceil", "floor": "Floor", "sign": "Sign", "isnan": "IsNaN", "isinf": "IsInf",
}  # fmt: skip
_BINARY = {
    "mul.Tensor": "Mul", "mul.Scalar": "Mul", "sub.Tensor": "Sub", "sub.Scalar": "Sub", "div.Tensor": "Div",
    "div.Scalar": "Div", "maximum.default": "Max", "minimum.default": "Min",
}  # fmt: skip
_COMPARE = {"le": "LessOrEqual", "lt": "Less", "ge": "GreaterOrEqual", "gt": "Greater", "eq": "Equal"}
_LOGICAL = {"and": "And", "or": "Or", "xor": "Xor"}


def _register() -> None:
    for aten, onnx in _UNARY.items():
        rule(f"{aten}.default")(_unary(onnx))
    for aten, onnx in _BINARY.items():
        rule(aten)(_binary(onnx))
    for aten, onnx in _COMPARE.items():
        rule(f"{aten}.Tensor", f"{aten}.Scalar")(_compare(onnx))
    for aten, onnx in _LOGICAL.items():
        rule(f"bitwise_{aten}.Tensor", f"logical_{aten}.default")(_logical(onnx))


def _unary(op_type: str) -> Any:
    def apply(s: Lowering, n: Node, x: Node) -> ir.Value:
        return s.build.op(op_type, s.number(x, dtype_of(n)) if op_type not in ("IsNaN", "IsInf") else s.value(x))

    return apply


def _binary(op_type: str) -> Any:
    def apply(s: Lowering, n: Node, x: Any, y: Any, alpha: float = 1) -> ir.Value:
        left, right = s.number(x, dtype_of(n)), s.number(y, dtype_of(n))
        if alpha != 1:
            right = s.build.op("Mul", right, s.build.scalar(alpha, dtype_of(n)))
        return s.build.op(op_type, left, right)

    return apply


def _compare(op_type: str) -> Any:
    def apply(s: Lowering, n: Node, x: Node, y: Any) -> ir.Value:
        dtype = dtype_of(x)
        if is_tensor(y):
            dtype = torch.promote_types(dtype, dtype_of(y))
        elif isinstance(y, float) and not dtype.is_floating_point:
            dtype = torch.float32
        return s.build.op(op_type, s.number(x, dtype), s.number(y, dtype))

    return apply


def _logical(op_type: str) -> Any:
    def apply(s: Lowering, n: Node, x: Node, y: Node) -> ir.Value:
        return s.build.op(op_type, s.number(x, torch.bool), s.number(y, torch.bool))

    return apply


_register()


@rule("add.Tensor", "add.Scalar")
def add(s: Lowering, n: Node, x: Any, y: Any, alpha: float = 1) -> ir.Value:
    if alpha == 1 and is_tensor(x) and is_tensor(y):
        joined = joined_halves(s, x, y)
        if joined is not None:
            return joined
    value: ir.Value = _binary("Add")(s, n, x, y, alpha)
    return value


@rule("ne.Tensor", "ne.Scalar")
def not_equal(s: Lowering, n: Node, x: Node, y: Any) -> ir.Value:
    return s.build.op("Not", _compare("Equal")(s, n, x, y))


@rule("pow.Tensor_Scalar")
def power(s: Lowering, n: Node, x: Node, exponent: float) -> ir.Value:
    value = s.number(x, dtype_of(n))
    if exponent == 1:
        return value
    if exponent == 2:
        return s.build.op("Mul", value, value)
    if exponent == 3:
        return s.build.op("Mul", s.build.op("Mul", value, value), value)
    if exponent == -0.5:
        return s.build.op("Reciprocal", s.build.op("Sqrt", value))
    return s.build.op("Pow", value, s.build.scalar(exponent, dtype_of(n)))


@rule("pow.Tensor_Tensor", "pow.Scalar")
def power_of_tensors(s: Lowering, n: Node, x: Any, exponent: Any) -> ir.Value:
    return s.build.op("Pow", s.number(x, dtype_of(n)), s.number(exponent, dtype_of(n)))


@rule("rsqrt.default")
def rsqrt(s: Lowering, n: Node, x: Node) -> ir.Value:
    return s.build.op("Reciprocal", s.build.op("Sqrt", s.value(x)))


@rule("log1p.default")
def log1p(s: Lowering, n: Node, x: Node) -> ir.Value:
    return s.build.op("Log", s.build.op("Add", s.value(x), s.build.scalar(1, dtype_of(n))))


@rule("clamp.default")
def clamp(s: Lowering, n: Node, x: Node, low: Any = None, high: Any = None) -> ir.Value:
    value = s.value(x)
    for op_type, bound in (("Max", low), ("Min", high)):
        if bound is not None:
            value = s.build.op(op_type, value, s.number(bound, dtype_of(n)))
    return value


@rule("where.self")
def where(s: Lowering, n: Node, condition: Node, x: Any, y: Any) -> ir.Value:
    return s.build.op("Where", s.value(condition), s.number(x, dtype_of(n)), s.number(y, dtype_of(n)))


@rule("masked_fill.Scalar")
def masked_fill(s: Lowering, n: Node, x: Node, mask: Node, value: float) -> ir.Value:
    return s.build.op("Where", s.value(mask), s.build.scalar(value, dtype_of(n)), s.value(x))


@rule("_to_copy.default")
def to_copy(s: Lowering, n: Node, x: Node, **options: Any) -> ir.Value:
    return s.number(x, dtype_of(n))


def _reduce(s: Lowering, n: Node, op_type: str, x: Node, dims: Any, keepdim: bool) -> ir.Value:
    return _reduced(s, op_type, s.number(x, dtype_of(n)), dims, keepdim)


def _reduced(s: Lowering, op_type: str, value: ir.Value, dims: Any, keepdim: bool) -> ir.Value:
    axes = [] if dims is None else ([dims] if isinstance(dims, int) else list(dims))
    if not axes:
        return s.build.op(op_type, value, keepdims=int(keepdim))
    return s.build.op(op_type, value, s.build.constant(axes), keepdims=int(keepdim))


@rule("sum.default", "sum.dim_IntList")
def reduce_sum(s: Lowering, n: Node, x: Node, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> ir.Value:
    return _reduce(s, n, "ReduceSum", x, dims, keepdim)


@rule("mean.default", "mean.dim")
def reduce_mean(s: Lowering, n: Node, x: Node, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> ir.Value:
    return _reduce(s, n, "ReduceMean", x, dims, keepdim)


@rule("amax.default")
def reduce_max(s: Lowering, n: Node, x: Node, dims: Any = (), keepdim: bool = False) -> ir.Value:
    return _reduce(s, n, "ReduceMax", x, dims, keepdim)


@rule("amin.default")
def reduce_min(s: Lowering, n: Node, x: Node, dims: Any = (), keepdim: bool = False) -> ir.Value:
    return _reduce(s, n, "ReduceMin", x, dims, keepdim)


@rule("linalg_vector_norm.default")
def vector_norm(
    s: Lowering, n: Node, x: Node, ord: Any = 2, dims: Any = None, keepdim: bool = False, dtype: Any = None
) -> ir.Value:
    if ord != 2:
        raise ExportError(f"a vector norm of order {ord} has no rule for ONNX in a training step: only order 2 has.")
    value = s.number(x, dtype_of(n))
    return s.build.op("Sqrt", _reduced(s, "ReduceSum", s.build.op("Mul", value, value), dims, keepdim))


@rule("any.default", "any.dim", "any.dims")
def reduce_any(s: Lowering, n: Node, x: Node, dims: Any = None, keepdim: bool = False) -> ir.Value:
    counted = s.build.op("Cast", s.number(x, torch.bool), to=ir.DataType.INT32.value)
    axes = list(range(x.meta["val"].dim())) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    found = s.build.op("ReduceMax", counted, s.build.constant(axes), keepdims=int(keepdim))
    return s.build.op("Cast", found, to=ir.DataType.BOOL.value)


@rule("cumsum.default")
def cumulative_sum(s: Lowering, n: Node, x: Node, dim: int, dtype: Any = None) -> ir.Value:
    return s.build.op("CumSum", s.number(x, dtype_of(n)), s.build.constant(dim))


@rule("argmax.default")
def argmax(s: Lowering, n: Node, x: Node, dim: int | None = None, keepdim: bool = False) -> ir.Value:
    value = s.value(x)
    if dtype_of(x) in (torch.bool, torch.int64):
        value = s.build.op("Cast", value, to=ir.DataType.INT32.value)
    if dim is None:
        value, dim = s.build.op("Reshape", value, s.build.constant([-1])), 0
    return s.build.op("ArgMax", value, axis=dim, keepdims=int(keepdim))


@rule("div.Tensor_mode", "div.Scalar_mode", "floor_divide.default")
def rounded_division(s: Lowering, n: Node, x: Any, y: Any, rounding_mode: str | None = "floor") -> ir.Value:
    dtype = dtype_of(n)
    if dtype.is_floating_point:
        quotient = s.build.op("Div", s.number(x, dtype), s.number(y, dtype))
        if rounding_mode is None:
            return quotient
        if rounding_mode == "floor":
            return s.build.op("Floor", quotient)
        return s.build.op("Mul", s.build.op("Sign", quotient), s.build.op("Floor", s.build.op("Abs", quotient)))
    # ONNX truncates whole numbers; flooring differs for negative ones only.
    left, right = s.number(x, dtype), s.number(y, dtype)
    quotient = s.build.op("Div", left, right)
    if rounding_mode != "floor":
        return quotient
    rest = s.build.op("Sub", left, s.build.op("Mul", quotient, right))
    zero = s.build.scalar(0, dtype)
    below = s.build.op(
        "And",
        s.build.op("Not", s.build.op("Equal", rest, zero)),
        s.build.op("Not", s.build.op("Equal", s.build.op("Sign", rest), s.build.op("Sign", right))),
    )
    return s.build.op("Sub", quotient, s.build.op("Cast", below, to=DTYPES[dtype].value))

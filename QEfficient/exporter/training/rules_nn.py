"""Lowering rules: matrix products, softmax, normalisation, activations and embeddings."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from QEfficient.exporter.training.lowering import Lowering, dtype_of, rule

aten = torch.ops.aten


def _peeled(s: Lowering, x: Node) -> tuple[ir.Value, bool]:
    """A matrix without its transposes, and whether one is left: Gemm takes it as an attribute."""
    if x.target is aten.permute.default:
        order = [axis % 2 for axis in x.args[1]]  # type: ignore[union-attr, operator]
        if len(order) == 2:
            value, transposed = _peeled(s, x.args[0])  # type: ignore[arg-type]
            return value, transposed != (order == [1, 0])
    return s.value(x), False


@rule("mm.default")
def mm(s: Lowering, n: Node, x: Node, y: Node) -> ir.Value:
    """One frozen weight serves the forward pass (transposed) and the backward pass (as it is)."""
    (a, ta), (b, tb) = _peeled(s, x), _peeled(s, y)
    if not ta and not tb:
        return s.build.op("MatMul", a, b)
    return s.build.op("Gemm", a, b, transA=int(ta), transB=int(tb))


@rule("addmm.default")
def addmm(s: Lowering, n: Node, bias: Node, x: Node, y: Node, beta: float = 1, alpha: float = 1) -> ir.Value:
    (a, ta), (b, tb) = _peeled(s, x), _peeled(s, y)
    return s.build.op("Gemm", a, b, s.value(bias), transA=int(ta), transB=int(tb), alpha=float(alpha), beta=float(beta))


@rule("bmm.default")
def bmm(s: Lowering, n: Node, x: Node, y: Node) -> ir.Value:
    return s.build.op("MatMul", s.value(x), s.value(y))


@rule("_softmax.default")
def softmax(s: Lowering, n: Node, x: Node, dim: int, half_to_float: bool) -> ir.Value:
    return s.build.op("Softmax", s.number(x, dtype_of(n)), axis=dim)


@rule("_log_softmax.default")
def log_softmax(s: Lowering, n: Node, x: Node, dim: int, half_to_float: bool) -> ir.Value:
    return s.build.op("LogSoftmax", s.number(x, dtype_of(n)), axis=dim)


@rule("gelu.default")
def gelu(s: Lowering, n: Node, x: Node, approximate: str = "none") -> ir.Value:
    return s.build.op("Gelu", s.value(x), approximate=approximate)


@rule("silu.default")
def silu(s: Lowering, n: Node, x: Node) -> ir.Value:
    return s.build.op("Mul", s.value(x), s.build.op("Sigmoid", s.value(x)))


@rule("native_layer_norm.default")
def layer_norm(
    s: Lowering, n: Node, x: Node, shape: Any, weight: Node | None, bias: Node | None, eps: float
) -> tuple[ir.Value, ...]:
    """The statistics are outputs too: the backward pass reads them."""
    scale = s.value(weight) if weight is not None else s.build.op(
        "Expand", s.build.scalar(1, dtype_of(x)), s.sizes(shape)
    )  # fmt: skip
    inputs = [s.value(x), scale, *([s.value(bias)] if bias is not None else [])]
    return s.build.ops("LayerNormalization", inputs, 3, axis=-len(shape), epsilon=eps)


@rule("embedding.default")
def embedding(s: Lowering, n: Node, weight: Node, ids: Node, *options: Any, **more: Any) -> ir.Value:
    return s.build.op("Gather", s.value(weight), s.value(ids), axis=0)

"""Lowering rules: mixture-of-experts routing and the grouped matrix product over sorted tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from QEfficient.errors import ExportError
from QEfficient.exporter.training.builder import DTYPES
from QEfficient.exporter.training.lowering import Lowering, dtype_of, rule

aten = torch.ops.aten


@rule("histc.default")
def histogram(s: Lowering, n: Node, x: Node, bins: int = 100, min: float = 0, max: float = 0) -> ir.Value:
    """Counts of whole numbers ``min..max`` with one bin each, the only form routers use."""
    ids = s.build.op("Cast", s.value(x), to=ir.DataType.INT64.value)
    wanted = s.build.constant(np.arange(bins, dtype=np.int64) + int(min))
    hits = s.build.op("Equal", s.build.op("Unsqueeze", ids, s.build.constant([-1])), wanted)
    counted = s.build.op("Cast", hits, to=ir.DataType.INT32.value)
    total = s.build.op("ReduceSum", counted, s.build.constant([0]), keepdims=0)
    return s.build.op("Cast", total, to=DTYPES[dtype_of(n)].value)


@rule("_grouped_mm.default")
def grouped_mm(
    s: Lowering, n: Node, x: Node, weights: Node, offs: Node | None = None, bias: Any = None, dtype: Any = None
) -> ir.Value:
    """``x[offs[e-1]:offs[e]] @ weights[e]`` for every expert ``e``, joined: tokens are sorted by expert."""
    if offs is None or bias is not None:
        raise ExportError("a grouped matrix product without offsets or with a bias has no rule for ONNX yet.")
    return _products(s, x, weights, offs, transpose=False)


@rule("grouped_mm_fallback.default")
def grouped_mm_fallback(s: Lowering, n: Node, x: Node, weights: Node, offs: Node) -> ir.Value:
    """transformers' own operator for the same product."""
    return _products(s, x, weights, offs, transpose=False)


@rule("grouped_mm_fallback_backward.default")
def grouped_mm_backward(
    s: Lowering, n: Node, x: Node, weights: Node, offs: Node, gradient: Node
) -> tuple[ir.Value, ir.Value]:
    """Gradients of the product above for the tokens and for the weights (dropped later when the experts are frozen)."""
    per_expert = [
        s.build.op("Unsqueeze", s.build.op("Gemm", rows, out, transA=1), s.build.constant([0]))
        for rows, out in zip(_groups(s, x, weights, offs), _groups(s, gradient, weights, offs), strict=True)
    ]
    return _products(s, gradient, weights, offs, transpose=True), s.build.op("Concat", *per_expert, axis=0)


def _products(s: Lowering, x: Node, weights: Node, offs: Node, transpose: bool) -> ir.Value:
    """The experts' matrices may be stored transposed: Gemm takes that as an attribute, and nothing is copied for it."""
    while weights.target is aten.permute.default and list(weights.args[1]) in ([0, 2, 1], [0, -1, -2]):  # type: ignore[arg-type]
        weights, transpose = weights.args[0], not transpose  # type: ignore[assignment]
    parts = []
    for expert, rows in enumerate(_groups(s, x, weights, offs)):
        matrix = s.build.op("Gather", s.value(weights), s.build.constant(expert), axis=0)
        parts.append(s.build.op("Gemm", rows, matrix, transB=1) if transpose else s.build.op("MatMul", rows, matrix))
    return s.build.op("Concat", *parts, axis=0)


def _groups(s: Lowering, x: Node, weights: Node, offs: Node) -> list[ir.Value]:
    """The rows of ``x`` that belong to each expert."""
    constant = s.build.constant
    ends = s.build.op("Cast", s.value(offs), to=ir.DataType.INT64.value)
    groups, start = [], constant([0])
    for expert in range(weights.meta["val"].shape[0]):
        end = s.build.op("Slice", ends, constant([expert]), constant([expert + 1]), constant([0]))
        groups.append(s.build.op("Slice", s.value(x), start, end, constant([0])))
        start = end
    return groups

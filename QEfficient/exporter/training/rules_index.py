"""Lowering rules: gather, scatter, advanced indexing, sorting."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from QEfficient.errors import ExportError
from QEfficient.exporter.training.lowering import Lowering, dtype_of, is_tensor, rule

aten = torch.ops.aten


@rule("index_select.default")
def index_select(s: Lowering, n: Node, x: Node, dim: int, index: Node) -> ir.Value:
    return s.build.op("Gather", s.value(x), s.value(index), axis=dim)


@rule("gather.default")
def gather(s: Lowering, n: Node, x: Node, dim: int, index: Node, **options: Any) -> ir.Value:
    return s.build.op("GatherElements", s.value(x), s.value(index), axis=dim)


@rule("scatter.value")
def scatter_value(s: Lowering, n: Node, x: Node, dim: int, index: Node, value: float) -> ir.Value:
    updates = s.build.op("Expand", s.build.scalar(value, dtype_of(n)), s.build.op("Shape", s.value(index)))
    return s.build.op("ScatterElements", s.value(x), s.value(index), updates, axis=dim)


@rule("scatter.src")
def scatter_source(s: Lowering, n: Node, x: Node, dim: int, index: Node, source: Node) -> ir.Value:
    return s.build.op("ScatterElements", s.value(x), s.value(index), s.value(source), axis=dim)


@rule("scatter_add.default")
def scatter_add(s: Lowering, n: Node, x: Node, dim: int, index: Node, source: Node) -> ir.Value:
    return s.build.op("ScatterElements", s.value(x), s.value(index), s.value(source), axis=dim, reduction="add")


def _indices(s: Lowering, n: Node, index: list[Node | None]) -> ir.Value:
    """Index tensors broadcast together and stacked on a last axis, as GatherND and ScatterND take them."""
    if any(part is None for part in index):
        raise ExportError(f"{n.target} with a full slice before an index has no rule for ONNX yet.")
    columns = [s.value(part) for part in index if part is not None]
    last = s.build.constant([-1])
    if len(columns) == 1:
        return s.build.op("Unsqueeze", columns[0], last)
    total = columns[0]
    for column in columns[1:]:  # their sum has the broadcast shape
        total = s.build.op("Add", total, column)
    shape = s.build.op("Shape", total)
    spread = [s.build.op("Unsqueeze", s.build.op("Expand", column, shape), last) for column in columns]
    return s.build.op("Concat", *spread, axis=-1)


@rule("index.Tensor")
def index_tensor(s: Lowering, n: Node, x: Node, index: list[Node | None]) -> ir.Value:
    used = [place for place, part in enumerate(index) if part is not None]
    if len(used) == 1:
        part = index[used[0]]
        if part is not None and dtype_of(part) is torch.bool:
            raise ExportError("indexing with a boolean mask has no rule for ONNX in a training step.")
        return s.build.op("Gather", s.value(x), s.value(part), axis=used[0])  # type: ignore[arg-type]
    return s.build.op("GatherND", s.value(x), _indices(s, n, index))


@rule("index_put.default", "_unsafe_index_put.default")
def index_put(
    s: Lowering, n: Node, x: Node, index: list[Node | None], values: Node, accumulate: bool = False
) -> ir.Value:
    """With ``accumulate`` this is the gradient of a gather or an embedding."""
    if [part is None for part in index].count(False) == 1 and index[-1] is not None and len(index) > 1:
        return _index_put_on_axis(s, x, len(index) - 1, index[-1], values, accumulate)
    if _first(index) is not None and dtype_of(index[0]) is torch.bool:  # type: ignore[arg-type]
        return _masked_put(s, n, x, index, values, accumulate)
    indices = _indices(s, n, index)
    updates = s.value(values)
    wanted = _rank(_first(index)) + x.meta["val"].dim() - len(index)
    if values.meta["val"].dim() < wanted:
        shape = s.build.op("Shape", s.build.op("GatherND", s.value(x), indices))
        updates = s.build.op("Expand", updates, shape)
    reduction = {"reduction": "add"} if accumulate else {}
    return s.build.op("ScatterND", s.value(x), indices, updates, **reduction)


def _masked_put(s: Lowering, n: Node, x: Node, index: Any, values: Node, accumulate: bool) -> ir.Value:
    if accumulate or len(index) != 1 or values.meta["val"].dim() != 0:
        raise ExportError(f"{n.target} with a boolean mask has no rule for ONNX in a training step.")
    return s.build.op("Where", s.value(index[0]), s.number(values, dtype_of(n)), s.value(x))


def _index_put_on_axis(s: Lowering, x: Node, axis: int, index: Node, values: Node, accumulate: bool) -> ir.Value:
    """Moves the indexed axis to the front, where ScatterND works, and back."""
    rank = x.meta["val"].dim()
    front = [axis, *(a for a in range(rank) if a != axis)]
    back = [front.index(a) for a in range(rank)]
    count = index.meta["val"].dim()
    spread = [*range(axis, axis + count), *(a for a in range(rank - 1 + count) if not axis <= a < axis + count)]
    reduction = {"reduction": "add"} if accumulate else {}
    moved = s.build.op(
        "ScatterND",
        s.build.op("Transpose", s.value(x), perm=front),
        s.build.op("Unsqueeze", s.value(index), s.build.constant([-1])),
        s.build.op("Transpose", s.value(values), perm=spread),
        **reduction,
    )
    return s.build.op("Transpose", moved, perm=back)


def _first(index: list[Node | None]) -> Node | None:
    return index[0] if index else None


def _rank(node: Node | None) -> int:
    return node.meta["val"].dim() if node is not None and is_tensor(node) else 0


@rule("topk.default")
def topk(
    s: Lowering, n: Node, x: Node, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[ir.Value, ...]:
    arguments = [s.value(x), s.size(k)]
    return s.build.ops("TopK", arguments, 2, axis=dim, largest=int(largest), sorted=int(sorted))


@rule("sort.default", "sort.stable")
def sort(
    s: Lowering, n: Node, x: Node, dim: int = -1, descending: bool = False, stable: bool | None = None
) -> tuple[ir.Value, ...]:
    """TopK of everything; ONNX keeps the lower index first among equals, which makes it stable."""
    length = s.build.op("Shape", s.value(x), start=dim, end=None if dim == -1 else dim + 1) if dim != -1 else (
        s.build.op("Shape", s.value(x), start=-1)
    )  # fmt: skip
    return s.build.ops("TopK", [s.value(x), length], 2, axis=dim, largest=int(descending), sorted=1)

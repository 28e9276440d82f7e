"""ChunkedLoss: the head runs over a few rows at a time, so that no matrix of all rows and the vocabulary exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.errors import OptionError, TransformError
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker, copy_node, graphs_in, values_read
from QEfficient.transforms.onnx.head_waste import remove_head_waste
from QEfficient.transforms.onnx.sizes import Sizes

ROWS = "rows"
#: Sizes that tell the dimension of rows from all others: a prime no model has, and a size no multiple of it.
_PRIME, _OTHER = 999983, 64
_ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater",
    "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "Max", "Min", "Mul", "Neg", "Not",
    "Or", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sign", "Sin", "Sqrt", "Sub", "Tanh", "Where", "Xor",
})  # fmt: skip
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Expand", "Transpose", "Tile"})
_ALONG_AXIS = frozenset({
    "Concat", "Gather", "GatherElements", "LayerNormalization", "LogSoftmax", "ScatterElements", "Softmax", "Split",
    "TopK",
})  # fmt: skip
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})
_PRODUCTS = frozenset({"Gemm", "MatMul"})


@dataclass(frozen=True)
class ChunkedLoss(OnnxTransform):
    """Computes vocabulary projection, loss and their gradients for ``rows / chunks`` predictions at a time.

    Everything that depends on the inputs with the dimension ``rows`` up to where that dimension disappears is written
    ``chunks`` times over slices of these inputs; results with rows are joined, sums over rows (the loss, gradients of
    trained head weights) are added. Rows need not divide evenly. Work that the head does twice is removed first,
    also with one chunk: the gradient's softmax reuses the exponentials of the loss, and labels are subtracted in
    place. Up to the order of sums the function is the same.

    Parameters:
        chunks: how many parts, 1 to 64.
    """

    name: ClassVar[str] = "ChunkedLoss"
    chunks: int = 4

    def __post_init__(self) -> None:
        if not (isinstance(self.chunks, int | float) and 1 <= self.chunks <= 64 and self.chunks % 1 == 0):
            raise OptionError(f"ChunkedLoss takes a whole number of chunks from 1 to 64, got {self.chunks!r}.")
        object.__setattr__(self, "chunks", int(self.chunks))

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError when the graph has no rows, or its head mixes rows in a way that cannot be split."""
        graph = model.graph
        sources = [v for v in graph.inputs if v.shape is not None and len(v.shape) and str(v.shape[0]) == ROWS]
        if not sources:
            raise TransformError(f"ChunkedLoss splits the dimension {ROWS!r} of a token loss, and this graph has none.")
        removed = remove_head_waste(graph)
        passes.RemoveUnusedNodesPass()(model)
        facts = {"chunks": self.chunks, "removed_passes": removed, "copied_nodes": 0}
        if self.chunks > 1:
            region = _Region.find(graph, sources)
            _share_dequantized(graph, region)
            facts["copied_nodes"] = _unroll(graph, region, sources, self.chunks)
            passes.RemoveUnusedNodesPass()(model)
            graph.sort()
        return TransformResult(bool(removed) or self.chunks > 1, facts)


@dataclass
class _Region:
    """The part of the graph that works row by row, in graph order."""

    nodes: list[ir.Node] = field(default_factory=list)
    #: Value -> the axis of its rows.
    rows: dict[ir.Value | None, int] = field(default_factory=dict)
    #: Values that are sizes of the region's values.
    sizes: set[ir.Value | None] = field(default_factory=set)
    #: Values in which the rows were summed up.
    sums: set[ir.Value] = field(default_factory=set)
    #: The axes of reductions, counted from the front.
    axes: dict[ir.Node, list[int]] = field(default_factory=dict)
    #: Values that need the vocabulary.
    wide: set[ir.Value] = field(default_factory=set)

    @classmethod
    def find(cls, graph: ir.Graph, sources: list[ir.Value]) -> _Region:
        symbols = {
            d: _OTHER for v in _values(graph) if v.shape is not None for dim in v.shape.free_symbols() for d in [dim]
        }
        sizes = Sizes({**symbols, ROWS: _PRIME})
        region = cls(rows=dict.fromkeys(sources, 0))
        for node in graph:
            region._take(node, sizes)
        for node in region.nodes:
            if node.op_type in _REDUCTIONS and len(node.inputs) > 1:
                region.axes[node] = _axes(node, sizes) or []
        made = [v for v in region.rows if v is not None and v not in sources]
        widest = max((sizes.elements(v) for v in made), default=0)
        for node in region.nodes:
            for value in node.outputs:
                if (value in region.rows and sizes.elements(value) == widest) or any(
                    v in region.wide for v in values_read(node)
                ):
                    region.wide.add(value)
        return region

    def _take(self, node: ir.Node, sizes: Sizes) -> None:
        """Adds a node that works on rows; what comes after a sum over rows stays outside."""
        read = list(values_read(node))
        if not any(v in self.rows or v in self.sizes for v in read) or any(v in self.sums for v in read):
            return
        if node.op_type in ("Shape", "Size") or (
            not any(v in self.rows for v in read) and all(_is_size(v, sizes) for v in node.outputs)
        ):
            self.sizes |= set(node.outputs)
            self.nodes.append(node)
            return
        axes = [_row_axis(value, sizes) for value in node.outputs]
        if all(axis is not None for axis in axes):
            if not self._by_rows(node, axes[0] or 0, sizes):
                raise TransformError(
                    f"ChunkedLoss cannot split {node.op_type} (node {node.name}), which mixes rows of the head."
                )
            self.rows |= zip(node.outputs, (axis or 0 for axis in axes), strict=True)
            self.nodes.append(node)
        elif self._sums_rows(node, sizes):
            self.sums |= set(node.outputs)
            self.nodes.append(node)

    def _by_rows(self, node: ir.Node, axis: int, sizes: Sizes) -> bool:
        """Whether every row of the result needs the same row of the operands only."""
        if graphs_in(node) or node.domain:
            return False
        kind = node.op_type
        with_rows = [v for v in node.inputs if v in self.rows]
        rank = len(sizes.shape(node.outputs[0]))
        if kind in _ELEMENTWISE:
            return all(self.rows[v] - len(sizes.shape(v)) == axis - rank for v in with_rows if v is not None)
        if kind in _VIEWS:
            return True
        if kind in _PRODUCTS:
            return all(v in self.rows for v in node.inputs[:1]) and node.inputs[1] not in self.rows
        if kind in _REDUCTIONS:
            axes = _axes(node, sizes)
            return axes is not None and self.rows.get(node.inputs[0]) not in axes
        if kind == "Slice":
            sliced = node.inputs[3].const_value if len(node.inputs) > 3 and node.inputs[3] is not None else None
            return sliced is not None and all(int(a) % rank != axis for a in sliced.numpy())
        if kind == "Gather" and node.inputs[0] not in self.rows:
            return True
        if kind in _ALONG_AXIS:
            found = node.attributes.get("axis")
            along = (
                found.as_int() if found is not None else (0 if kind in ("Gather", "GatherElements", "Split") else -1)
            )
            source = node.inputs[0]
            depth = len(sizes.shape(source))  # type: ignore[arg-type]
            return along % depth != self.rows.get(source, axis) and (
                kind != "Gather" or node.inputs[1] not in self.rows
            )
        return False

    def _sums_rows(self, node: ir.Node, sizes: Sizes) -> bool:
        """Whether a node adds rows up, so that the results of the chunks add up, too."""
        if node.op_type == "ReduceSum":
            return len(node.inputs) == 1 or _axes(node, sizes) is not None
        if node.op_type not in _PRODUCTS or len([v for v in node.inputs if v is not None]) > 2:
            return False
        return all(v in self.rows for v in node.inputs[:2])


def _unroll(graph: ir.Graph, region: _Region, sources: list[ir.Value], chunks: int) -> int:
    """Replaces the region's results that need the vocabulary by those of its chunks; returns how many nodes it made."""
    inside = set(region.nodes)
    results = [
        v
        for node in region.nodes
        for v in node.outputs
        if v in region.wide and (v.is_graph_output() or any(user not in inside for user in v.consumers()))
    ]
    wanted = {node for v in results for node in _needed(v, inside)}
    order = [node for node in region.nodes if node in wanted]
    make = Maker(graph, "chunk")
    total = make.op("Shape", sources[0], start=0, end=1)
    bounds = [make.constant([0])]
    for number in range(1, chunks):
        part = make.op("Mul", total, make.constant([number]))
        bounds.append(make.op("Div", part, make.constant([chunks])))
    bounds.append(total)
    parts: dict[ir.Value, list[ir.Value]] = {v: [] for v in results}
    for number in range(chunks):
        made: dict[ir.Value | None, ir.Value] = {}
        size = f"({ROWS}*{number + 1}//{chunks} - {ROWS}*{number}//{chunks})"
        for source in sources:
            if any(source in node.inputs for node in order):
                piece = make.op("Slice", source, bounds[number], bounds[number + 1], make.constant([0]), like=source)
                piece.shape = _in_chunk(source.shape, size)
                made[source] = piece
        for node in order:
            inputs = [made.get(v, v) for v in node.inputs]
            if node.op_type in _REDUCTIONS and len(inputs) > 1:
                # ONNX Runtime ignores negative axes where there are no rows, and a chunk may be empty.
                inputs[1] = make.constant(region.axes[node])
            copy = make.add(copy_node(node, inputs, f"/chunk{number}"))
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.shape = _in_chunk(old.shape, size)
                made[old] = new
        for value in results:
            if value in region.sums and parts[value]:
                parts[value] = [make.op("Add", parts[value][0], made[value], like=value)]
            else:
                parts[value].append(made[value])
    for value in results:
        joined = parts[value][0]
        if value not in region.sums:
            joined = make.op("Concat", *parts[value], axis=region.rows[value], like=value)
        for user, place in list(value.uses()):
            if user not in inside:
                user.replace_input_with(place, joined)
        if value.is_graph_output():
            name, value.name = value.name, f"{value.name}/whole"
            joined.name = name
            graph.outputs[list(graph.outputs).index(value)] = joined
    nodes = make.take()
    graph.insert_before(order[0], nodes)
    return len(nodes)


def _needed(value: ir.Value, inside: set[ir.Node]) -> Iterator[ir.Node]:
    seen: set[ir.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop().producer()
        if node is not None and node in inside and node not in seen:
            seen.add(node)
            yield node
            todo += values_read(node)


def _share_dequantized(graph: ir.Graph, region: _Region) -> None:
    """All chunks read the head's weight: one float copy of it serves forward and backward.

    They read it through a view, because ONNX Runtime copies a DequantizeLinear for each of its readers.
    """
    make = Maker(graph, "head_weight")
    views: dict[tuple[int, ...], ir.Value] = {}
    for node in region.nodes:
        for place, value in enumerate(node.inputs):
            maker = value.producer() if value is not None else None
            if value is None or maker is None or maker.op_type != "DequantizeLinear" or value.shape is None:
                continue
            key = tuple(id(v) for v in maker.inputs)
            if key not in views:
                views[key] = make.op("Reshape", value, make.constant(list(value.shape.numpy())), like=value)
                graph.insert_after(maker, make.take())
            node.replace_input_with(place, views[key])


def _axes(node: ir.Node, sizes: Sizes) -> list[int] | None:
    """The constant axes of a reduction, counted from the front."""
    source, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if source is None or axes is None or axes.const_value is None:
        return None
    return [int(axis) % len(sizes.shape(source)) for axis in axes.const_value.numpy()]


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _row_axis(value: ir.Value, sizes: Sizes) -> int | None:
    """The axis whose length is the number of rows or a multiple of it."""
    axes = [axis for axis, size in enumerate(sizes.shape(value)) if size % _PRIME == 0 and size > 0]
    return axes[0] if axes else None


def _is_size(value: ir.Value, sizes: Sizes) -> bool:
    return sizes.dtype(value) == ir.DataType.INT64 and _row_axis(value, sizes) is None


def _in_chunk(shape: ir.Shape | None, size: str) -> ir.Shape | None:
    """A shape with the rows of one chunk; each chunk needs its own, or a runtime takes their sizes for equal."""
    if shape is None:
        return None
    return ir.Shape([d if isinstance(d, int) else re.sub(rf"\b{ROWS}\b", size, str(d.value)) for d in shape])

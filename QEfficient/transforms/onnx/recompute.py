"""Recompute: a layer's activations are computed again before its backward pass instead of being kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from QEfficient.errors import OptionError, TransformError
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import (
    Maker,
    ancestors,
    copy_node,
    forward_nodes,
    graphs_in,
    layer_of,
    values_read,
)
from QEfficient.transforms.onnx.sizes import Sizes

#: The size every symbol has while wide values are told from narrow ones.
_NOMINAL = 64
#: Operators whose results are worth keeping: computing them again costs more than a pass over memory.
_COSTLY = frozenset(
    ["MatMul", "Gemm", "Softmax", "TopK", "ScatterND", "ScatterElements", "CumSum", "Loop", "Scan", "If"]
)
_FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Recompute(OnnxTransform):
    """Keeps only what crosses from one layer to the next, and computes the rest of a layer twice.

    The forward nodes a layer's backward pass reads from are copied in front of it. The copies read the layer's inputs
    through ``Reshape(x, Shape(x) + zero)``: no data moves and no bit changes. ``zero`` is ``int(g < 0 and g > 0)`` of
    one element g of the incoming gradient: 0 for every number, infinity and NaN, but no compiler knows. It keeps the
    copies apart from the originals and behind the backward pass of the layer above. Layers are found by the first
    whole number in the names of weights. The price is at most one more forward pass; gradients stay the same.

    A host session gains from this only when nodes run in the graph's order and memory is not planned ahead
    (``Manifest.runtime``: ``order`` "priority", ``optimization`` "none", ``memory_pattern`` False).

    Parameters:
        keep: ``nothing`` of a layer but its input; or ``products``: results of matrix products and other costly
            operators stay in memory unless they grow with the square of a dimension, as attention scores do; those,
            and what follows from products by cheap operators, are computed again.
    """

    name: ClassVar[str] = "Recompute"
    keep: str = "nothing"

    def __post_init__(self) -> None:
        if self.keep not in ("nothing", "products"):
            raise OptionError(f"Recompute keeps 'nothing' or 'products', got {self.keep!r}.")

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError when the graph is no training step or has no numbered layers."""
        graph = model.graph
        forward = forward_nodes(graph, self.name)
        segments, layers = _segments(forward)
        before = len(graph)
        plan = _Plan(graph, segments, layers, _COSTLY if self.keep == "products" else frozenset())
        make = Maker(graph, "recompute")
        copied = [_recompute(graph, plan, number, make) for number in range(layers)]
        graph.sort()
        facts = {
            "layers": layers,
            "recomputed_layers": sum(count > 0 for count in copied),
            "forward_nodes": len(forward),
            "copied_nodes": sum(copied),
            "nodes": [before, len(graph)],
        }
        return TransformResult(any(copied), facts)


def _segments(forward: list[ir.Node]) -> tuple[dict[ir.Node, int], int]:
    """Which layer each forward node belongs to (-1: before the layers; their number: the head), and how many there are.

    A layer may begin anywhere between its predecessor's last weight and its own first one: the cut lies where the
    least crosses it, which is the residual stream between two blocks.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    outside: list[int] = []
    for place, node in enumerate(forward):
        for value in values_read(node):
            layer = layer_of(value.name) if value.producer() is None else None
            if layer is not None:
                first.setdefault(layer, place)
                last[layer] = place
            elif value.producer() is None and "." in str(value.name):
                outside.append(place)
    if not first:
        raise TransformError(
            "Recompute finds layers by the numbers in weight names (model.layers.0.…), and this graph has none."
        )
    starts = sorted(first.values())
    windows = [(max((p for p in outside if p < starts[0]), default=-1), starts[0])]
    windows += [(max(p for p in (*last.values(), *starts) if p < start), start) for start in starts[1:]]
    end = max(last.values())
    windows.append((end, next((p for p in outside if p > end), len(forward))))
    crossing = _crossing(forward)
    cuts = [min(range(low + 1, high + 1), key=crossing.__getitem__) for low, high in windows]
    return {node: sum(place >= cut for cut in cuts) - 1 for place, node in enumerate(forward)}, len(starts)


def _crossing(forward: list[ir.Node]) -> list[int]:
    """For every place in the forward pass: how many bytes are made before it and read there or later."""
    places = {node: place for place, node in enumerate(forward)}
    sizes = Sizes(_NOMINAL)
    change = [0] * (len(forward) + 2)
    for node, place in places.items():
        for value in node.outputs:
            readers = [places[user] for user in value.consumers() if user in places]
            if readers:
                change[place + 1] += sizes.nbytes(value)
                change[max(readers) + 1] -= sizes.nbytes(value)
    return list(np.cumsum(change))


class _Plan:
    """What every layer's recomputation needs to know about the whole graph, found before anything changes."""

    def __init__(
        self, graph: ir.Graph, segments: dict[ir.Node, int], layers: int, costly: frozenset[str] = frozenset()
    ) -> None:
        self.segments = segments
        #: Values made in a layer and read by no other part of the forward pass -> the layer.
        self.inner: dict[ir.Value | None, int] = {}
        #: Sizes, and what derives from weights: nothing that grows with the batch.
        self.plain: set[ir.Value] = set()
        for node, number in segments.items():
            sizes = node.op_type in ("Shape", "Size")
            derived = node.op_type != "DequantizeLinear" and all(
                v in self.plain or _fixed(v) for v in values_read(node)
            )
            if sizes or derived:
                self.plain |= set(node.outputs)
            if 0 <= number < layers and not graphs_in(node):
                for value in node.outputs:
                    if node.op_type in costly and not _quadratic(value):
                        continue
                    users = {segments.get(user, number) for user in value.consumers()}
                    if users <= {number} and value not in self.plain and not value.is_graph_output():
                        self.inner[value] = number
        #: Nodes of the backward pass that read a layer's inner values, in graph order.
        self.readers: dict[int, list[ir.Node]] = {number: [] for number in range(layers)}
        #: The last segment of the forward pass each node depends on.
        self.latest: dict[ir.Node, int] = {}
        for node in graph:
            makers = [p for p in (v.producer() for v in values_read(node)) if p is not None]
            self.latest[node] = segments.get(node, max((self.latest[p] for p in makers), default=-1))
            if node not in segments:
                for number in {self.inner[v] for v in node.inputs if v in self.inner}:
                    self.readers[number].append(node)


def _quadratic(value: ir.Value) -> bool:
    """Whether a value grows fourfold when one symbol doubles: queries times keys, and nothing else in a layer."""
    if value.shape is None:
        return False
    symbols = sorted(value.shape.free_symbols())
    sizes = dict.fromkeys(symbols, _NOMINAL)
    once = Sizes(sizes).elements(value)
    return any(Sizes({**sizes, name: 2 * _NOMINAL}).elements(value) > 3 * once for name in symbols)


def _fixed(value: ir.Value) -> bool:
    """Whether a value is a weight, a constant, or an input without symbolic dimensions, such as a trained tensor."""
    if value.is_initializer():
        return True
    return value.is_graph_input() and value.shape is not None and all(isinstance(d, int) for d in value.shape)


def _recompute(graph: ir.Graph, plan: _Plan, number: int, make: Maker) -> int:
    """Copies what the backward pass of layer ``number`` reads; returns how many nodes were copied."""
    readers = plan.readers[number]
    gradient = _gradient(graph, plan, number)
    if gradient is None:  # nothing in or below this layer is trained
        return 0

    def inner(value: ir.Value | None) -> bool:
        return plan.inner.get(value) == number

    zero = _zero(make, gradient)
    late: dict[ir.Value, ir.Value] = {}
    copies: dict[ir.Value | None, ir.Value] = {}

    def behind_gradient(value: ir.Value | None, node: ir.Node, place: int) -> ir.Value | None:
        """The same value, but not before the gradient is there."""
        # The scale holds back a dequantisation: dequantised weights must not wait for their turn in memory.
        scale = node.op_type == "DequantizeLinear" and place == 1
        if value is None or not (scale or (value.producer() is not None and value not in plan.plain)):
            return value
        if value not in late:
            shape = make.op("Add", make.op("Shape", value), zero)
            late[value] = make.op("Reshape", value, shape, like=value)
        return late[value]

    count = 0
    wanted = ancestors((v for n in readers for v in n.inputs if inner(v)), lambda v: not inner(v))  # type: ignore[misc]
    for node in [node for node in plan.segments if node in wanted]:
        inputs = [copies.get(v) or behind_gradient(v, node, place) for place, v in enumerate(node.inputs)]
        if all(new is old for new, old in zip(inputs, node.inputs, strict=True)):
            continue
        copy = make.add(copy_node(node, inputs, f"/again{number}"))
        copies |= {old: new for old, new in zip(node.outputs, copy.outputs, strict=True) if inner(old)}
        count += 1
    for node in readers:
        for place, value in enumerate(node.inputs):
            if value in copies:
                node.replace_input_with(place, copies[value])
    graph.insert_before(readers[0], make.take())
    return count


def _gradient(graph: ir.Graph, plan: _Plan, number: int) -> ir.Value | None:
    """The first value that meets this layer's activations and needs the layers above differentiated, but no copies."""
    if not plan.readers[number]:
        return None
    readers, dependent = set(plan.readers[number]), set[ir.Node]()
    for node in graph:
        if node in readers or any(v.producer() in dependent for v in values_read(node)):
            dependent.add(node)
            for value in node.inputs:
                maker = value.producer() if value is not None else None
                if value is None or maker is None or maker in plan.segments or maker in dependent:
                    continue
                if plan.latest.get(maker, -1) > number and value.dtype in _FLOATS:
                    return value
    return None


def _zero(make: Maker, gradient: ir.Value) -> ir.Value:
    """int64 [1], 0: whether an element of the gradient is below and above zero at once; none is, not even NaN."""
    assert gradient.dtype is not None
    nothing = make.constant([0], gradient.dtype)
    first = make.op("Slice", make.op("Reshape", gradient, make.constant([-1])), make.constant([0]), make.constant([1]))
    g = make.op("ReduceSum", first, make.constant([0]), keepdims=1)  # 0 where the gradient is empty
    both = make.op("And", make.op("Less", g, nothing), make.op("Greater", g, nothing))
    return make.op("Cast", both, to=ir.DataType.INT64.value)

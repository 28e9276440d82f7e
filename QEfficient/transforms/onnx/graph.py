"""What several transforms ask of a training graph: its forward part, its layers, new nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from QEfficient.errors import TransformError

#: Outputs of a training step with this prefix are gradients; all others belong to the forward pass.
GRADIENT = "grad/"
#: An output with this suffix is the next step's value of the input it is named after.
RETAINED = "_RetainedState"


def values_read(node: ir.Node) -> Iterator[ir.Value]:
    """The values a node needs: its inputs, and what the graphs inside it (``If``, ``Loop``, ``Scan``) capture."""
    yield from (value for value in node.inputs if value is not None)
    for graph in graphs_in(node):
        inside = {v for g in (graph, *graph.subgraphs()) for v in (*g.inputs, *g.initializers.values())}
        inner = list(graph.all_nodes())
        inside |= {v for n in inner for v in n.outputs}
        yield from (v for n in inner for v in n.inputs if v is not None and v not in inside)


def graphs_in(node: ir.Node) -> list[ir.Graph]:
    """The graphs a node runs (``If``, ``Loop``, ``Scan``)."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def ancestors(values: Iterable[ir.Value], stop: Callable[[ir.Value], bool] = lambda value: False) -> set[ir.Node]:
    """Every node that contributes to ``values``; the search goes no further than values for which ``stop`` holds."""
    found: set[ir.Node] = set()
    todo = [value for value in values if not stop(value)]
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            todo += [value for value in values_read(node) if not stop(value)]
    return found


def forward_nodes(graph: ir.Graph, label: str) -> list[ir.Node]:
    """The nodes of the forward pass in graph order: what the outputs that are no gradients need.

    Raises:
        TransformError: ``graph`` has no gradient outputs; ``label`` says who asks.
    """
    outputs = [value for value in graph.outputs if not str(value.name).startswith(GRADIENT)]
    if len(outputs) == len(graph.outputs):
        raise TransformError(f"{label} changes training steps, and this graph has no output named {GRADIENT}*.")
    wanted = ancestors(outputs)
    return [node for node in graph if node in wanted]


def layer_of(name: str | None) -> str | None:
    """The layer a weight belongs to: its name up to the first whole number (``model.layers.3``), or None.

    PEFT's prefix is left out, so that an adapter and the weight it adapts are in one layer.
    """
    parts = (name or "").removeprefix("base_model.model.").split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: place + 1]) if place else None


def copy_node(node: ir.Node, inputs: Iterable[ir.Value | None], suffix: str) -> ir.Node:
    """The same operation on other inputs; the outputs' names end in ``suffix``."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        list(inputs),
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=f"{node.name}{suffix}",
        overload=node.overload,
        version=node.version,
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name, new.type, new.shape = f"{old.name}{suffix}", old.type, old.shape
    return copy


class Maker:
    """Makes the nodes and constants a transform adds; equal constants are made once, names are new to the graph."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        names = {str(v.name) for v in (*graph.inputs, *graph.initializers.values())}
        names |= {str(v.name) for node in graph for v in node.outputs}
        number = 1
        while any(name.startswith(f"{prefix}{number}/") for name in names):
            number += 1
        self.prefix = f"{prefix}{number}"
        self._count = 0
        self._constants: dict[Any, ir.Value] = {}
        self._nodes: list[ir.Node] = []

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        like: ir.Value | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node; ``like`` is a value whose type and shape it has."""
        value = self.ops(op_type, inputs, 1, domain, **attributes)[0]
        if like is not None:
            value.type, value.shape = like.type, like.shape
        return value

    def ops(
        self, op_type: str, inputs: Iterable[ir.Value | None], outputs: int, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """The outputs of a new node; no domain is the standard one."""
        name = self._name()
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs, name=name)
        for place, value in enumerate(node.outputs):
            value.name = name if outputs == 1 else f"{name}.{place}"
        self._nodes.append(node)
        return list(node.outputs)

    def constant(self, value: Any, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A small constant, shared by content."""
        array = np.asarray(value, dtype.numpy())
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._name()
            made = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(dtype),
                const_value=ir.Tensor(array, dtype=dtype, name=name),
            )
            self.graph.register_initializer(made)
            self._constants[key] = made
        return self._constants[key]

    def add(self, node: ir.Node) -> ir.Node:
        """Puts a node made elsewhere in line."""
        self._nodes.append(node)
        return node

    def take(self) -> list[ir.Node]:
        """The nodes made since the last call, in order."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def _name(self) -> str:
        self._count += 1
        return f"{self.prefix}/{self._count}"


def swap(graph: ir.Graph, node: ir.Node, values: Sequence[ir.Value | None], make: Maker) -> None:
    """Puts what ``make`` made before ``node``, its outputs' replacements, in the node's place.

    Args:
        values: one per output of the node; None for an output nobody uses.
    """
    graph.insert_before(node, make.take())
    for old, new in zip(node.outputs, values, strict=True):
        if new is None:
            continue
        new.type, new.shape = old.type or new.type, old.shape or new.shape
        if old.is_graph_output():
            # The output's name is part of the interface: the value that replaces it takes it over.
            place = list(graph.outputs).index(old)
            name, old.name = old.name, f"{old.name}/replaced"
            if new.is_graph_output() or new.producer() is None:
                new = make.op("Identity", new, like=new)
                graph.insert_before(node, make.take())
            new.name = name
            graph.outputs[place] = new
        old.replace_all_uses_with(new)
    graph.remove(node, safe=True)

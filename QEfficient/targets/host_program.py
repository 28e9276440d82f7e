"""Which retained states an ONNX Runtime program can update inside their own buffer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from QEfficient.targets.manifest import StateSpec


def in_place_states(models: Sequence[ir.Model], states: Sequence[StateSpec]) -> tuple[StateSpec, ...]:
    """Returns the states with ``in_place`` set where input and output may share memory in every program.

    True when the output is ``ScatterND`` of the input, or the state of a ``GroupQueryAttention`` that reads the input
    (whose CPU kernels copy nothing when both are one buffer), and every other reader of the input runs before that
    node: readers of its shape, and nodes its other inputs depend on.
    """
    return tuple(
        dataclasses.replace(state, in_place=all(_updates_in_place(model, state) for model in models))
        for state in states
    )


def _updates_in_place(model: ir.Model, state: StateSpec) -> bool:
    source = next(value for value in model.graph.inputs if value.name == state.input)
    result = next(value for value in model.graph.outputs if value.name == state.output)
    return _shares_buffer(source, result)


def _shares_buffer(source: ir.Value, result: ir.Value) -> bool:
    writer = result.producer()
    if writer is None or not _writes(writer, source, result):
        return False
    before = _ancestors(writer)
    return all(node is writer or node.op_type in ("Shape", "Size") or node in before for node in source.consumers())


def _writes(node: ir.Node, source: ir.Value, result: ir.Value) -> bool:
    """Whether a node's kernel updates ``source`` to ``result`` without a copy when both are one buffer."""
    if node.op_type == "ScatterND":
        return node.inputs[0] is source
    if node.op_type == "GroupQueryAttention":
        return any(node.inputs[i + 3] is source and node.outputs[i + 1] is result for i in (0, 1))
    return False


def _ancestors(node: ir.Node) -> set[ir.Node]:
    """Nodes that must have run before ``node``, other than those that only feed its first input.

    The states a GroupQueryAttention reads are inputs of the graph and have no such nodes.
    """
    found: set[ir.Node] = set()
    stack = [value.producer() for value in node.inputs[1:] if value is not None]
    while stack:
        current = stack.pop()
        if current is None or current in found:
            continue
        found.add(current)
        stack.extend(value.producer() for value in current.inputs if value is not None)
    return found

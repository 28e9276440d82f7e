"""Which retained states an ONNX Runtime program can update inside their own buffer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from QEfficient.targets.manifest import StateSpec


def in_place_states(model: ir.Model, states: Sequence[StateSpec]) -> tuple[StateSpec, ...]:
    """Returns the states with ``in_place`` set where input and output may share memory.

    True when the output is ``ScatterND`` of the input (whose CPU kernel copies nothing when both are one buffer) and
    every other reader of the input runs before that node: readers of its shape, and nodes its indices or updates
    depend on.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = {value.name: value for value in model.graph.outputs}
    return tuple(
        dataclasses.replace(state, in_place=_shares_buffer(inputs[state.input], outputs[state.output]))
        for state in states
    )


def _shares_buffer(source: ir.Value, result: ir.Value) -> bool:
    scatter = result.producer()
    if scatter is None or scatter.op_type != "ScatterND" or scatter.inputs[0] is not source:
        return False
    before = _ancestors(scatter)
    return all(node is scatter or node.op_type in ("Shape", "Size") or node in before for node in source.consumers())


def _ancestors(node: ir.Node) -> set[ir.Node]:
    """Nodes that must have run before ``node``, other than those that only feed its first input."""
    found: set[ir.Node] = set()
    stack = [value.producer() for value in node.inputs[1:] if value is not None]
    while stack:
        current = stack.pop()
        if current is None or current in found:
            continue
        found.add(current)
        stack.extend(value.producer() for value in current.inputs if value is not None)
    return found

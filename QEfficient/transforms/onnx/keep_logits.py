"""KeepLogits: a causal step returns the logits of the last few tokens of a row instead of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from QEfficient.errors import TransformError
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker, ancestors

INPUT = "num_logits_to_keep"


@dataclass(frozen=True)
class KeepLogits(OnnxTransform):
    """Adds the input ``num_logits_to_keep`` int64 [k, 1], of which only the length counts.

    ``logits`` becomes [batch, k, vocab]: the k columns that end at a row's last real token, from column
    ``max(0, last + 1 - k)`` on. Speculative decoding checks the tokens of a draft with them in one step.
    """

    name: ClassVar[str] = "KeepLogits"
    changes_interface: ClassVar[bool] = True

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        graph = model.graph
        logits = next((v for v in graph.outputs if v.name == "logits"), None)
        if logits is None or logits.shape is None or len(logits.shape) != 3:
            raise TransformError("KeepLogits is for causal models: this graph has no logits [batch, 1, vocab].")
        head, last = _head_input(graph, logits)
        data, hidden = head.inputs[0], head.outputs[0]
        assert data is not None
        width = hidden.shape[-1] if hidden.shape is not None else None
        if not isinstance(width, int):
            raise TransformError("KeepLogits: the width of the head's input is not known.")
        asked = ir.Value(name=INPUT, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([ir.SymbolicDim(INPUT), 1]))
        graph.inputs.append(asked)
        make = Maker(graph, "kept")
        count = make.op("Shape", asked, start=0, end=1)
        scalar = make.op("Squeeze", count, make.constant([0]))
        start = make.op("Sub", make.op("Add", last, make.constant(1)), scalar)
        start = make.op("Where", make.op("Less", start, make.constant(0)), make.constant(0), start)
        steps = make.op("Unsqueeze", make.op("Range", make.constant(0), scalar, make.constant(1)), make.constant([0]))
        columns = make.op("Unsqueeze", make.op("Add", start, steps), make.constant([2]))
        index = make.op("Expand", columns, make.constant([1, 1, width]))
        graph.insert_before(head, make.take())
        head.replace_input_with(1, index)
        shape = [hidden.shape[0] if hidden.shape is not None else None, ir.SymbolicDim(INPUT), width]
        hidden.shape = ir.Shape(shape)
        for value in _after(hidden):  # up to the logits, one column became as many as are asked for
            if value.shape is not None and len(value.shape) == 3 and value.shape[1] == 1:
                value.shape = ir.Shape([value.shape[0], ir.SymbolicDim(INPUT), value.shape[2]])
        return TransformResult(True, {"width": width})


def _head_input(graph: ir.Graph, logits: ir.Value) -> tuple[ir.Node, ir.Value]:
    """The node that picks each row's last token before the head, and the columns it picks, int64 [batch, 1]."""
    state = [v for v in graph.outputs if v is not logits]
    found = []
    for node in ancestors([logits]) - ancestors(state):
        if node.op_type != "GatherElements" or node.attributes["axis"].as_int() != 1:
            continue
        value = node.inputs[1]
        while (
            value is not None and (maker := value.producer()) is not None and maker.op_type in ("Expand", "Unsqueeze")
        ):
            value = maker.inputs[0]
        maker = value.producer() if value is not None else None
        if maker is not None and maker.op_type == "ArgMax" and value is not None:
            found.append((node, value))
    if len(found) != 1:
        raise TransformError("KeepLogits: the place where a row's last token is picked was not found in this graph.")
    return found[0]


def _after(value: ir.Value) -> set[ir.Value]:
    """Every value computed from ``value``."""
    out: set[ir.Value] = set()
    todo = [value]
    while todo:
        for node in (use.node for use in todo.pop().uses()):
            fresh = [v for v in node.outputs if v not in out]
            out.update(fresh)
            todo += fresh
    return out

"""RotaryTables: sine and cosine of positions are read from a table instead of being computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.errors import OptionError
from QEfficient.onnx_io import store_tensors
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker, ancestors
from QEfficient.transforms.onnx.probe import Part, positional_values
from QEfficient.transforms.onnx.quantizing import register


@dataclass(frozen=True)
class RotaryTables(OnnxTransform):
    """Replaces ``Cos`` and ``Sin`` of positions by a row of a table with one row per position.

    A target that computes in float16 cannot hold positions above 2048 exactly, let alone their products with
    frequencies; the table's entries lie in [-1, 1]. A value is left as it is when it depends on more than each token's
    own position (scaling that changes with the length), which is found out by running it.

    Parameters:
        ctx_len: positions the table has.
    """

    name: ClassVar[str] = "RotaryTables"
    ctx_len: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.ctx_len, bool) or not isinstance(self.ctx_len, int) or self.ctx_len < 1:
            raise OptionError(f"RotaryTables needs ctx_len, a whole number of at least 1, got {self.ctx_len!r}.")

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        graph = model.graph
        positional = positional_values(graph)
        tables: dict[str, np.ndarray] = {}
        places: dict[str, tuple[ir.Node, ir.Value]] = {}
        left: dict[str, str] = {}
        for node in list(graph):
            if node.domain != "" or node.op_type not in ("Cos", "Sin") or node.outputs[0] not in positional:
                continue
            found = self._table(model, node.outputs[0])
            if isinstance(found, str):
                left[str(node.name)] = found
            else:
                name = f"rotary.{node.op_type.lower()}.{len(tables)}"
                positions, tables[name] = found
                places[name] = (node, positions)
        stored = store_tensors(tables, workspace / "rotary.safetensors")
        make = Maker(graph, "rotary")
        for name, (node, positions) in places.items():
            (table,) = register(graph, stored, [name])
            row = make.op("Gather", table, positions, like=node.outputs[0], axis=0)
            graph.insert_before(node, make.take())
            node.outputs[0].replace_all_uses_with(row)
        if places:
            passes.RemoveUnusedNodesPass()(model)
        return TransformResult(bool(places), {"tables": len(tables), "left": left})

    def _table(self, model: ir.Model, value: ir.Value) -> tuple[ir.Value, np.ndarray] | str:
        """The positions int64 [batch, seq] that ``value`` [batch, seq, dim] is computed from, and its rows."""
        casts = [n for n in ancestors([value]) if n.op_type == "Cast" and _whole(n.inputs[0])]
        sources = {_unshaped(node.inputs[0]) for node in casts if node.inputs[0] is not None}
        if len(sources) != 1:
            return "it is not computed from one kind of positions"
        (positions,) = sources
        if positions.shape is not None and len(positions.shape) != 2:
            return "its positions are not [batch, seq]"
        try:
            part = Part(model, [value], [positions])
        except ValueError as error:
            return str(error)
        if set(part.inputs) != {str(positions.name)}:
            return "it depends on more than positions"

        def run(steps: np.ndarray) -> np.ndarray:
            (out,) = part.run({str(positions.name): np.ascontiguousarray(steps, np.int64)})
            return out

        table = run(np.arange(self.ctx_len)[:, None])
        if table.ndim != 3 or table.shape[:2] != (self.ctx_len, 1):
            return "it is not [batch, seq, dim]"
        table = np.ascontiguousarray(table[:, 0])
        last = self.ctx_len - 1
        mixed = np.random.default_rng(0).integers(0, self.ctx_len, (2, min(64, self.ctx_len)))
        for steps in (mixed, np.array([[0, last], [last, 0]]), np.zeros((1, 1), np.int64)):
            if not np.array_equal(run(steps), table[steps]):
                return "a token's values change with the tokens beside it"
        return positions, table


def _whole(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in (None, ir.DataType.INT64, ir.DataType.INT32)


def _unshaped(value: ir.Value) -> ir.Value:
    """The value before dimensions of size 1 were added or it was repeated."""
    while (node := value.producer()) is not None and node.op_type in ("Unsqueeze", "Expand", "Reshape", "Transpose"):
        source = node.inputs[0]
        if source is None:
            break
        value = source
        if value.shape is not None and len(value.shape) == 2:
            break
    return value

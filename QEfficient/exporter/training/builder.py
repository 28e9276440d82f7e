"""Builds ONNX nodes: shared constants, shared equal nodes, sizes as 1-D int64 tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

#: torch dtype -> ONNX dtype of everything a training step computes in.
DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.bool: ir.DataType.BOOL,
}


class Builder:
    """A graph under construction. Nodes that compute the same thing from the same values are made once."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._made: dict[Any, tuple[ir.Value, ...]] = {}

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The single output of a node of the standard domain."""
        return self.ops(op_type, inputs, 1, **attributes)[0]

    def ops(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int, **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """All outputs of a node; an equal node made before is returned instead."""
        key = (op_type, tuple(id(x) for x in inputs), outputs, _hashable(attributes))
        if key not in self._made:
            number = len(self.nodes)
            node = ir.node(op_type, list(inputs), attributes, num_outputs=outputs, name=f"{op_type}_{number}")
            for place, value in enumerate(node.outputs):
                value.name = f"t{number}" if outputs == 1 else f"t{number}_{place}"
            self.nodes.append(node)
            self._made[key] = tuple(node.outputs)
        return self._made[key]

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant as an initializer, shared by content."""
        array = np.asarray(value, dtype)
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            name = f"c{sum(k[0] == 'constant' for k in self._made)}"
            self._made[key] = (self.initializer(name, ir.tensor(array, name=name)),)
        return self._made[key][0]

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers[name] = value
        return value

    def scalar(self, value: float, dtype: torch.dtype) -> ir.Value:
        """A 0-d constant of a torch dtype."""
        if dtype in (torch.float16, torch.bfloat16):
            return self.op("Cast", self.constant(float(value), np.float32), to=DTYPES[dtype].value)
        return self.constant(value, DTYPES[dtype].numpy())

    def cast(self, value: ir.Value, source: torch.dtype, wanted: torch.dtype) -> ir.Value:
        return value if source == wanted else self.op("Cast", value, to=DTYPES[wanted].value)

    def concat_sizes(self, parts: Sequence[int | ir.Value]) -> ir.Value:
        """1-D int64 of the parts in order; runs of known sizes become one constant."""
        pieces: list[ir.Value] = []
        run: list[int] = []
        for part in parts:
            if isinstance(part, int):
                run.append(part)
                continue
            if run:
                pieces.append(self.constant(run))
                run = []
            pieces.append(part)
        if run or not pieces:
            pieces.append(self.constant(np.asarray(run, np.int64)))
        return pieces[0] if len(pieces) == 1 else self.op("Concat", *pieces, axis=0)


def _hashable(attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(attributes.items()))

"""RowScaledProducts: products of many rows in int8, with a scale for each row of activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.onnx_io import FileTensor, stream_tensors
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker
from QEfficient.transforms.onnx.quantizing import quantize_rows, register, unpack

DOMAIN = "com.microsoft"
#: Output channels converted at a time.
_ROWS = 512
#: Keeps a row of zeros from a division by zero; far below any activation that matters.
_TINY = 1e-30


@dataclass(frozen=True)
class RowScaledProducts(OnnxTransform):
    """``MatMulNBits`` becomes ``DynamicQuantizeMatMul`` over the same weights in int8, one scale per output channel.

    The operator gives a whole matrix of activations one scale. Dividing each row by its largest magnitude before, and
    multiplying the row of the result by it after, makes that a scale per row: x_i W = s_i ((x_i / s_i) W).
    int8 weights with a scale per channel keep their integers exactly. int4 weights are rounded to 1/127 of their
    channel's largest, a tenth of what rounding them to 4 bits already changed.

    Contract:
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.DynamicQuantizeMatMul
    """

    name: ClassVar[str] = "RowScaledProducts"

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        graph = model.graph
        products = [_Product(node) for node in graph if node.op_type == "MatMulNBits" and _stored(node)]
        described = {name: kind for product in products for name, kind in product.described().items()}
        contents = (part for product in products for part in product.contents())
        stored = stream_tensors(described, contents, workspace / "int8.safetensors")
        make = Maker(graph, "rows")
        scaled: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for product in products:
            source = product.node.inputs[0]
            assert source is not None
            if source not in scaled:
                scaled[source] = _scaled_rows(make, source)
            rows, peak = scaled[source]
            weight, scale = register(graph, stored, list(product.described()))
            old = product.node.outputs[0]
            raw = make.op("DynamicQuantizeMatMul", rows, weight, scale, domain=DOMAIN, like=old)
            new = make.op("Mul", raw, peak, like=old)
            graph.insert_before(product.node, make.take())
            if old.is_graph_output():
                new.name, old.name = old.name, f"{old.name}/replaced"
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        if products:
            passes.RemoveUnusedNodesPass()(model)
        return TransformResult(bool(products), {"products": len(products)})


def _scaled_rows(make: Maker, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Rows divided by their largest magnitude, and these magnitudes [..., 1]."""
    last = make.constant([-1])
    high = make.op("ReduceMax", x, last, keepdims=1)
    low = make.op("Neg", make.op("ReduceMin", x, last, keepdims=1))
    peak = make.op("Max", high, low, make.constant(_TINY, ir.DataType.FLOAT))
    return make.op("Div", x, peak, like=x), peak


def _stored(node: ir.Node) -> bool:
    weights = [value for value in node.inputs[1:4] if value is not None]
    return len(node.inputs) <= 4 and all(isinstance(value.const_value, FileTensor) for value in weights)


@dataclass
class _Product:
    """One ``MatMulNBits`` node and its weights."""

    node: ir.Node

    @property
    def size(self) -> tuple[int, int]:
        """(inputs K, outputs N)."""
        return self.node.attributes.get_int("K", 0), self.node.attributes.get_int("N", 0)

    @property
    def _name(self) -> str:
        return str(self.node.inputs[1].name).removesuffix(".quantized")  # type: ignore[union-attr]

    def described(self) -> dict[str, tuple[ir.DataType, tuple[int, ...]]]:
        inputs, outputs = self.size
        return {
            f"{self._name}.int8": (ir.DataType.INT8, (inputs, outputs)),
            f"{self._name}.int8_scale": (ir.DataType.FLOAT, (outputs,)),
        }

    def contents(self) -> Iterator[bytes]:
        """The bytes of `described`; holds one weight in int8 and some rows in float32."""
        inputs, outputs = self.size
        weight, scales = np.empty((inputs, outputs), np.int8), np.empty(outputs, np.float32)
        for start in range(0, outputs, _ROWS):
            rows = slice(start, min(start + _ROWS, outputs))
            weight[:, rows], scales[rows] = self._int8(rows)
        yield weight.tobytes()
        yield scales.tobytes()

    def _int8(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """int8 [K, n] and scales [n] of some output channels."""
        inputs, outputs = self.size
        bits = self.node.attributes.get_int("bits", 4)
        parts = [v.const_value.numpy() for v in self.node.inputs[1:] if v is not None and v.const_value is not None]
        values = unpack(parts[0].reshape(outputs, parts[0].size // outputs)[rows], bits)
        scale = parts[1].reshape(outputs, -1)[rows]
        groups = scale.shape[1]
        values = values.reshape(len(values), groups, -1)
        if len(parts) > 2:
            zero = unpack(parts[2].reshape(outputs, -1)[rows], bits)[:, :groups, None].astype(np.int16)
        else:
            zero = np.full((1, 1, 1), 2 ** (bits - 1), np.int16)
        centred = values.astype(np.int16) - zero
        if len(parts) == 2 and bits == 8 and (scale == scale[:, :1]).all():
            whole = centred.reshape(len(values), -1)[:, :inputs]
            return whole.astype(np.int8).T, scale[:, 0]
        floats = (centred * scale[..., None]).astype(np.float32).reshape(len(values), -1)[:, :inputs]
        quantized, channel = quantize_rows(floats)
        return quantized.T, channel

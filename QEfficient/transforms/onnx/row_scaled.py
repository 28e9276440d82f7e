"""RowScaledProducts: products of many rows in int8, with a scale for each row of activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.onnx_io import FileTensor, stream_tensors
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker
from QEfficient.transforms.onnx.quantizing import as_bytes, map_rows, register, unpack

DOMAIN = "com.microsoft"
#: Keeps a row of zeros from a division by zero; far below any activation that matters.
_TINY = 1e-30
#: Functions whose results reach much further above 0 than below.
_ONE_SIDED = ("Gelu", "FastGelu", "QuickGelu", "Relu", "Sigmoid", "Softmax", "Softplus", "Swish")


@dataclass(frozen=True)
class RowScaledProducts(OnnxTransform):
    """``MatMulNBits`` becomes a product of 8-bit integers over the same weights, one scale per output channel.

    The operators give a whole matrix of activations one scale. Dividing each row by its largest magnitude before, and
    multiplying the row of the result by it after, makes that a scale per row: x_i W = s_i ((x_i / s_i) W). The rows
    then end at 1, so they are quantized with a constant scale, once for all products that read them
    (``MatMulIntegerToFloat``). After an activation function that hardly goes below 0 half of that range would be empty:
    there the operator looks for the range itself (``DynamicQuantizeMatMul``).
    int8 weights with a scale per channel keep their integers exactly. int4 weights are rounded to 1/127 of their
    channel's largest, a tenth of what rounding them to 4 bits already changed.

    Contract: the two operators in
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft
    """

    name: ClassVar[str] = "RowScaledProducts"
    version: ClassVar[int] = 2

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        graph = model.graph
        products = [_Product(node) for node in graph if node.op_type == "MatMulNBits" and _stored(node)]
        described = {name: kind for product in products for name, kind in product.described().items()}
        contents = (part for product in products for part in product.contents())
        stored = stream_tensors(described, contents, workspace / "int8.safetensors")
        make = Maker(graph, "rows")
        scaled: dict[ir.Value, _Rows] = {}
        for product in products:
            source = product.node.inputs[0]
            assert source is not None
            if source not in scaled:
                scaled[source] = _Rows.of(make, source)
            weight, scale = register(graph, stored, list(product.described()))
            old = product.node.outputs[0]
            new = scaled[source].times(make, weight, scale, like=old)
            graph.insert_before(product.node, make.take())
            if old.is_graph_output():
                new.name, old.name = old.name, f"{old.name}/replaced"
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        if products:
            passes.RemoveUnusedNodesPass()(model)
        return TransformResult(bool(products), {"products": len(products)})


@dataclass
class _Rows:
    """Activations divided by each row's largest magnitude: float32 in -1 to 1, or uint8 in 1 to 255 around 128."""

    values: ir.Value
    peak: ir.Value
    quantized: bool

    @classmethod
    def of(cls, make: Maker, x: ir.Value) -> _Rows:
        last = make.constant([-1])
        high = make.op("ReduceMax", x, last, keepdims=1)
        low = make.op("Neg", make.op("ReduceMin", x, last, keepdims=1))
        peak = make.op("Max", high, low, make.constant(_TINY, ir.DataType.FLOAT))
        rows = make.op("Div", x, peak, like=x)
        if _one_sided(x):
            return cls(rows, peak, quantized=False)
        quantized = make.op("QuantizeLinear", rows, *_grid(make))
        quantized.type, quantized.shape = ir.TensorType(ir.DataType.UINT8), x.shape
        return cls(quantized, peak, quantized=True)

    def times(self, make: Maker, weight: ir.Value, scale: ir.Value, like: ir.Value) -> ir.Value:
        """The rows as they were times an int8 weight [K, N] with scales [N]."""
        if self.quantized:
            step, zero = _grid(make)
            raw = make.op("MatMulIntegerToFloat", self.values, weight, step, scale, zero, domain=DOMAIN, like=like)
        else:
            raw = make.op("DynamicQuantizeMatMul", self.values, weight, scale, domain=DOMAIN, like=like)
        return make.op("Mul", raw, self.peak, like=like)


def _grid(make: Maker) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point of rows whose largest magnitude is 1."""
    return make.constant(1 / 127, ir.DataType.FLOAT), make.constant(128, ir.DataType.UINT8)


def _one_sided(x: ir.Value) -> bool:
    producer = x.producer()
    return producer is not None and producer.op_type in _ONE_SIDED


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

    def contents(self) -> Iterator[memoryview]:
        """The bytes of `described`; holds one weight in int8 and some rows in float32."""
        inputs, outputs = self.size
        weight, scales = np.empty((inputs, outputs), np.int8), np.empty(outputs, np.float32)

        def convert(rows: slice) -> None:
            weight[:, rows], scales[rows] = self._int8(rows)

        map_rows(convert, outputs, inputs)
        yield as_bytes(weight)
        yield as_bytes(scales)

    def _int8(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """int8 [K, n] and scales [n] of some output channels."""
        inputs, outputs = self.size
        bits = self.node.attributes.get_int("bits", 4)
        parts = [v.const_value.numpy() for v in self.node.inputs[1:] if v is not None and v.const_value is not None]
        values = unpack(parts[0].reshape(outputs, parts[0].size // outputs)[rows], bits)
        scale = parts[1].reshape(outputs, -1)[rows]
        groups = scale.shape[1]
        values = values.reshape(len(values), groups, -1)
        kind: np.dtype[Any] = np.dtype(np.int8 if bits == 4 else np.int16)
        if len(parts) > 2:
            zero = unpack(parts[2].reshape(outputs, -1)[rows], bits)[:, :groups, None].astype(kind)
        else:
            zero = np.full((1, 1, 1), 2 ** (bits - 1), kind)
        centred = values.astype(kind) - zero
        if len(parts) == 2 and bits == 8 and (scale == scale[:, :1]).all():
            whole = centred.reshape(len(values), -1)[:, :inputs]
            return whole.astype(np.int8).T, scale[:, 0]
        # What fills up the last group is cut off below and must not count for the peak.
        centred.reshape(len(values), -1)[:, inputs:] = 0
        peak = (np.abs(centred).max(axis=2) * np.abs(scale)).max(axis=1)
        channel = np.where(peak > 0, peak / 127, 1).astype(np.float32)
        quantized = np.rint(centred * (scale / channel[:, None])[..., None]).astype(np.int8)
        return quantized.reshape(len(values), -1)[:, :inputs].T, channel

"""QuantizeBase: frozen weights are kept in 8 or 4 bits and dequantised where they are used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.errors import OptionError
from QEfficient.onnx_io import FileTensor, stream_tensors
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import GRADIENT, Maker, forward_nodes, layer_of
from QEfficient.transforms.onnx.quantizing import as_bytes, map_floats, pack, quantize_blocks, quantize_rows, register

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
#: Smaller weights are not worth their loss.
_MIN_ELEMENTS = 1024


@dataclass(frozen=True)
class QuantizeBase(OnnxTransform):
    """Weight-only quantisation of what is not trained (the base of QLoRA, arXiv:2305.14314).

    Matrices of the layers that ``Gemm`` and ``MatMul`` read become int8 with one scale per output channel, or uint4
    with a scale and a zero point per ``block_size`` inputs. Tables that are gathered from, and weights outside the
    layers such as the head, become int8 with one scale per row in both cases; weights with fewer than 1024 elements
    and those used in any other way stay. Each use has a ``DequantizeLinear`` of its own, so the float copy lives only
    while one product is computed, and forward and backward pass see the same matrix: gradients are those of the
    dequantised model. Stacked experts become one weight per expert. Weights stored in bfloat16 or float16 are
    quantised from the stored values.

    Run it after `LoraAdapters`; tensors the graph has a gradient of are left alone.

    Parameters:
        bits: 8 or 4.
        block_size: inputs that share a scale with 4 bits.
    """

    name: ClassVar[str] = "QuantizeBase"
    bits: int = 8
    block_size: int = 32

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise OptionError(f"QuantizeBase stores weights in 4 or 8 bits, got {self.bits!r}.")
        if not (isinstance(self.block_size, int | float) and self.block_size >= 2 and self.block_size % 1 == 0):
            raise OptionError(
                f"QuantizeBase's block_size must be a whole number of at least 2, got {self.block_size!r}."
            )
        object.__setattr__(self, "bits", int(self.bits))
        object.__setattr__(self, "block_size", int(self.block_size))

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError for a weight that holds infinities or NaN."""
        graph = model.graph
        outputs = {str(value.name) for value in graph.outputs}
        has_gradients = any(name.startswith(GRADIENT) for name in outputs)
        forward = set(forward_nodes(graph, self.name)) if has_gradients else set(graph)
        matrices: list[_Matrix] = []
        left: dict[str, str] = {}
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.dtype not in _FLOATS or tensor.size < _MIN_ELEMENTS or len(tensor.shape) < 2:
                continue
            found = "it is trained" if GRADIENT + name in outputs else self._matrices(value, graph, forward)
            if isinstance(found, str):
                left[name] = found
            else:
                matrices += found
        described = {n: kind for matrix in matrices for n, kind in matrix.described().items()}
        contents = (part for matrix in matrices for part in matrix.contents())
        stored = stream_tensors(described, contents, workspace / "quantized.safetensors")
        before = sum(value.const_value.nbytes for value in {m.value for m in matrices} if value.const_value is not None)
        make = Maker(graph, "quantize")
        for matrix in matrices:
            matrix.install(graph, make, stored)
        passes.RemoveUnusedNodesPass()(model)
        facts = {
            "weights": sum(not m.gathers and m.expert is None for m in matrices),
            "tables": sum(bool(m.gathers) for m in matrices),
            "experts": sum(m.expert is not None for m in matrices),
            "bytes_before": before,
            "bytes_after": sum(tensor.nbytes for tensor in stored.values()),
            "left": left,
        }
        return TransformResult(bool(matrices), facts)

    def _matrices(self, value: ir.Value, graph: ir.Graph, forward: set[ir.Node]) -> list[_Matrix] | str:
        """A weight as the matrices it is made of, or why it stays as it is."""
        experts: dict[int | None, _Matrix] = {}
        todo: list[tuple[ir.Value, int | None]] = [(value, None)]
        while todo:
            current, expert = todo.pop()
            rank = len(value.const_value.shape) - (expert is not None)  # type: ignore[union-attr]
            matrix = experts.setdefault(expert, _Matrix(value, expert, self.bits, self.block_size))
            for use in current.uses():
                node, place = use.node, use.idx
                if node.graph is not graph or current.is_graph_output():
                    return "it is used inside a subgraph"
                if node.op_type == "Cast" and node.outputs[0].dtype in _FLOATS:
                    todo.append((node.outputs[0], expert))
                elif (
                    node.op_type == "Gather"
                    and place == 0
                    and node.attributes.get_int("axis", 0) == 0
                    and expert is None
                ):
                    index = node.inputs[1].const_value if node.inputs[1] is not None else None
                    if rank == 3 and index is not None and index.size == 1 and len(index.shape) == 0:
                        todo.append((node.outputs[0], int(index.numpy()) % value.const_value.shape[0]))  # type: ignore
                    elif rank == 2:
                        matrix.gathers.append(node)
                    else:
                        return f"it has rank {rank} and is gathered by the batch"
                elif node.op_type in ("Gemm", "MatMul") and place < 2 and rank == 2:
                    matrix.products.append((node, place))
                else:
                    return f"{node.op_type} reads it"
        found = [m for m in experts.values() if m.products or m.gathers]
        for matrix in found:
            matrix.settle(forward)
        return found or "nothing reads it"


@dataclass
class _Matrix:
    """One matrix to quantise: a weight, or one expert of a stack, and the nodes that read it."""

    value: ir.Value
    expert: int | None
    bits: int
    block: int
    products: list[tuple[ir.Node, int]] = field(default_factory=list)
    gathers: list[ir.Node] = field(default_factory=list)
    #: The axis the forward pass sums over: the inputs of the layer.
    inputs: int = 1

    @property
    def name(self) -> str:
        return f"{self.value.name}" if self.expert is None else f"{self.value.name}.{self.expert}"

    @property
    def tensor(self) -> ir.TensorProtocol:
        assert self.value.const_value is not None
        return self.value.const_value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape.numpy())[-2:]

    def settle(self, forward: set[ir.Node]) -> None:
        """Chooses axes and bits once all uses are known."""
        for node, place in self.products:
            if node in forward:
                transposed = bool(node.attributes.get_int("transB" if place else "transA", 0))
                self.inputs = int(transposed) if place else int(not transposed)
                break
        if self.gathers or layer_of(self.value.name) is None:
            self.bits = 8
            self.inputs = 1 if self.gathers else self.inputs

    def described(self) -> dict[str, tuple[ir.DataType, tuple[int, ...]]]:
        """Name -> dtype and shape of what is stored, in the order of `contents`."""
        names = [f"{self.name}.{part}" for part in ("quantized", "scale", "zero_point")]
        if self.bits == 8:
            per_output = (self.shape[1 - self.inputs],)
            return {names[0]: (ir.DataType.INT8, self.shape), names[1]: (ir.DataType.FLOAT, per_output)}
        blocks = list(self.shape)
        blocks[self.inputs] = math.ceil(blocks[self.inputs] / self.block)
        return {
            names[0]: (ir.DataType.UINT4, self.shape),
            names[1]: (ir.DataType.FLOAT, tuple(blocks)),
            names[2]: (ir.DataType.UINT4, tuple(blocks)),
        }

    def contents(self) -> Iterator[memoryview]:
        """The bytes of `described`; holds one quantised weight, and floats of a few rows, in memory."""
        array = self.tensor.numpy()
        if self.expert is not None:
            array = array[self.expert]
        # Outputs first: a chunk is a number of whole output channels, however the weight lies in memory.
        array = array if self.inputs == 1 else array.T

        def quantized(chunk: np.ndarray) -> tuple[np.ndarray, ...]:
            return quantize_rows(chunk) if self.bits == 8 else quantize_blocks(chunk, self.block)

        parts = map_floats(quantized, array, QuantizeBase.name, self.name)
        for pieces, (dtype, _) in zip(zip(*parts, strict=True), self.described().values(), strict=True):
            whole = np.concatenate(pieces)
            whole = whole if self.inputs == 1 or whole.ndim == 1 else whole.T
            yield as_bytes(pack(whole.reshape(-1), 4) if dtype.bitwidth == 4 else whole)

    def install(self, graph: ir.Graph, make: Maker, stored: dict[str, FileTensor]) -> None:
        """Lets every use read the stored weight."""
        parts = register(graph, stored, list(self.described()))
        axes: dict[str, Any] = (
            {"axis": 1 - self.inputs} if self.bits == 8 else {"axis": self.inputs, "block_size": self.block}
        )
        for node, place in self.products:
            old = node.inputs[place]
            assert old is not None
            value = make.op("DequantizeLinear", *parts, **axes)
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(self.shape)
            node.replace_input_with(place, _in_dtype(make, value, old.dtype))
            graph.insert_before(node, make.take())
        for node in self.gathers:
            # DequantizeLinear cannot scale gathered rows: their axis is the batch's.
            old = node.outputs[0]
            rows = make.op("Cast", make.op("Gather", parts[0], node.inputs[1]), to=ir.DataType.FLOAT.value)
            scales = make.op("Unsqueeze", make.op("Gather", parts[1], node.inputs[1]), make.constant([-1]))
            value = make.op("Mul", rows, scales)
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), old.shape
            readers = [use.node for use in old.uses()]
            casts = [n for n in readers if n.op_type == "Cast" and n.outputs[0].dtype == ir.DataType.FLOAT]
            for cast in casts:  # rounding the products to the table's 16 bits would be a second loss
                cast.outputs[0].replace_all_uses_with(value)
            if len(casts) < len(readers):
                value = _in_dtype(make, value, old.dtype)
            graph.insert_before(node, make.take())
            old.replace_all_uses_with(value)


def _in_dtype(make: Maker, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    if dtype is None or dtype == ir.DataType.FLOAT:
        return value
    cast = make.op("Cast", value, to=dtype.value)
    cast.type, cast.shape = ir.TensorType(dtype), value.shape
    return cast

"""QuantizeWeights: matrices in blocks of 4 or 8 bits that ONNX Runtime multiplies without making floats of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.errors import OptionError
from QEfficient.onnx_io import FileTensor, file_tensors, stream_tensors, write_tensors
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker
from QEfficient.transforms.onnx.quantizing import (
    as_bytes,
    map_floats,
    pack,
    quantize_channels,
    quantize_groups,
    register,
)

DOMAIN = "com.microsoft"
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
#: Smaller weights are not worth their loss.
_MIN_ELEMENTS = 4096
#: The ``group_size`` of one scale per output channel, and how many inputs the kernels then read with one scale.
CHANNEL = "channel"
_CHANNEL_GROUP = 128
#: Steps from the head's product to the logits.
_FEW_STEPS = 6
#: Rows of a weight on which its rounding error is measured.
_SAMPLED_ROWS = 256
#: Block sizes that ONNX Runtime's kernels take.
_GROUPS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class QuantizeWeights(OnnxTransform):
    """Weight-only quantization for inference on the host.

    A weight that ``MatMul`` reads, also through casts and a transposition, becomes ``MatMulNBits``; a table that
    ``Gather`` reads along its first axis becomes ``GatherBlockQuantized``. A tied embedding and head share one stored
    tensor. ``group_size`` inputs of an output channel share a float32 scale (and a zero point when not symmetric).
    A table's groups are as large as its rows are a multiple of.
    Weights used in any other way, and those with fewer than 4096 elements, stay as they are; the facts say which and
    why. Formats: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.

    Parameters:
        bits: 4 or 8.
        group_size: inputs that share a scale: 16, 32, 64, 128 or 256; or ``channel``, all inputs of an output channel,
            which products of many rows can use as they are (`RowScaledProducts`).
        symmetric: no zero points; the value of largest magnitude of a group is exact.
        extra: with 4 bits, weights that matter most are kept in 8 as far as that adds at most this share of bytes:
            first embeddings and head, whose errors reach the logits undamped, then those that lose most. What a weight
            loses is the rounding error's share of its square sum, over rows spread evenly; weights multiplied with
            one input are judged together.
        accuracy_level: what products may make of activations: 0 or 1 leaves them float32, 4 quantizes them to int8 per
            row and group, which is faster.
    """

    name: ClassVar[str] = "QuantizeWeights"
    bits: int = 4
    group_size: int | str = 32
    symmetric: bool = True
    accuracy_level: int = 4
    extra: float = 0.0

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise OptionError(f"QuantizeWeights stores weights in 4 or 8 bits, got {self.bits!r}.")
        if self.group_size not in (*_GROUPS, CHANNEL):
            raise OptionError(
                f"QuantizeWeights' group_size must be one of {_GROUPS} or {CHANNEL!r}, got {self.group_size!r}."
            )
        if self.symmetric not in (True, False):
            raise OptionError(f"QuantizeWeights' symmetric must be True or False, got {self.symmetric!r}.")
        if self.group_size == CHANNEL and not self.symmetric:
            raise OptionError("QuantizeWeights' group_size 'channel' is symmetric: leave out symmetric=False.")
        if self.accuracy_level not in (0, 1, 4):
            raise OptionError(f"QuantizeWeights' accuracy_level must be 0, 1 or 4, got {self.accuracy_level!r}.")
        if isinstance(self.extra, bool) or not isinstance(self.extra, int | float) or not 0 <= self.extra <= 1:
            raise OptionError(f"QuantizeWeights' extra must be a share from 0 to 1, got {self.extra!r}.")
        if self.extra and (self.bits != 4 or self.group_size == CHANNEL):
            raise OptionError("QuantizeWeights' extra keeps some 4-bit weights in 8: it goes with bits=4 and groups.")
        kinds: dict[str, type] = {"bits": int, "symmetric": bool, "accuracy_level": int, "extra": float}
        for name, kind in kinds.items():
            object.__setattr__(self, name, kind(getattr(self, name)))
        if self.group_size != CHANNEL:
            object.__setattr__(self, "group_size", int(self.group_size))

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError for a weight that holds infinities or NaN."""
        graph = model.graph
        chosen: list[_Weight] = []
        left: dict[str, str] = {}
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.dtype not in _FLOATS or tensor.size < _MIN_ELEMENTS or len(tensor.shape) < 2:
                continue
            found = self._uses(value, graph)
            if isinstance(found, str):
                left[name] = found
            else:
                chosen.append(found)
        kept = _keep_higher(chosen, self.extra) if self.extra else {}
        described = {n: kind for weight in chosen for n, kind in weight.described().items()}
        contents = (part for weight in chosen for part in weight.contents())
        stored = stream_tensors(described, contents, workspace / "quantized.safetensors")
        before = sum(weight.tensor.nbytes for weight in chosen)
        make = Maker(graph, "quantize")
        for weight in chosen:
            weight.install(graph, make, stored, self.accuracy_level)
        if chosen:
            model.opset_imports[DOMAIN] = 1
        passes.RemoveUnusedNodesPass()(model)
        _leave_files(model, {w.tensor.file for w in chosen if isinstance(w.tensor, FileTensor)}, workspace)
        facts = {
            "weights": len(chosen),
            "bytes_before": before,
            "bytes_after": sum(tensor.nbytes for tensor in stored.values()),
            "left": left,
            **({"kept_in_8_bits": kept} if self.extra else {}),
        }
        return TransformResult(bool(chosen), facts)

    def _uses(self, value: ir.Value, graph: ir.Graph) -> _Weight | str:
        """A weight and the nodes that read it, or why it stays as it is."""
        assert value.const_value is not None
        if len(value.const_value.shape) != 2:
            return f"it has rank {len(value.const_value.shape)}"
        whole = self.group_size == CHANNEL
        group = _CHANNEL_GROUP if whole else int(self.group_size)
        weight = _Weight(value, self.bits, group, self.symmetric, whole)
        layouts: set[bool] = set()
        todo: list[tuple[ir.Value, bool]] = [(value, False)]
        while todo:
            current, turned = todo.pop()
            for use in current.uses():
                node, place = use.node, use.idx
                if node.graph is not graph or current.is_graph_output():
                    return "it is used inside a subgraph"
                if node.op_type == "Cast" and node.outputs[0].dtype in _FLOATS:
                    todo.append((node.outputs[0], turned))
                elif node.op_type == "Transpose":
                    todo.append((node.outputs[0], not turned))
                elif node.op_type == "Gather" and place == 0 and not turned and not node.attributes.get_int("axis", 0):
                    weight.gathers.append(node)
                    layouts.add(True)
                elif node.op_type == "MatMul" and place == 1:
                    weight.products.append(node)
                    layouts.add(turned)
                elif node.op_type == "Gemm" and place == 1 and _plain(node):
                    weight.products.append(node)
                    layouts.add(turned != bool(node.attributes.get_int("transB", 0)))
                else:
                    return f"{node.op_type} reads it"
        if len(layouts) > 1:
            return "it is read along both of its axes"
        if not layouts:
            return "nothing reads it"
        weight.outputs_first = layouts.pop()
        if weight.gathers and weight.size[1] % weight.group:  # GatherBlockQuantized returns whole groups
            fitting = [group for group in _GROUPS if group < weight.group and weight.size[1] % group == 0]
            if not fitting:
                return f"its rows of {weight.size[1]} are no multiple of {_GROUPS[0]}"
            weight.group = fitting[-1]
        return weight


@dataclass
class _Weight:
    """One matrix to quantize and the nodes that read it."""

    value: ir.Value
    bits: int
    group: int
    symmetric: bool
    #: One scale for all groups of a row.
    whole: bool
    products: list[ir.Node] = field(default_factory=list)
    gathers: list[ir.Node] = field(default_factory=list)
    #: Whether it lies in memory as [outputs, inputs].
    outputs_first: bool = True

    @property
    def tensor(self) -> ir.TensorProtocol:
        assert self.value.const_value is not None
        return self.value.const_value

    @property
    def size(self) -> tuple[int, int]:
        """(outputs N, inputs K)."""
        first, second = self.tensor.shape.numpy()
        return (first, second) if self.outputs_first else (second, first)

    @property
    def groups(self) -> int:
        return math.ceil(self.size[1] / self.group)

    def loss(self) -> tuple[float, float]:
        """Square sums of the rounding error and of the weight itself, over some rows."""
        array = self.tensor.numpy()
        array = array if self.outputs_first else array.T
        rows = array[:: max(1, len(array) // _SAMPLED_ROWS)].astype(np.float32)
        values, scale, zero = quantize_groups(rows, self.bits, self.group, self.symmetric)
        back = (values.astype(np.float32) - zero[..., None]) * scale[..., None]
        rounded = back.reshape(len(rows), -1)[:, : rows.shape[1]]
        return float(np.square(rows - rounded).sum()), float(np.square(rows).sum())

    @property
    def stored_bytes(self) -> int:
        return int(sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.described().values()))

    @property
    def at_an_end(self) -> bool:
        """Whether it is a table of embeddings, or makes the logits."""
        return bool(self.gathers) or any(_makes_output(node.outputs[0]) for node in self.products)

    def described(self) -> dict[str, tuple[ir.DataType, tuple[int, ...]]]:
        """Name -> dtype and shape of what is stored, in the order of `contents`."""
        outputs, groups, name = self.size[0], self.groups, self.value.name
        parts: dict[str, tuple[ir.DataType, tuple[int, ...]]] = {
            f"{name}.quantized": (ir.DataType.UINT8, (outputs, groups, self.group * self.bits // 8)),
            f"{name}.scale": (ir.DataType.FLOAT, (outputs, groups)),
        }
        if not self.symmetric:
            parts[f"{name}.zero_point"] = (ir.DataType.UINT8, (outputs, math.ceil(groups * self.bits / 8)))
        return parts

    def contents(self) -> Iterator[memoryview]:
        """The bytes of `described`; holds one quantized weight, and floats of a few rows, in memory."""
        array = self.tensor.numpy()
        array = array if self.outputs_first else array.T

        def packed(chunk: np.ndarray) -> tuple[np.ndarray, ...]:
            if self.whole:
                values, scale, zero = quantize_channels(chunk, self.bits, self.group)
            else:
                values, scale, zero = quantize_groups(chunk, self.bits, self.group, self.symmetric)
            return pack(values, self.bits), scale, pack(zero, self.bits)

        parts = map_floats(packed, array, QuantizeWeights.name, self.value.name)
        for pieces, _ in zip(zip(*parts, strict=True), self.described(), strict=False):
            yield as_bytes(np.concatenate(pieces))

    def install(self, graph: ir.Graph, make: Maker, stored: dict[str, FileTensor], accuracy: int) -> None:
        """Lets every use read the stored weight."""
        parts = register(graph, stored, list(self.described()))
        outputs, inputs = self.size
        for node in self.products:
            old = node.outputs[0]
            new = make.op(
                "MatMulNBits", _as_float(make, node.inputs[0]), *parts, domain=DOMAIN, K=inputs, N=outputs,
                bits=self.bits, block_size=self.group, accuracy_level=accuracy,
            )  # fmt: skip
            if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
                new = make.op("Add", new, _as_float(make, node.inputs[2]))
            self._replace(graph, make, node, new, old)
        rows = self._as_table(graph, parts[0]) if self.gathers else None
        for node in self.gathers:
            old = node.outputs[0]
            new = make.op(
                "GatherBlockQuantized", rows, node.inputs[1], *parts[1:], domain=DOMAIN, bits=self.bits,
                block_size=self.group, gather_axis=0, quantize_axis=1,
            )  # fmt: skip
            self._replace(graph, make, node, new, old)

    def _as_table(self, graph: ir.Graph, part: ir.Value) -> ir.Value:
        """The stored bytes once more, as [outputs, bytes of a row]: a Reshape would make the runtime copy them."""
        whole = part.const_value
        assert isinstance(whole, FileTensor)
        shape = ir.Shape([self.size[0], whole.length // self.size[0]])
        if not self.products:  # nothing reads it in groups
            del graph.initializers[str(part.name)]
        name = f"{whole.name}.rows" if self.products else str(whole.name)
        rows = FileTensor(whole.file, whole.location, whole.offset, whole.length, whole.dtype, shape, name)
        return register(graph, {name: rows}, [name])[0]

    @staticmethod
    def _replace(graph: ir.Graph, make: Maker, node: ir.Node, new: ir.Value, old: ir.Value) -> None:
        new.type, new.shape = ir.TensorType(ir.DataType.FLOAT), old.shape
        if old.dtype not in (None, ir.DataType.FLOAT):
            assert old.dtype is not None
            new = make.op("Cast", new, to=old.dtype.value, like=old)
        graph.insert_before(node, make.take())
        if old.is_graph_output():
            new.name, old.name = old.name, f"{old.name}/replaced"
        old.replace_all_uses_with(new, replace_graph_outputs=True)


def _makes_output(value: ir.Value) -> bool:
    """Whether a value becomes an output of the graph by steps that each have one reader (a cast, a soft cap)."""
    for _ in range(_FEW_STEPS):
        if value.is_graph_output():
            return True
        readers = list(value.uses())
        if len(readers) != 1 or readers[0].node.op_type not in ("Cast", "Mul", "Div", "Tanh", "Add"):
            return False
        value = readers[0].node.outputs[0]
    return False


def _keep_higher(weights: list[_Weight], extra: float) -> dict[str, float]:
    """Sets weights that lose most to 8 bits, as far as ``extra`` bytes allow; their names and relative losses.

    Weights that are multiplied with one input stay of one kind, so that they can become one product.
    """
    units: dict[ir.Value, list[_Weight]] = {}
    for weight in weights:
        shared = weight.products[0].inputs[0] if weight.products else weight.value
        units.setdefault(shared or weight.value, []).append(weight)
    budget = extra * sum(weight.stored_bytes for weight in weights)
    losses = {}
    for shared, members in units.items():
        errors, sizes = zip(*(weight.loss() for weight in members), strict=True)
        losses[shared] = sum(errors) / max(sum(sizes), 1e-30)
    kept: dict[str, float] = {}
    ends = {shared for shared, members in units.items() if any(weight.at_an_end for weight in members)}
    for shared, loss in sorted(losses.items(), key=lambda item: (item[0] not in ends, -item[1])):
        members = units[shared]
        before = sum(weight.stored_bytes for weight in members)
        for weight in members:
            weight.bits = 8
        cost = sum(weight.stored_bytes for weight in members) - before
        if cost > budget:
            for weight in members:
                weight.bits = 4
            continue
        budget -= cost
        kept |= {str(weight.value.name): round(loss, 6) for weight in members}
    return kept


def _leave_files(model: ir.Model, files: set[Path], workspace: Path) -> None:
    """Copies what else the graph reads from ``files``, so that the package does not carry the weights before."""
    kept = {name: tensor for name, tensor in file_tensors(model).items() if tensor.file in files}
    for name, tensor in write_tensors(kept, workspace / "kept.safetensors").items() if kept else ():
        model.graph.initializers[name].const_value = tensor


def _as_float(make: Maker, value: ir.Value | None) -> ir.Value:
    assert value is not None
    if value.dtype in (None, ir.DataType.FLOAT):
        return value
    return make.op("Cast", value, to=ir.DataType.FLOAT.value)


def _plain(node: ir.Node) -> bool:
    """Whether a Gemm is a product and a sum, without factors or a transposed first operand."""
    factors = [node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes]
    return not node.attributes.get_int("transA", 0) and all(factor == 1 for factor in factors)

"""MergeProducts: quantized products that read the same activations become one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.onnx_io import FileTensor, stream_tensors
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker
from QEfficient.transforms.onnx.quantizing import register

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class MergeProducts(OnnxTransform):
    """Joins ``MatMulNBits`` nodes of one input along their outputs: query, key and value; gate and up.

    The stored integers and scales stay what they are, one after the other. Biases behind all of them join the node.
    Query, key and value that go to one ``GroupQueryAttention`` untouched go there as one packed tensor.

    Contract: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
    """

    name: ClassVar[str] = "MergeProducts"

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        graph = model.graph
        groups = [group for group in _groups(graph) if len(group.products) > 1]
        described = {name: kind for group in groups for name, kind in group.described().items()}
        contents = (part for group in groups for part in group.contents())
        stored = stream_tensors(described, contents, workspace / "merged.safetensors")
        make = Maker(graph, "merge")
        packed = 0
        for group in groups:
            packed += group.install(graph, make, stored)
        if groups:
            passes.RemoveUnusedNodesPass()(model)
        facts = {"products": sum(len(g.products) for g in groups), "merged": len(groups), "packed_attention": packed}
        return TransformResult(bool(groups), facts)


@dataclass
class _Group:
    """Products of one input with weights of one format, in graph order."""

    products: list[ir.Node]

    @property
    def name(self) -> str:
        return str(self.products[0].inputs[1].name).removesuffix(".quantized") + "+"  # type: ignore[union-attr]

    @property
    def biases(self) -> list[ir.Value] | None:
        """The constant each product's only reader adds, when all have one."""
        found = [_bias(product) for product in self.products]
        return None if any(bias is None for bias in found) else [bias for bias in found if bias is not None]

    def _parts(self, place: int) -> list[FileTensor]:
        """The tensors at one input of all products."""
        values = [product.inputs[place] for product in self.products]
        return [v.const_value for v in values if v is not None and isinstance(v.const_value, FileTensor)]

    def _places(self) -> dict[str, int]:
        names = {"quantized": 1, "scale": 2, "zero_point": 3}
        return {f"{self.name}.{n}": place for n, place in names.items() if place < len(self.products[0].inputs)}

    def described(self) -> dict[str, tuple[ir.DataType, tuple[int, ...]]]:
        """Name -> dtype and shape of what is stored, in the order of `contents`."""
        found: dict[str, tuple[ir.DataType, tuple[int, ...]]] = {}
        for name, place in self._places().items():
            parts = self._parts(place)
            rows = sum(part.shape.numpy()[0] for part in parts)
            found[name] = (parts[0].dtype, (rows, *parts[0].shape.numpy()[1:]))
        if self.biases is not None:
            found[f"{self.name}.bias"] = (ir.DataType.FLOAT, (sum(_outputs(p) for p in self.products),))
        return found

    def contents(self) -> Iterator[bytes]:
        """The bytes of `described`: output channels are rows, so the tensors simply follow each other."""
        for place in self._places().values():
            yield b"".join(part.tobytes() for part in self._parts(place))
        if self.biases is not None:
            yield np.concatenate([_array(bias) for bias in self.biases]).astype(np.float32).tobytes()

    def install(self, graph: ir.Graph, make: Maker, stored: dict[str, FileTensor]) -> bool:
        """Puts the joined product where the first one is; returns whether it went to an attention node packed."""
        first, biases = self.products[0], self.biases
        names = list(self._places())
        parts: list[ir.Value | None] = list(register(graph, stored, names))
        if biases is not None:
            parts += [None] * (4 - len(parts))
            parts += register(graph, stored, [f"{self.name}.bias"])
        sizes = [_outputs(product) for product in self.products]
        attributes = {name: attribute.value for name, attribute in first.attributes.items()} | {"N": sum(sizes)}
        whole = make.op("MatMulNBits", first.inputs[0], *parts, domain=DOMAIN, **attributes)
        ends = [p.outputs[0] if biases is None else _reader(p).outputs[0] for p in self.products]
        shape = ends[0].shape
        whole.type = ir.TensorType(ir.DataType.FLOAT)
        whole.shape = ir.Shape([*shape[:-1], sum(sizes)]) if shape is not None else None
        attention = _attention_of(ends)
        if attention is not None:
            graph.insert_before(first, make.take())
            attention.replace_input_with(0, whole)
            attention.replace_input_with(1, None)
            attention.replace_input_with(2, None)
            return True
        pieces = make.ops("Split", [whole, make.constant(sizes)], len(sizes), axis=-1)
        graph.insert_before(first, make.take())
        for piece, end in zip(pieces, ends, strict=True):
            piece.type, piece.shape = ir.TensorType(ir.DataType.FLOAT), end.shape
            end.replace_all_uses_with(piece)
        return False


def _groups(graph: ir.Graph) -> list[_Group]:
    """Products by input and format; a weight that something else reads too stays alone."""
    found: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in graph:
        if node.op_type != "MatMulNBits" or len(node.inputs) > 4 or node.outputs[0].is_graph_output():
            continue
        weights = [value for value in node.inputs[1:] if value is not None]
        if any(not isinstance(v.const_value, FileTensor) or len(v.uses()) > 1 for v in weights):
            continue
        kind = tuple(node.attributes.get_int(name, 0) for name in ("K", "bits", "block_size", "accuracy_level"))
        found.setdefault((node.inputs[0], len(node.inputs), kind), []).append(node)
    return [_Group(products) for products in found.values()]


def _outputs(product: ir.Node) -> int:
    return product.attributes.get_int("N", 0)


def _reader(product: ir.Node) -> ir.Node:
    return next(iter(product.outputs[0].uses())).node


def _bias(product: ir.Node) -> ir.Value | None:
    """The constant [outputs] that the only reader of a product adds to it, before a possible Cast."""
    uses = list(product.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or uses[0].node.outputs[0].is_graph_output():
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    cast = other.producer() if other is not None else None
    if cast is not None and cast.op_type == "Cast":
        other = cast.inputs[0]
    if other is None or other.const_value is None or other.const_value.size != _outputs(product):
        return None
    return other if len(other.const_value.shape) == 1 else None


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float32)


def _attention_of(ends: Sequence[ir.Value]) -> ir.Node | None:
    """The attention node whose query, key and value the three values are, and that alone reads them."""
    if len(ends) != 3 or any(len(value.uses()) != 1 for value in ends):
        return None
    node = next(iter(ends[0].uses())).node
    ours = node.op_type == "GroupQueryAttention" and [*node.inputs[:3]] == list(ends)
    return node if ours else None

"""FuseEncoderAttention: attention takes its inputs as the products give them, without splitting off the heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.fusing import exchange, made_by, module_of, only_reader, size_at
from QEfficient.transforms.onnx.graph import Maker

_HEADS_FIRST = [0, 2, 1, 3]


@dataclass(frozen=True)
class FuseEncoderAttention(OnnxTransform):
    """``Attention`` over [batch, heads, seq, dim] becomes ``Attention`` over [batch, seq, heads * dim].

    The operator takes both layouts. With the second one, the four ``Reshape`` and ``Transpose`` around each layer's
    attention go away, and with them a copy of query, key, value and result. Mask, scale and the arithmetic stay what
    they were, so any mask is fine. A layer stays as it is when something between products and attention needs the heads
    apart: a rotation, a norm of the heads, keys and values from a state.

    Contract: https://onnx.ai/onnx/operators/onnx__Attention.html
    """

    name: ClassVar[str] = "FuseEncoderAttention"

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Facts: ``fused`` counts changed nodes, ``left`` says of every attention that stays as it is why."""
        graph = model.graph
        make = Maker(graph, "attention")
        fused = 0
        left: dict[str, str] = {}
        for node in list(graph):
            if node.op_type != "Attention" or node.domain:
                continue
            site = _find(node)
            if isinstance(site, str):
                left[module_of(node)] = site
            else:
                site.install(make)
                fused += 1
        if fused:
            passes.RemoveUnusedNodesPass()(model)
        elif not left:
            left["graph"] = "it has no attention operator"
        return TransformResult(bool(fused), {"fused": {"Attention": fused} if fused else {}, "left": left})


@dataclass
class _Site:
    """One ``Attention``: query, key and value before their heads were split off, and its result with heads joined."""

    node: ir.Node
    inputs: list[ir.Value]
    result: ir.Value
    heads: int
    kv_heads: int

    def install(self, make: Maker) -> None:
        attributes = {name: attribute.value for name, attribute in self.node.attributes.items()}
        attributes |= {"q_num_heads": self.heads, "kv_num_heads": self.kv_heads}
        new = make.op("Attention", *self.inputs, *self.node.inputs[3:], **attributes)
        exchange(make, self.node, self.result, new)


def _find(node: ir.Node) -> _Site | str:
    """The site around a node, or why its heads have to stay apart."""
    more = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    if more or any(value is not None for value in node.inputs[4:]):
        return "it reads or returns a state"
    if "q_num_heads" in node.attributes:
        return "its heads are joined already"
    heads, kv_heads = size_at(node.inputs[0], 1), size_at(node.inputs[1], 1)
    if heads is None or kv_heads is None:
        return "the number of its heads is not known"
    joined = []
    for value, role in zip(node.inputs[:3], ("query", "key", "value"), strict=True):
        before = _before_split(value)
        if before is None:
            return f"its {role} {_origin(value)}"
        joined.append(before)
    result = _after_join(node.outputs[0])
    if result is None:
        return "its result is not just joined into [batch, seq, heads * dim]"
    return _Site(node, joined, result, heads, kv_heads)


def _origin(value: ir.Value | None) -> str:
    """Why a value is no [batch, seq, heads * dim] with its heads split off."""
    node = value.producer() if value is not None else None
    if node is None:
        return "is given to the graph"
    if node.op_type == "ScatterND":
        return "is read from a state"
    if node.op_type == "Transpose":
        return "does not come from a tensor of [batch, seq, heads * dim]"
    return f"is computed with its heads apart (by {node.op_type})"


def _before_split(value: ir.Value | None) -> ir.Value | None:
    """The [batch, seq, heads * dim] that ``value`` [batch, heads, seq, dim] is made of by two copies."""
    turned = made_by(value, "Transpose")
    if turned is None or list(turned.attributes["perm"].as_ints()) != _HEADS_FIRST:
        return None
    split = turned.inputs[0]
    viewed = made_by(split, "Reshape")
    joined = viewed.inputs[0] if viewed is not None else None
    return joined if _same_order(joined, split) else None


def _after_join(value: ir.Value) -> ir.Value | None:
    """The [batch, seq, heads * dim] that is made of the result [batch, heads, seq, dim] and nothing else is."""
    turned = only_reader(value, "Transpose")
    if turned is None or list(turned.attributes["perm"].as_ints()) != _HEADS_FIRST:
        return None
    split = turned.outputs[0]
    viewed = only_reader(split, "Reshape")
    if viewed is None or viewed.inputs[0] is not split:
        return None
    return viewed.outputs[0] if _same_order(viewed.outputs[0], split) else None


def _same_order(joined: ir.Value | None, split: ir.Value | None) -> bool:
    """Whether [batch, seq, width] and [batch, seq, heads, dim] have the same batch and seq: then a row is a row."""
    if joined is None or split is None or joined.shape is None or split.shape is None:
        return False
    heads, dim, width = size_at(split, 2), size_at(split, 3), size_at(joined, 2)
    ranks = len(joined.shape) == 3 and len(split.shape) == 4
    if not ranks or heads is None or dim is None or width != heads * dim:
        return False
    # Two sizes without a name are equal to each other, but nothing says that they are the same size.
    named = all(size != ir.SymbolicDim(None) for size in (*joined.shape[:2], *split.shape[:2]))
    return named and joined.shape[:2] == split.shape[:2]

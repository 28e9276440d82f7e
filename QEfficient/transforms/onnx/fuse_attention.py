"""Attention over the KV state as one GroupQueryAttention node that knows how many tokens there are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.errors import OptionError
from QEfficient.onnx_io import store_tensors
from QEfficient.transforms.onnx.attention_sites import AttentionSite, Placement, find_site
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker
from QEfficient.transforms.onnx.probe import positional_values
from QEfficient.transforms.onnx.quantizing import register
from QEfficient.transforms.onnx.rotary import Rotation, before_rotation, find_rotation, heads_of

DOMAIN = "com.microsoft"
#: The operator takes rotations of a multiple of so many pairs.
_PAIRS = 8
#: With a rotation inside it takes heads of a multiple of so many dimensions.
_ROTATED_HEAD = 16


@dataclass(frozen=True)
class FuseAttention(OnnxTransform):
    """For each causal ``Attention`` node: its ``ScatterND`` into the state, its mask and its rotation become one node.

    ``GroupQueryAttention`` reads only the slots that hold tokens, where the general node reads the whole capacity, and
    writes keys and values into the state's own buffer. A row's tokens must be contiguous and end the row; with several
    tokens in a call there is one row. What the mask, the slots and the rotation compute is proven by running those
    parts for every position; a layer where that fails stays as it is, and the facts say why.

    Contract: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention

    Parameters:
        ctx_len: capacity of the state in tokens.
    """

    name: ClassVar[str] = "FuseAttention"
    ctx_len: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.ctx_len, bool) or not isinstance(self.ctx_len, int) or self.ctx_len < 1:
            raise OptionError(f"FuseAttention needs ctx_len, the capacity of the state, got {self.ctx_len!r}.")

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Fuses what can be proven; never raises for a layer that cannot."""
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "Attention" and not node.domain]
        fusing = _Fusing(model, self.ctx_len, workspace)
        left: dict[str, str] = {}
        for node in nodes:
            site = find_site(node, fusing.placement)
            if isinstance(site, str):
                left[str(node.name)] = site
            else:
                fusing.fuse(site)
        if fusing.fused:
            model.opset_imports[DOMAIN] = 1
            passes.RemoveUnusedNodesPass()(model)
        return TransformResult(bool(fusing.fused), {"fused": dict(fusing.fused), "left": left})


class _Fusing:
    """The work on one model: what layers share (lengths, rotation tables) is made once."""

    def __init__(self, model: ir.Model, ctx_len: int, workspace: Path) -> None:
        self.model, self.graph, self.ctx_len, self.workspace = model, model.graph, ctx_len, workspace
        self.placement = Placement(model, ctx_len)
        self.positional = positional_values(model.graph)
        self.order = {node: place for place, node in enumerate(model.graph)}
        self.make = Maker(model.graph, "attention")
        self.fused: Counter[str] = Counter()
        self._lengths: tuple[ir.Value, ir.Value] | None = None
        self._tables: list[tuple[Rotation, list[ir.Value]]] = []

    def fuse(self, site: AttentionSite) -> None:
        query, key, rotation = self._unrotated(site)
        tables = self._table_values(rotation) if rotation else []
        inputs = [
            self._flat(query, site.heads * site.dim, site.heads),
            self._flat(key, site.kv_heads * site.dim, site.kv_heads),
            self._flat(site.value, site.kv_heads * site.dim, site.kv_heads),
            site.past_key,
            site.past_value,
            *self._length_values(),
            *tables,
        ]
        out, keys, values = self.make.ops(
            "GroupQueryAttention", inputs, 3, DOMAIN, num_heads=site.heads, kv_num_heads=site.kv_heads,
            scale=site.scale, softcap=site.softcap, local_window_size=site.window or -1,
            do_rotary=int(rotation is not None), rotary_interleaved=int(bool(rotation and rotation.interleaved)),
        )  # fmt: skip
        attention = site.node.outputs[0]
        shape = attention.shape
        batch, seq = (shape[0], shape[2]) if shape is not None else (None, None)
        out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([batch, seq, site.heads * site.dim])
        self._deliver(site, out)
        self.graph.insert_before(site.node, self.make.take())
        for new, scatter in ((keys, site.key_scatter), (values, site.value_scatter)):
            old = scatter.outputs[0]
            new.type, new.shape = old.type, old.shape
            new.name, old.name = old.name, f"{old.name}/replaced"
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.fused["GroupQueryAttention"] += 1
        self.fused["rotary inside"] += rotation is not None
        self.fused["sliding window"] += site.window is not None

    def _unrotated(self, site: AttentionSite) -> tuple[ir.Value, ir.Value, Rotation | None]:
        """Query and key before rotation and the rotation, or as they are when it cannot be proven."""
        found = []
        if site.dim % _ROTATED_HEAD:
            return site.query, site.key, None
        for value, heads in ((site.query, site.heads), (site.key, site.kv_heads)):
            before = before_rotation(value, self.positional, self.order)
            if before is None or before is value or heads_of(before) != (heads, site.dim):
                return site.query, site.key, None
            rotation = find_rotation(self.model, before, value, (heads, site.dim), self.ctx_len)
            if rotation is None or rotation.cos.shape[1] % _PAIRS:
                return site.query, site.key, None
            found.append((before, rotation))
        (query, first), (key, second) = found
        return (query, key, first) if first.same(second) else (site.query, site.key, None)

    def _table_values(self, rotation: Rotation) -> list[ir.Value]:
        for known, values in self._tables:
            if known.same(rotation):
                return values
        prefix = f"rotary.{len(self._tables)}"
        arrays = {f"{prefix}.cos": rotation.cos, f"{prefix}.sin": rotation.sin}
        stored = store_tensors(arrays, self.workspace / f"{prefix}.safetensors")
        values = register(self.graph, stored, list(arrays))
        self._tables.append((rotation, values))
        return values

    def _length_values(self) -> tuple[ir.Value, ir.Value]:
        """int32 [batch]: tokens of each row after this call, less one; int32 scalar: the most tokens of any row.

        An idle row (position -1) counts as full: it writes the last slot, which no other query sees before its own
        call has written it.
        """
        if self._lengths is None:
            make = self.make
            positions = next(value for value in self.graph.inputs if value.name == "position_ids")
            first = make.op("Gather", positions, make.constant(0), axis=1)
            seq = make.op("Shape", positions, start=1, end=2)
            last = make.op("Sub", make.op("Add", first, seq), make.constant([1]))
            idle = make.op("Less", first, make.constant(0))
            ends = make.op("Where", idle, make.constant(self.ctx_len - 1), last)
            ends = make.op("Cast", ends, to=ir.DataType.INT32.value)
            total = make.op("ReduceMax", ends, keepdims=0)
            self._lengths = ends, make.op("Add", total, make.constant(1, ir.DataType.INT32))
        return self._lengths

    def _flat(self, value: ir.Value, width: int, heads: int) -> ir.Value:
        """[batch, heads, seq, dim] as [batch, seq, heads * dim], from before the heads were moved forward if it can."""
        node = value.producer()
        if node is not None and node.op_type == "Transpose" and _perm(node) == (0, 2, 1, 3):
            source = node.inputs[0]
            assert source is not None
            reshape = source.producer()
            if reshape is not None and reshape.op_type == "Reshape":
                whole = reshape.inputs[0]
                if whole is not None and whole.shape is not None and len(whole.shape) == 3 and whole.shape[2] == width:
                    return whole
        else:
            source = self.make.op("Transpose", value, perm=[0, 2, 1, 3])
        return self.make.op("Reshape", source, self.make.constant([0, 0, width]))

    def _deliver(self, site: AttentionSite, out: ir.Value) -> None:
        """Lets the readers of [batch, heads, seq, dim] read [batch, seq, heads * dim]."""
        old, make = site.node.outputs[0], self.make
        split: ir.Value | None = None
        for node, place in list(old.uses()):
            if node.op_type == "Transpose" and _perm(node) == (0, 2, 1, 3):
                turned = node.outputs[0]
                for reader, index in list(turned.uses()):
                    shape = reader.outputs[0].shape
                    whole = shape is not None and len(shape) == 3 and shape[2] == site.heads * site.dim
                    if reader.op_type == "Reshape" and index == 0 and whole:
                        reader.outputs[0].replace_all_uses_with(out)
                if not turned.uses():
                    continue
                split = split or make.op("Reshape", out, make.constant([0, 0, site.heads, site.dim]), like=turned)
                turned.replace_all_uses_with(split)
            else:
                split = split or make.op("Reshape", out, make.constant([0, 0, site.heads, site.dim]))
                node.replace_input_with(place, make.op("Transpose", split, perm=[0, 2, 1, 3], like=old))


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm", ()))

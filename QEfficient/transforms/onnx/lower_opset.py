"""LowerOpset: a graph is written with the operators an older opset has, for compilers that know no newer one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.errors import OptionError, TransformError
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.fixes_index import INDEX_RULES
from QEfficient.transforms.onnx.fixes_math import MATH_RULES, required, scalar
from QEfficient.transforms.onnx.graph import Maker, graphs_in, swap

#: Opset -> the IR version that goes with it.
IR_VERSIONS = {17: 8, 18: 8}
#: What a masked score becomes: the least number of float16.
MASKED = -65504.0


@dataclass(frozen=True)
class LowerOpset(OnnxTransform):
    """Rewrites what an opset does not have: ``Attention``, ``Gelu``, axes as inputs of reductions, and the like.

    The graph computes the same function; a masked score of an attention becomes -65504 instead of minus infinity.

    Parameters:
        opset: 17 or 18.
    """

    name: ClassVar[str] = "LowerOpset"
    opset: int = 17

    def __post_init__(self) -> None:
        if self.opset not in IR_VERSIONS:
            raise OptionError(f"LowerOpset writes opset {' or '.join(map(str, IR_VERSIONS))}, got {self.opset!r}.")

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError naming an operator that the opset lacks and no rule writes otherwise."""
        before = model.graph.opset_imports.get("") or self.opset
        replaced: Counter[str] = Counter()
        attention = _AttentionRule()
        make = Maker(model.graph, "lowered")
        for node in list(model.graph.all_nodes()):
            if node.domain != "":
                continue
            if node.op_type == "Attention":
                values: Sequence[ir.Value | None] = attention(make, node)
            elif node.op_type == "GreaterOrEqual":  # the same comparison under a name more compilers are known to take
                values = [make.op("LessOrEqual", node.inputs[1], node.inputs[0])]
            elif _schema(node.op_type, self.opset) is None:
                rule = (MATH_RULES | INDEX_RULES).get(node.op_type)
                if rule is None or graphs_in(node):
                    raise _lacking(node, self.opset)
                values = rule(make, node)
            else:
                if self._adapt(node, before):
                    replaced[node.op_type] += 1
                continue
            if node.graph is not model.graph:
                raise _lacking(node, self.opset)
            replaced[node.op_type] += 1
            swap(model.graph, node, values, make)
        passes.RemoveUnusedNodesPass()(model)
        changed = bool(replaced) or before != self.opset
        for graph in model.graphs():
            graph.opset_imports[""] = self.opset
        for node in model.graph.all_nodes():
            node.version = None
            if node.domain == "":
                self._adapt(node, self.opset + 1)  # what rules made is in the form of the newer opset
        model.ir_version = IR_VERSIONS[self.opset]
        return TransformResult(changed, {"from": before, "to": self.opset, "replaced": dict(sorted(replaced.items()))})

    def _adapt(self, node: ir.Node, before: int) -> bool:
        """Writes a node as the older opset spells it, in place; whether anything changed."""
        schema = _schema(node.op_type, self.opset)
        if before <= self.opset or schema is None:
            return False
        changed = False
        if node.op_type.startswith("Reduce") and "axes" in schema.attributes and len(node.inputs) > 1:
            axes = node.inputs[1]
            node.attributes.pop("noop_with_empty_axes", None)
            if axes is not None:
                # A constant may also be a node.
                found = ir.convenience.get_const_tensor(axes)
                places = found.numpy() if found is not None else None
                if places is None:
                    raise TransformError(f"LowerOpset: the axes of {node.name} ({node.op_type}) are not constant.")
                node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in places.reshape(-1)])
            node.resize_inputs(1)
            changed = True
        if len(node.inputs) > len(schema.inputs) and not _variadic(schema):
            if any(value is not None for value in list(node.inputs)[len(schema.inputs) :]):
                raise _lacking(node, self.opset)
            node.resize_inputs(len(schema.inputs))
            changed = True
        for name in [name for name in node.attributes if name not in schema.attributes]:
            if not _is_default(node, name, before):
                raise _lacking(node, self.opset)
            node.attributes.pop(name)
            changed = True
        return changed


def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _variadic(schema: onnx.defs.OpSchema) -> bool:
    return bool(schema.inputs) and schema.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic


def _is_default(node: ir.Node, name: str, opset: int) -> bool:
    """Whether an attribute the older operator does not have asks for nothing; equal parts need no number."""
    if (node.op_type, name) == ("Split", "num_outputs"):
        size = node.inputs[0].shape if node.inputs[0] is not None else None
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        length = size[axis] if size is not None else None
        # The older operator splits evenly or refuses, so an unknown length is left to it.
        return not isinstance(length, int) or length % len(node.outputs) == 0
    schema = _schema(node.op_type, max(opset, 23))
    default = schema.attributes[name].default_value if schema is not None and name in schema.attributes else None
    return default is not None and onnx.helper.get_attribute_value(default) == node.attributes[name].value


def _lacking(node: ir.Node, opset: int) -> TransformError:
    return TransformError(
        f"LowerOpset has no way to write {node.op_type} (node {node.name}) in opset {opset}: this graph cannot be "
        "compiled for this target."
    )


class _AttentionRule:
    """``Attention`` as products and a Softmax over the keys' own heads, so that keys and values are never repeated.

    query [batch, heads, seq, dim]; key, value [batch, kv_heads, slots, dim]; mask bool [batch, 1, seq, slots].
    """

    def __init__(self) -> None:
        self._masks: dict[tuple[ir.Value, int], ir.Value] = {}

    def __call__(self, make: Maker, node: ir.Node) -> list[ir.Value | None]:
        query, key, value = (required(node, place) for place in range(3))
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        sizes = [v.shape if v.shape is not None and len(v.shape) == 4 else None for v in (query, key, value)]
        more = [v for v in list(node.inputs)[4:] if v is not None]
        causal = "is_causal" in node.attributes and node.attributes["is_causal"].as_int()
        heads, dim, kv_heads, width = (
            sizes[0][1] if sizes[0] else None,
            sizes[0][3] if sizes[0] else None,
            sizes[1][1] if sizes[1] else None,
            sizes[2][3] if sizes[2] else None,
        )
        counts = [n for n in (heads, dim, kv_heads, width) if isinstance(n, int)]
        if len(counts) != 4 or more or causal or len(node.outputs) > 1:
            raise TransformError(
                f"LowerOpset has no rule for the form of Attention in {node.name}: it takes query, key, value of four "
                "dimensions and a mask."
            )
        heads, dim, kv_heads, width = counts
        groups = heads // kv_heads
        scale = node.attributes["scale"].as_float() if "scale" in node.attributes else dim**-0.5
        softcap = node.attributes["softcap"].as_float() if "softcap" in node.attributes else 0.0
        scaled = make.op("Mul", query, scalar(make, scale, query))
        if groups > 1:
            scaled = make.op("Reshape", scaled, make.constant([0, kv_heads, -1, dim]))
        scores = make.op("MatMul", scaled, make.op("Transpose", key, perm=[0, 1, 3, 2]))
        if softcap:
            cap = scalar(make, softcap, query)
            scores = make.op("Mul", make.op("Tanh", make.op("Div", scores, cap)), cap)
        if mask is not None:
            scores = self._masked(make, node, scores, mask, groups, query)
        out = make.op("MatMul", make.op("Softmax", scores, axis=-1), value)
        if groups > 1:
            out = make.op("Reshape", out, make.constant([0, heads, -1, width]))
        return [out]

    def _masked(
        self, make: Maker, node: ir.Node, scores: ir.Value, mask: ir.Value, groups: int, like: ir.Value
    ) -> ir.Value:
        shared = mask.shape is None or len(mask.shape) < 3 or mask.shape[-3] == 1
        if groups > 1:
            if not shared:
                raise TransformError(f"LowerOpset has no rule for a mask per head in {node.name} with shared keys.")
            if (mask, groups) not in self._masks:
                dims = len(mask.shape) if mask.shape is not None else 4
                repeats = [1] * (dims - 2) + [groups, 1]
                self._masks[mask, groups] = make.op("Tile", mask, make.constant(repeats))
            mask = self._masks[mask, groups]
        if mask.dtype in (None, ir.DataType.BOOL):
            return make.op("Where", mask, scores, scalar(make, MASKED, like))
        return make.op("Add", scores, mask)

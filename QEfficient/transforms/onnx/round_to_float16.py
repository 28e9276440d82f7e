"""RoundToFloat16: every number a graph computes is rounded to float16, as a device that computes in 16 bits does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import RETAINED, Maker
from QEfficient.transforms.onnx.normalisations import normalisation_nodes

_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
#: Their results are numbers they were given: with rounded operands there is nothing to round.
_EXACT = frozenset({
    "Abs", "CtxGather", "CtxGatherCB", "CtxScatter", "CtxScatterCB", "Concat", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "Max", "Min", "Neg", "ReduceMax", "ReduceMin", "Relu", "Reshape",
    "ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip


@dataclass(frozen=True)
class RoundToFloat16(OnnxTransform):
    """Sends every float32 value through float16: weights, constants, inputs, and what each operator returns.

    Rounding is to nearest, ties to even; beyond 65504 comes infinity, as in IEEE 754 binary16. Inside an operator
    everything stays float32: a product is summed in float32 and rounded once, a ``Softmax`` or ``LayerNormalization``
    is one rounding. Retained state is taken as it is, because what is written to it has been rounded.

    Parameters:
        keep_norms: leave the nodes of normalisations in float32 (``node_precision_info="norms"``).
    """

    name: ClassVar[str] = "RoundToFloat16"
    keep_norms: bool = False

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        passes.ShapeInferencePass()(model)  # transforms leave values without a type
        graph = model.graph
        nodes = list(graph.all_nodes())
        kept = set(normalisation_nodes(graph)) if self.keep_norms else set()
        outputs = {str(value.name) for value in graph.outputs}
        given = [value for value in graph.inputs if f"{value.name}{RETAINED}" not in outputs]
        make = Maker(graph, "float16")
        for value in (*given, *graph.initializers.values()):
            if value.dtype in _WIDE and value.uses():
                _round(make, value)
        graph.insert_before(graph[0], make.take())
        rounded = 0
        for node in nodes:
            if node in kept or node.op_type in _EXACT or _widens(node):
                continue
            for value in node.outputs:
                if value.dtype in _WIDE:
                    _round(make, value)
                    rounded += 1
            assert node.graph is not None
            node.graph.insert_after(node, make.take())
        return TransformResult(True, {"values": rounded, "kept_in_float32": len(kept)})


def _round(make: Maker, value: ir.Value) -> None:
    """Lets every reader, and the graph's output, have the rounded value."""
    readers, dtype, maker = list(value.uses()), value.dtype, value.producer()
    assert dtype is not None
    narrow = make.op("Cast", value, to=ir.DataType.FLOAT16.value)
    narrow.type, narrow.shape = ir.TensorType(ir.DataType.FLOAT16), value.shape
    wide = make.op("Cast", narrow, to=dtype.value, like=value)
    for use in readers:
        use.node.replace_input_with(use.idx, wide)
    if value.is_graph_output() and maker is not None and maker.graph is not None:
        outputs = maker.graph.outputs
        wide.name, value.name = value.name, f"{value.name}/unrounded"
        outputs[list(outputs).index(value)] = wide


def _widens(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT16

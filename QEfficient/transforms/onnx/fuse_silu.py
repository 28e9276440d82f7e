"""FuseSiLU: x * sigmoid(x) becomes one operator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker


@dataclass(frozen=True)
class FuseSiLU(OnnxTransform):
    """``Mul(x, Sigmoid(x))`` becomes ``QuickGelu`` with alpha 1, which is x * sigmoid(alpha * x).

    Contract: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QuickGelu
    """

    name: ClassVar[str] = "FuseSiLU"

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        graph, fused = model.graph, 0
        make = Maker(graph, "silu")
        for node in list(graph):
            if node.op_type != "Mul" or node.domain or node.outputs[0].is_graph_output():
                continue
            x = _silu_of(node)
            if x is None:
                continue
            new = make.op("QuickGelu", x, domain="com.microsoft", alpha=1.0, like=node.outputs[0])
            graph.insert_before(node, make.take())
            node.outputs[0].replace_all_uses_with(new)
            fused += 1
        if fused:
            model.opset_imports["com.microsoft"] = 1
            passes.RemoveUnusedNodesPass()(model)
        return TransformResult(bool(fused), {"fused": {"QuickGelu": fused}})


def _silu_of(node: ir.Node) -> ir.Value | None:
    """x, where the node is the product of float32 x and its sigmoid."""
    for gate, x in (node.inputs, node.inputs[::-1]):
        producer = gate.producer() if gate is not None else None
        if producer is not None and producer.op_type == "Sigmoid" and producer.inputs[0] is x and x is not None:
            return x if x.dtype in (None, ir.DataType.FLOAT) else None
    return None

"""WatchProducts: a graph also says how far each product would be off with its weight in MXFP6."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker, copy_node
from QEfficient.transforms.onnx.mxfp6_weights import MXFP6Weights

OUTPUT = "products"


@dataclass(frozen=True)
class WatchProducts(OnnxTransform):
    """Adds the output ``products`` float32 [2 n]: square sums, for each of n weights, of error and of result.

    Each product with a constant weight runs a second time on the same input, with what MXFP6 keeps of the weight; the
    difference is the error, which nothing else in the graph sees. The facts list the weights in the order of the output
    and their own relative errors. Run it on a graph of opset 17 (`LowerOpset`).
    """

    name: ClassVar[str] = "WatchProducts"
    changes_interface: ClassVar[bool] = True

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError for a weight that holds infinities or NaN."""
        graph = model.graph
        make = Maker(graph, "products")
        stored, errors = MXFP6Weights().store(graph, workspace)
        one = make.constant([1])
        sums: list[ir.Value] = []
        for weight, part in stored.values():
            totals: list[ir.Value] = []
            for node in weight.nodes:
                value = make.op("Cast", part, to=ir.DataType.FLOAT.value)
                other = make.add(copy_node(node, [node.inputs[0], value, *node.inputs[2:]], f"/{OUTPUT}"))
                error = make.op("Sub", other.outputs[0], node.outputs[0])
                found = [make.op("ReduceSumSquare", v, keepdims=0) for v in (error, node.outputs[0])]
                totals = [make.op("Add", a, b) for a, b in zip(totals, found, strict=True)] if totals else found
                graph.insert_after(node, make.take())
            sums += totals
        pairs = [make.op("Reshape", value, one) for value in sums]
        result = make.op("Concat", *pairs, axis=0)
        result.name, result.type, result.shape = OUTPUT, ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(pairs)])
        graph.extend(make.take())
        graph.outputs.append(result)
        return TransformResult(True, {"relative_error": errors})

"""WatchRanges: a graph also says how large each number it computes became."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker

OUTPUT = "ranges"


@dataclass(frozen=True)
class WatchRanges(OnnxTransform):
    """Adds the output ``ranges`` float32 [n]: the largest magnitude of each float32 value that a node computes.

    The facts list the nodes in the order of that output. Run it on a graph of opset 17 (`LowerOpset`); what graphs
    inside nodes compute is not watched.
    """

    name: ClassVar[str] = "WatchRanges"
    changes_interface: ClassVar[bool] = True

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        passes.ShapeInferencePass()(model)  # transforms leave values without a type
        graph = model.graph
        watched = [(node, v) for node in graph for v in node.outputs if v.dtype == ir.DataType.FLOAT]
        make = Maker(graph, "watched")
        one = make.constant([1])
        peaks = [
            make.op("Reshape", make.op("ReduceMax", make.op("Abs", value), keepdims=0), one) for _, value in watched
        ]
        result = make.op("Concat", *peaks, axis=0)
        result.name, result.type, result.shape = OUTPUT, ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(peaks)])
        graph.extend(make.take())
        graph.outputs.append(result)
        return TransformResult(True, {"nodes": [str(node.name) for node, _ in watched]})

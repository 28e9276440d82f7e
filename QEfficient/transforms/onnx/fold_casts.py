"""FoldCasts: casts of small weights happen once, when the package is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.onnx_io import store_tensors
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.quantizing import register

#: Elements of the largest weight that is stored anew: norms and biases, not matrices.
_MOST = 1 << 16


@dataclass(frozen=True)
class FoldCasts(OnnxTransform):
    """Stores small weights that are cast to float32 as float32, so that no step casts them again.

    The runtime folds them too, but each time it opens the package.
    """

    name: ClassVar[str] = "FoldCasts"

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        graph = model.graph
        found: dict[str, ir.Value] = {}
        for node in graph:
            source = node.inputs[0] if node.op_type == "Cast" and node.inputs else None
            if source is None or source.const_value is None or source.const_value.size > _MOST:
                continue
            if node.outputs[0].dtype == ir.DataType.FLOAT and not node.outputs[0].is_graph_output():
                found[f"{source.name}.float32"] = node.outputs[0]
        sources = {name: value.producer().inputs[0].const_value for name, value in found.items()}  # type: ignore[union-attr]
        arrays = {name: tensor.numpy().astype("float32") for name, tensor in sources.items() if tensor is not None}
        stored = store_tensors(arrays, workspace / "small.safetensors")
        for name, value in found.items():
            (part,) = register(graph, stored, [name])
            value.replace_all_uses_with(part)
        if found:
            passes.RemoveUnusedNodesPass()(model)
        return TransformResult(bool(found), {"casts": len(found)})

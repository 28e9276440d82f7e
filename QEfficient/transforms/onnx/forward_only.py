"""ForwardOnly: drops the gradients of a training step, so that evaluation runs no backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.errors import TransformError
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult


@dataclass(frozen=True)
class ForwardOnly(OnnxTransform):
    """Removes the outputs ``grad/*`` and every node only they needed. Inputs stay, used or not."""

    name: ClassVar[str] = "ForwardOnly"
    changes_interface: ClassVar[bool] = True

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError when the graph has no gradients."""
        outputs = model.graph.outputs
        kept = [value for value in outputs if not (value.name or "").startswith("grad/")]
        if len(kept) == len(outputs):
            raise TransformError("ForwardOnly: the graph has no outputs grad/*, it is not a training step.")
        before = len(model.graph)
        outputs.clear()
        outputs.extend(kept)
        passes.RemoveUnusedNodesPass()(model)
        return TransformResult(True, {"nodes_before": before, "nodes_after": len(model.graph)})

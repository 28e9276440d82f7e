"""StateOnly: a program that writes the state and returns nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.errors import TransformError
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult


@dataclass(frozen=True)
class StateOnly(OnnxTransform):
    """Drops ``logits`` and everything only they need: the head, and what the last layer does after its keys.

    All tokens of a prompt but the last can be fed to such a program; the last one goes to the whole program, which
    returns its logits.
    """

    name: ClassVar[str] = "StateOnly"
    changes_interface: ClassVar[bool] = True

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError for a graph without logits or without state."""
        outputs = model.graph.outputs
        logits = next((value for value in outputs if value.name == "logits"), None)
        if logits is None or len(outputs) < 2:
            raise TransformError("StateOnly needs a causal graph: one with an output named logits, and state.")
        before = len(model.graph)
        outputs.remove(logits)
        passes.RemoveUnusedNodesPass()(model)
        return TransformResult(True, {"nodes_removed": before - len(model.graph)})

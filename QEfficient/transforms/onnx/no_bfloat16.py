"""NoBfloat16: weights stored as bfloat16 become float16, for a target that has no bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from QEfficient.onnx_io import stream_tensors
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.fp16_clip import FP16_MAX


@dataclass(frozen=True)
class NoBfloat16(OnnxTransform):
    """Stores bfloat16 weights anew, one at a time, as the float16 the target computes with (or float32).

    Values beyond 65504 are clipped. The manifest says how many were, and how many became 0.

    Parameters:
        wide: store float32, which loses nothing and takes twice the room.
    """

    name: ClassVar[str] = "NoBfloat16"
    wide: bool = False

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        found = {
            str(name): value
            for name, value in model.graph.initializers.items()
            if value.const_value is not None and value.const_value.dtype == ir.DataType.BFLOAT16
        }
        dtype = ir.DataType.FLOAT if self.wide else ir.DataType.FLOAT16
        lost = {"clipped": 0, "became_zero": 0}

        def contents() -> Iterator[bytes]:
            for value in found.values():
                assert value.const_value is not None
                yield self._converted(value.const_value.numpy().astype(np.float32), lost)

        described = {name: (dtype, tuple(v.const_value.shape.numpy())) for name, v in found.items() if v.const_value}
        stored = stream_tensors(described, contents(), workspace / "without_bfloat16.safetensors")
        for name, value in found.items():
            value.const_value, value.type = stored[name], ir.TensorType(dtype)
        changed = bool(found)
        for node in model.graph.all_nodes():
            changed |= _without(node, dtype)
        return TransformResult(changed, {"weights": len(found), **lost})

    def _converted(self, array: np.ndarray, lost: dict[str, int]) -> bytes:
        if self.wide:
            return array.tobytes()
        lost["clipped"] += int((np.abs(array) > FP16_MAX).sum())
        small = np.clip(array, -FP16_MAX, FP16_MAX).astype(np.float16)
        lost["became_zero"] += int(((small == 0) & (array != 0)).sum())
        return small.tobytes()


def _without(node: ir.Node, dtype: ir.DataType) -> bool:
    """What a node computes in bfloat16 it computes in ``dtype``; whether it did."""
    changed = False
    target = node.attributes.get("to") if node.op_type == "Cast" else None
    if target is not None and target.as_int() == ir.DataType.BFLOAT16.value:
        node.attributes["to"] = ir.AttrInt64("to", dtype.value)
        changed = True
    for value in node.outputs:
        if value.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(dtype)
            changed = True
    return changed

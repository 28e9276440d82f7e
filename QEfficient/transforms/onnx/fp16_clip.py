"""FP16Clip: constants and weights beyond the range of float16 become its largest number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from QEfficient.errors import OptionError
from QEfficient.onnx_io import FileTensor, store_tensors
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult

FP16_MAX = float(np.finfo(np.float16).max)  # 65504
_FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BFLOAT16, ir.DataType.FLOAT16}


@dataclass(frozen=True)
class FP16Clip(OnnxTransform):
    """Clips every constant and weight to [-limit, limit], infinities included; NaN is left alone.

    What a target that computes in float16 would otherwise turn into infinity. Masks of -3.4e38 or -inf become -65504,
    which hides a position just as well. The manifest lists the weights that were clipped: each is a place where
    float16 loses information.

    Parameters:
        limit: largest magnitude kept.
    """

    name: ClassVar[str] = "FP16Clip"
    limit: float = FP16_MAX

    def __post_init__(self) -> None:
        if not (isinstance(self.limit, int | float) and math.isfinite(self.limit) and self.limit > 0):
            raise OptionError(f"FP16Clip's limit must be a finite number above 0, got {self.limit!r}.")
        object.__setattr__(self, "limit", float(self.limit))

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        clipped: list[str] = []
        from_files: dict[str, np.ndarray] = {}
        for graph in model.graphs():
            for name, value in graph.initializers.items():
                tensor = value.const_value
                array = self._clip(tensor) if tensor is not None else None
                if tensor is None or array is None:
                    continue
                clipped.append(str(name))
                if isinstance(tensor, FileTensor):
                    from_files[str(name)] = array
                else:
                    value.const_value = ir.tensor(array, dtype=tensor.dtype, name=str(name))
        for name, tensor in store_tensors(from_files, workspace / "fp16_clip.safetensors").items():
            model.graph.initializers[name].const_value = tensor
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.op_type in ("Constant", "ConstantOfShape") and node.domain == "":
                self._clip_constant(node, clipped)
        return TransformResult(bool(clipped), {"clipped": clipped})

    def _clip(self, tensor: ir.TensorProtocol) -> np.ndarray | None:
        """The clipped values, or None when nothing lies outside."""
        if tensor.dtype not in _FLOATS or tensor.size == 0:
            return None
        array = tensor.numpy()
        # In bfloat16 the number nearest to 65504 is 65536: the edge is the last one inside.
        edge = np.asarray(self.limit).astype(array.dtype)
        if float(edge) > self.limit:
            edge = np.nextafter(edge, np.zeros_like(edge))
        if not bool((np.abs(array) > edge).any()):
            return None
        return np.clip(array, -edge, edge).astype(array.dtype, copy=False)

    def _clip_constant(self, node: ir.Node, clipped: list[str]) -> None:
        for key, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR:
                array = self._clip(attribute.as_tensor())
                if array is not None:
                    node.attributes[key] = ir.AttrTensor(key, ir.tensor(array, dtype=attribute.as_tensor().dtype))
                    clipped.append(str(node.name))
            elif attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
                values = np.asarray(attribute.value, dtype=np.float64)
                if bool((np.abs(values) > self.limit).any()):
                    node.attributes[key] = ir.Attr(
                        key, attribute.type, np.clip(values, -self.limit, self.limit).tolist()
                    )
                    clipped.append(str(node.name))

"""MXFP6Weights: weights of products are what is left of them when a card stores them in MXFP6."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.errors import OptionError
from QEfficient.onnx_io import stream_tensors
from QEfficient.suggest import did_you_mean
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker
from QEfficient.transforms.onnx.microscaling import MXFP6_E2M3, MXFP6_E3M2, round_trip
from QEfficient.transforms.onnx.product_weights import ProductWeight, product_weights
from QEfficient.transforms.onnx.quantizing import as_bytes, map_floats, register

ELEMENTS = {kind.name: kind for kind in (MXFP6_E2M3, MXFP6_E3M2)}


@dataclass(frozen=True)
class MXFP6Weights(OnnxTransform):
    """Replaces constant second operands of ``MatMul`` and ``Gemm`` by what MXFP6 keeps of them, as float16.

    Blocks of 32 lie along the axis the product sums over. Tables that are gathered from, norms and biases stay, also
    where one stored tensor is both table and head. The facts give each weight's relative error: the length of the
    difference over the length of the weight.

    Parameters:
        element: ``e2m3``, which the Cloud AI compiler is documented to use, or ``e3m2``.
    """

    name: ClassVar[str] = "MXFP6Weights"
    element: str = MXFP6_E2M3.name

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise OptionError(
                f"MXFP6Weights' element must be one of {', '.join(ELEMENTS)}, got {self.element!r}."
                f"{did_you_mean(str(self.element), ELEMENTS)}"
            )

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError for a weight that holds infinities or NaN."""
        graph = model.graph
        make = Maker(graph, "mxfp6")
        stored, errors = self.store(graph, workspace)
        for weight, part in stored.values():
            value = make.op("Cast", part, to=(weight.value.dtype or ir.DataType.FLOAT).value, like=weight.value)
            graph.insert_before(weight.nodes[0], make.take())
            for node in weight.nodes:
                node.replace_input_with(1, value)
        passes.RemoveUnusedNodesPass()(model)
        return TransformResult(bool(stored), {"weights": len(stored), "relative_error": errors})

    def store(
        self, graph: ir.Graph, workspace: Path
    ) -> tuple[dict[str, tuple[ProductWeight, ir.Value]], dict[str, float]]:
        """Adds what MXFP6 keeps of each weight as an initializer; nothing reads it yet.

        Returns:
            Name -> the weight and its float16 replacement, and name -> relative error.

        Raises:
            TransformError: a weight holds infinities or NaN.
        """
        names: dict[str, ProductWeight] = {}
        for weight in product_weights(graph):
            name, number = str(weight.source.name), 1
            while name in names:
                number += 1
                name = f"{weight.source.name}.{number}"
            names[name] = weight
        errors: dict[str, float] = {}
        described = {f"{n}.mxfp6": (ir.DataType.FLOAT16, w.array().shape) for n, w in names.items()}
        stored = stream_tensors(described, self._contents(names, errors), workspace / "mxfp6.safetensors")
        parts = register(graph, stored, list(described))
        return {name: (weight, part) for (name, weight), part in zip(names.items(), parts, strict=True)}, errors

    def _contents(self, names: dict[str, ProductWeight], errors: dict[str, float]) -> Iterator[memoryview]:
        kind = ELEMENTS[self.element]

        def stored(rows: np.ndarray) -> tuple[np.ndarray, float, float]:
            kept = round_trip(rows, kind).astype(np.float16)
            lost = np.square(rows - kept.astype(np.float32), dtype=np.float64).sum()
            return kept, float(lost), float(np.square(rows, dtype=np.float64).sum())

        for name, weight in names.items():
            # One row per output: the elements of a block lie side by side, in whole rows.
            array = np.moveaxis(weight.array(), weight.axis, -1)
            parts = map_floats(stored, array.reshape(-1, array.shape[-1]), MXFP6Weights.name, name)
            kept, lost, size = zip(*parts, strict=True)
            errors[name] = math.sqrt(sum(lost) / (sum(size) or 1.0))
            yield as_bytes(np.moveaxis(np.concatenate(kept).reshape(array.shape), -1, weight.axis))

"""FuseNorms: an RMS norm spelled out in six or seven operators becomes one that reads its input once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.fusing import exchange, made_by, module_of, number, only_reader, other_operand, size_at
from QEfficient.transforms.onnx.graph import Maker

#: The first version of the standard operators with RMSNormalization.
_OPSET = 23
#: Norms that are no longer spelled out.
_WHOLE = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


@dataclass(frozen=True)
class FuseNorms(OnnxTransform):
    """``x / sqrt(mean(x²) + epsilon) * weight`` over the last axis becomes ``RMSNormalization``.

    In every form a model writes it: with a reciprocal, a quotient or a power of -1/2; operands in any order; any value
    with one number per column as weight, so also a weight that is cast, and Gemma's ``1 + weight``; without a weight.
    Weights are not touched: what the graph computes from them is read as it is.

    The sum of residual and update in front of a norm stays a node of its own. ONNX Runtime has operators that take it
    in, ``SkipLayerNormalization`` and ``SkipSimplifiedLayerNormalization``, but on the CPU they are scalar loops:
    slower than a vectorised sum and a vectorised norm one after the other. Its own optimizer joins an ``Add`` with the
    ``LayerNormalization`` that alone reads it; such an ``Add`` is written as ``Sum``, which is the same addition and is
    not joined.

    Contract: https://onnx.ai/onnx/operators/onnx__RMSNormalization.html; what is avoided:
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.SkipLayerNormalization
    """

    name: ClassVar[str] = "FuseNorms"
    version: ClassVar[int] = 2

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Facts: ``fused`` counts new operators, ``sums_kept_apart`` sums that would have been joined with a norm,
        ``left`` says of every norm that stays as it is why.
        """
        graph = model.graph
        make = Maker(graph, "norm")
        fused: Counter[str] = Counter()
        left: dict[str, str] = {}
        apart = 0
        opset = graph.opset_imports.get("", 0)
        for node in list(graph):
            if node.op_type in _WHOLE and not node.domain:
                left[module_of(node)] = f"{node.op_type} is one operator already"
                apart += node.op_type == "LayerNormalization" and _keep_apart(node, make)
            elif node.op_type == "ReduceMean" and not node.domain and _squared(node.inputs[0]) is not None:
                norm = _find(node) if opset >= _OPSET else f"RMSNormalization needs opset {_OPSET}, this is {opset}"
                if isinstance(norm, str):
                    left[module_of(node)] = norm
                else:
                    norm.install(make)
                    fused["RMSNormalization"] += 1
        if fused or apart:
            passes.RemoveUnusedNodesPass()(model)
        elif not left:
            left["graph"] = "it has no norm"
        facts = {"fused": dict(fused), "sums_kept_apart": apart, "left": left}
        return TransformResult(bool(fused or apart), facts)


@dataclass
class _Norm:
    """An RMS norm: the node that gives its result, its input, and what it multiplies by."""

    node: ir.Node
    x: ir.Value
    width: int
    epsilon: float
    weight: ir.Value | None

    def install(self, make: Maker) -> None:
        weight = self.weight
        if weight is None:
            weight = make.constant(np.ones(self.width), ir.DataType.FLOAT)
        new = make.op("RMSNormalization", self.x, weight, axis=-1, epsilon=self.epsilon)
        exchange(make, self.node, self.node.outputs[0], new)


def _keep_apart(norm: ir.Node, make: Maker) -> bool:
    """Writes the sum in front of a norm so that ONNX Runtime does not join the two."""
    sum_ = made_by(norm.inputs[0], "Add")
    if sum_ is None or only_reader(sum_.outputs[0], "LayerNormalization") is not norm:
        return False
    first, second = (value.shape if value is not None else None for value in sum_.inputs)
    if first is None or first != second or len(first) != 3:  # joined only with operands of one shape of rank 3
        return False
    exchange(make, sum_, sum_.outputs[0], make.op("Sum", *sum_.inputs))
    return True


def _find(mean: ir.Node) -> _Norm | str:
    """The norm around a mean of squares, or why there is none that the operator could compute."""
    x = _squared(mean.inputs[0])
    assert x is not None
    width = size_at(x, -1)
    if x.dtype is not ir.DataType.FLOAT or width is None:
        return f"it computes in {x.dtype}" if width is not None else "the size of its last axis is not known"
    if not _over_last_axis(mean, x):
        return "its mean is not over the last axis alone"
    sum_ = only_reader(mean.outputs[0], "Add")
    epsilon = number(other_operand(sum_, mean.outputs[0])) if sum_ is not None else None
    normalised = _divided(x, sum_) if sum_ is not None else None
    if epsilon is None or normalised is None:
        return "what follows its mean of squares is not x / sqrt(mean + epsilon), or is needed elsewhere, too"
    product = only_reader(normalised.outputs[0], "Mul")
    weight = other_operand(product, normalised.outputs[0]) if product is not None else None
    # A factor of another form (a gate, a rotation) is no weight of the norm.
    if product is None or weight is None or weight.shape is None or list(weight.shape) != [width]:
        return _Norm(normalised, x, width, epsilon, None)
    if weight.dtype is not ir.DataType.FLOAT:
        return f"its weight is {weight.dtype}"
    return _Norm(product, x, width, epsilon, weight)


def _divided(x: ir.Value, sum_: ir.Node) -> ir.Node | None:
    """The node that gives x / sqrt(sum), however it is written."""
    step = only_reader(sum_.outputs[0], "Sqrt", "Pow")
    if step is None or (step.op_type == "Pow" and number(step.inputs[1]) != -0.5):
        return None
    if step.op_type == "Sqrt":
        quotient = only_reader(step.outputs[0], "Div", "Reciprocal")
        if quotient is None:
            return None
        if quotient.op_type == "Div" and quotient.inputs[1] is step.outputs[0] and quotient.inputs[0] is x:
            return quotient
        if quotient.op_type == "Div" and number(quotient.inputs[0]) != 1:
            return None
        step = quotient
    product = only_reader(step.outputs[0], "Mul")
    return product if product is not None and other_operand(product, step.outputs[0]) is x else None


def _squared(value: ir.Value | None) -> ir.Value | None:
    """x, when ``value`` is x²."""
    power, product = made_by(value, "Pow"), made_by(value, "Mul")
    if power is not None and number(power.inputs[1]) == 2:
        return power.inputs[0]
    return product.inputs[0] if product is not None and product.inputs[0] is product.inputs[1] else None


def _over_last_axis(mean: ir.Node, x: ir.Value) -> bool:
    axes = ir.convenience.get_const_tensor(mean.inputs[1]) if len(mean.inputs) > 1 and mean.inputs[1] else None
    rank = len(x.shape) if x.shape is not None else 0
    kept = mean.attributes.get_int("keepdims", 1)
    return bool(kept) and axes is not None and axes.numpy().tolist() in ([-1], [rank - 1])

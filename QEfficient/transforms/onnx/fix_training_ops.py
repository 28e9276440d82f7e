"""FixTrainingOps: operators a target cannot compile are written with those it can."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.errors import OptionError, TransformError
from QEfficient.suggest import did_you_mean
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.fixes_index import INDEX_RULES
from QEfficient.transforms.onnx.fixes_math import MATH_RULES
from QEfficient.transforms.onnx.graph import Maker, graphs_in, swap

#: What any compiler for transformer inference takes; "host" takes everything.
BASIC = frozenset({
    "Abs", "Add", "And", "ArgMax", "Cast", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Cos",
    "DequantizeLinear", "Div", "Equal", "Erf", "Exp", "Expand", "Floor", "Gather", "Gemm", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mul", "Neg", "Not",
    "Or", "Pow", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape",
    "Shape", "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile",
    "TopK", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
PROFILES: dict[str, frozenset[str] | None] = {"basic": BASIC, "qaic": BASIC, "host": None}
RULES = INDEX_RULES | MATH_RULES
#: A rule may use an operator that another rule has to replace; chains are short.
_MAX_SWEEPS = 8


@dataclass(frozen=True)
class FixTrainingOps(OnnxTransform):
    """Rewrites every operator outside a profile into operators inside it; fails where it has no rule.

    A backward pass needs operators no inference graph has: scattered sums, element gathers, layer normalisation with
    its statistics. Each rule computes the same function; sums over duplicate indices may add up in another order.
    A scattered sum becomes a product with a one-hot matrix, in which an infinite update spreads to other rows as NaN.

    Parameters:
        profile: "basic" (what inference compilers take), "qaic" (the same for Cloud AI) or "host" (everything).
        unsupported: operators to replace although the profile has them, or with "host" the only ones; as one text
            they are separated by ``|``.
    """

    name: ClassVar[str] = "FixTrainingOps"
    profile: str = "basic"
    unsupported: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise OptionError(
                f"FixTrainingOps has the profiles {sorted(PROFILES)}, got {self.profile!r}."
                f"{did_you_mean(str(self.profile), PROFILES)}"
            )
        given = [n for n in self.unsupported.split("|") if n] if isinstance(self.unsupported, str) else self.unsupported
        for op_type in given:
            if not onnx.defs.has(op_type):
                known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
                raise OptionError(f"ONNX has no operator {op_type!r}.{did_you_mean(op_type, known)}")
        object.__setattr__(self, "unsupported", tuple(given))

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError naming the node and operator it has no rule for."""
        make = Maker(model.graph, "fixed")
        replaced: Counter[str] = Counter()
        for _ in range(_MAX_SWEEPS):
            wrong = [node for node in model.graph if not self.allows(node)]
            if not wrong:
                break
            for node in wrong:
                replaced[node.op_type] += 1
                _replace(model.graph, node, make, self.profile)
        passes.RemoveUnusedNodesPass()(model)
        for node in model.graph.all_nodes():
            if not self.allows(node):
                raise _no_rule(node, self.profile)
        return TransformResult(bool(replaced), {"replaced": dict(sorted(replaced.items()))})

    def allows(self, node: ir.Node) -> bool:
        """Whether the target takes a node as it is."""
        if node.op_type in self.unsupported:
            return False
        ops = PROFILES[self.profile]
        return ops is None or (node.domain == "" and node.op_type in ops)


def _replace(graph: ir.Graph, node: ir.Node, make: Maker, profile: str) -> None:
    rule = RULES.get(node.op_type) if node.domain == "" else None
    if rule is None or graphs_in(node):
        raise _no_rule(node, profile)
    swap(graph, node, rule(make, node), make)


def _no_rule(node: ir.Node, profile: str) -> TransformError:
    domain = f"{node.domain}." if node.domain else ""
    return TransformError(
        f"FixTrainingOps has no rule for {domain}{node.op_type} (node {node.name}), which the profile {profile} lacks."
    )

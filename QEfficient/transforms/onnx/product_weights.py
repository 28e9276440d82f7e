"""Which constants are weights of matrix products: what a card stores compressed when it compresses weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

#: Operators that hand a constant on to a product as the same constant.
HANDS_ON = ("Cast", "Transpose", "Reshape", "Identity", "Unsqueeze")


@dataclass
class ProductWeight:
    """A constant second operand of products.

    Attributes:
        source: the initializer it comes from.
        value: the operand itself, of which `array` is the content.
        axis: the axis products sum over.
        nodes: the products that read it.
    """

    source: ir.Value
    value: ir.Value
    axis: int
    steps: list[ir.Node] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)

    def array(self) -> np.ndarray:
        """The operand in the stored type: casts between float types are left out, and nothing is copied if possible."""
        tensor = self.source.const_value
        assert tensor is not None
        array = tensor.numpy()
        for node in self.steps:
            array = _moved(node, array)
        return array


def product_weights(graph: ir.Graph) -> list[ProductWeight]:
    """Initializers that reach the second operand of a ``MatMul`` or ``Gemm`` as constants of two dimensions or more.

    A weight that is read in two forms is listed twice; a table that is also gathered from keeps its other readers.
    """
    found: dict[tuple[ir.Value, int], ProductWeight] = {}
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm") or node.domain != "":
            continue
        operand = node.inputs[1]
        turned = bool(node.attributes.get_int("transB", 0))  # MatMul has no such attribute
        axis = -1 if turned else -2
        if operand is None:
            continue
        if (operand, axis) not in found:
            weight = _traced(operand, axis)
            if weight is None:
                continue
            found[operand, axis] = weight
        found[operand, axis].nodes.append(node)
    return list(found.values())


def _traced(operand: ir.Value, axis: int) -> ProductWeight | None:
    steps: list[ir.Node] = []
    value: ir.Value | None = operand
    while value is not None and (maker := value.producer()) is not None and maker.op_type in HANDS_ON:
        steps.insert(0, maker)
        value = maker.inputs[0]
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    if not value.const_value.dtype.is_floating_point() or len(value.const_value.shape) < 2:
        return None
    return ProductWeight(value, operand, axis, steps)


def _moved(node: ir.Node, array: np.ndarray) -> np.ndarray:
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", [])
        return np.transpose(array, order or None)
    if node.op_type in ("Reshape", "Unsqueeze"):
        given = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
        if given is None:
            raise ValueError(f"{node.name}: the second input of a {node.op_type} of a weight is not constant")
        numbers = [int(n) for n in given.numpy().reshape(-1)]
        if node.op_type == "Unsqueeze":
            return np.expand_dims(array, tuple(numbers))
        return array.reshape([array.shape[i] if n == 0 else n for i, n in enumerate(numbers)])
    return array

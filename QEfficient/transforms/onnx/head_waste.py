"""Passes over the vocabulary's width that the gradient of a token loss does not need."""

from __future__ import annotations

import onnx_ir as ir

from QEfficient.transforms.onnx.graph import Maker


def remove_head_waste(graph: ir.Graph) -> int:
    """Applies the two rewrites below wherever they fit; returns how many matrices of that width are no longer made.

    * ``exp(x - logsumexp(x))`` becomes ``exp(x - max) / sum``, whose exponentials the loss has computed already.
    * ``scatter(zeros, labels, u) + y`` becomes ``scatter(y, labels, u)``.
    """
    make = Maker(graph, "head")
    removed = 0
    for node in list(graph):
        if node.op_type == "Mul":
            removed += 2 * _share_exponentials(graph, node, make)
    for node in list(graph):
        if node.op_type == "Add":
            removed += 2 * _scatter_in_place(graph, node, make)
    return removed


def _share_exponentials(graph: ir.Graph, node: ir.Node, make: Maker) -> bool:
    """``w * exp(x - c)`` with c = log(sum(exp(x - m))) + m."""
    for place in (0, 1):
        found = _softmax_parts(node.inputs[place])
        weight = node.inputs[1 - place]
        if found is None or weight is None or weight.shape is None or not _is_column(weight):
            continue
        powers, total = found
        column = make.op("Unsqueeze", total, make.constant([-1]), like=weight)
        scaled = make.op("Div", weight, column, like=weight)
        replacement = make.op("Mul", powers, scaled, like=node.outputs[0])
        _replace(graph, node, replacement, make)
        return True
    return False


def _softmax_parts(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """``exp(x - logsumexp(x))`` -> the exponentials of the logsumexp and their sum over the last axis."""
    difference = _made_by(_input(_made_by(value, "Exp"), 0), "Sub")
    normaliser = _made_by(_input(_made_by(_input(difference, 1), "Unsqueeze"), 0), "Add")
    if difference is None or normaliser is None:
        return None
    for place in (0, 1):
        total = _input(_made_by(normaliser.inputs[place], "Log"), 0)
        reduced = _made_by(total, "ReduceSum")
        powers = _input(reduced, 0)
        shifted = _made_by(_input(_made_by(powers, "Exp"), 0), "Sub")
        if total is None or reduced is None or powers is None or shifted is None:
            continue
        axes = reduced.inputs[1].const_value if len(reduced.inputs) > 1 and reduced.inputs[1] is not None else None
        keep = reduced.attributes.get("keepdims")
        last = axes is not None and axes.numpy().tolist() == [-1] and keep is not None and keep.as_int() == 0
        # What is subtracted from the logits must be what is added to the logarithm.
        same = _without_views(shifted.inputs[1]) is _without_views(normaliser.inputs[1 - place])
        if last and same and shifted.inputs[0] is difference.inputs[0]:
            return powers, total
    return None


def _scatter_in_place(graph: ir.Graph, node: ir.Node, make: Maker) -> bool:
    for place in (0, 1):
        scatter, other = _made_by(node.inputs[place], "ScatterElements"), node.inputs[1 - place]
        zeros = _made_by(_input(scatter, 0), "Expand")
        fill = _input(zeros, 0)
        if scatter is None or other is None or fill is None or fill.const_value is None:
            continue
        reduction = scatter.attributes.get("reduction")
        equal = other.shape is not None and other.shape == scatter.outputs[0].shape
        alone = len(scatter.outputs[0].uses()) == 1 and not scatter.outputs[0].is_graph_output()
        adds = reduction is not None and reduction.as_string() == "add"
        if adds and equal and alone and not fill.const_value.numpy().any():
            axis = scatter.attributes["axis"].as_int()
            result = make.op(
                "ScatterElements", other, *scatter.inputs[1:], axis=axis, reduction="add", like=node.outputs[0]
            )
            _replace(graph, node, result, make)
            return True
    return False


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value, make: Maker) -> None:
    graph.insert_before(node, make.take())
    node.outputs[0].replace_all_uses_with(value)


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _input(node: ir.Node | None, place: int) -> ir.Value | None:
    return node.inputs[place] if node is not None else None


def _without_views(value: ir.Value | None) -> ir.Value | None:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Squeeze", "Unsqueeze", "Reshape"):
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return value


def _is_column(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 2 and value.shape[1] == 1

"""Which nodes normalise: their squares are the first to leave the range of float16."""

from __future__ import annotations

import onnx_ir as ir


def normalisation_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Nodes of normalisations, in their order: one operator, or square, mean, epsilon, root and reciprocal."""
    found: list[ir.Node] = []
    for node in graph:
        if node.op_type in ("LayerNormalization", "InstanceNormalization"):
            found.append(node)
        if node.op_type != "ReduceMean":
            continue
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        squares = before is not None and (
            before.op_type == "Pow" or (before.op_type == "Mul" and before.inputs[0] is before.inputs[1])
        )
        if before is None or not squares:
            continue
        chain = [before, node]
        for wanted in ("Add", "Sqrt", "Reciprocal"):
            following = [use.node for use in chain[-1].outputs[0].uses() if use.node.op_type == wanted]
            chain += following[:1]
        found += chain
    return found

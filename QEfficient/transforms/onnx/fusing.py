"""What the fusions share: following values through a graph, the module a node comes from, exchanging results."""

from __future__ import annotations

import ast

import onnx_ir as ir

from QEfficient.transforms.onnx.graph import Maker

#: The modules around a node, outermost first, then the operation traced; written by torch's exporter.
SCOPES = "pkg.torch.onnx.name_scopes"


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The standard operator ``op_type`` that computes ``value``, if one does."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def only_reader(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The one node that needs ``value``, if it is one of these standard operators in the same graph."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    (use,) = uses
    node, producer = use.node, value.producer()
    same = producer is None or node.graph is producer.graph
    return node if same and node.domain == "" and node.op_type in op_types else None


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """What a node with two operands, one of them ``value``, combines it with; ``value`` itself for ``x * x``."""
    first, second = node.inputs
    return second if first is value else first


def number(value: ir.Value | None) -> float | None:
    """The content of a constant with one element."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def size_at(value: ir.Value | None, axis: int) -> int | None:
    """The size of an axis, where the graph gives a number."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def module_of(node: ir.Node) -> str:
    """The innermost module a node comes from (``model.layers.3.input_layernorm``), else the node's own name."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    except (ValueError, SyntaxError):
        scopes = []
    modules = [str(scope) for scope in scopes[:-1] if scope] if isinstance(scopes, list) else []
    return modules[-1] if modules else str(node.name or node.outputs[0].name)


def exchange(make: Maker, place: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Puts the nodes just made before ``place``, and lets every reader of ``old`` read ``new``, its equal."""
    nodes = make.take()
    for node in nodes:
        if SCOPES in place.metadata_props:
            node.metadata_props[SCOPES] = place.metadata_props[SCOPES]
    new.type, new.shape = old.type, old.shape
    make.graph.insert_before(place, nodes)
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}/replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)

"""Exact rewrites of a training graph that save passes over memory: scalings shrink, sums join products."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes

_PRODUCTS = ("Gemm", "MatMul")


def fuse(model: ir.Model) -> dict[str, int]:
    """Applies the rewrites below; returns how often each one did something.

    * ``(h B) * s`` becomes ``(h * s) B``, and ``(g * s)`` read only by products becomes ``s`` times their results, when
      ``s`` is a scalar and the tensor it moves to is smaller: LoRA's scaling then touches rank-sized tensors only.
    * ``x + a b`` becomes one ``Gemm`` with ``C = x``: no separate pass for LoRA's sum and for the sums of gradients
      that flow into one activation.

    Up to the order of rounding the function is unchanged.
    """
    graph = model.graph
    counts = {"scales_before": 0, "scales_after": 0, "sums": 0}
    for node in list(graph):
        if node.op_type == "Mul":
            counts["scales_before"] += _scale_operand(graph, node)
    for node in list(graph):
        if node.op_type == "Mul":
            counts["scales_after"] += _scale_results(graph, node)
    passes.RemoveUnusedNodesPass()(model)
    for node in list(graph):
        if node.op_type == "Add":
            counts["sums"] += _sum_in_product(graph, node)
    passes.RemoveUnusedNodesPass()(model)
    return counts


def _scalar_and_tensor(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    first, second = node.inputs
    for scalar, tensor in ((first, second), (second, first)):
        if scalar is None or tensor is None:
            return None
        if scalar.shape is not None and len(scalar.shape) == 0 and tensor.shape is not None and len(tensor.shape) > 0:
            return scalar, tensor
    return None


def _scale_operand(graph: ir.Graph, node: ir.Node) -> bool:
    """Forward: the scaled result of a product -> a product of a scaled, smaller operand."""
    found = _scalar_and_tensor(node)
    if found is None:
        return False
    scalar, tensor = found
    product = _behind_views(tensor)
    if product is None or len(product.inputs) > 2 or not _only_reader(tensor, node):
        return False
    small = product.inputs[0]
    width, result = _last(small), _last(product.outputs[0])
    if small is None or width is None or result is None or width >= result:
        return False
    if product.attributes.get_int("transA", 0):
        return False
    scaled = _new(graph, product, "Mul", [small, scalar], small)
    product.replace_input_with(0, scaled)
    node.outputs[0].replace_all_uses_with(tensor, replace_graph_outputs=True)
    return True


def _scale_results(graph: ir.Graph, node: ir.Node) -> bool:
    """Backward: a scaled gradient that only products read -> the gradient itself, and scaled, smaller results."""
    found = _scalar_and_tensor(node)
    if found is None:
        return False
    scalar, tensor = found
    readers = _readers(node.outputs[0])
    if not readers or any(
        reader.op_type not in _PRODUCTS or len(reader.inputs) > 2 or not _shrinks(reader, tensor) for reader in readers
    ):
        return False
    node.outputs[0].replace_all_uses_with(tensor)
    for reader in dict.fromkeys(readers):
        out = reader.outputs[0]
        users = list(out.uses())
        scaled = ir.node("Mul", [out, scalar], name=f"{reader.name}/scaled")
        result = scaled.outputs[0]
        result.name, result.shape, result.type = f"{out.name}_scaled", out.shape, out.type
        is_output = out.is_graph_output()
        graph.insert_after(reader, scaled)
        for user, place in users:
            user.replace_input_with(place, result)
        if is_output:
            _swap_output(graph, out, result)
    return True


def _shrinks(product: ir.Node, tensor: ir.Value) -> bool:
    """Whether a product's result has a fixed dimension much smaller than the tensor's last."""
    width = _last(tensor)
    shape = product.outputs[0].shape
    if width is None or shape is None:
        return False
    fixed = [d for d in shape if isinstance(d, int)]
    return bool(fixed) and min(fixed) * 4 <= width


def _sum_in_product(graph: ir.Graph, node: ir.Node) -> bool:
    first, second = node.inputs
    if first is None or second is None or first is second:
        return False
    for other, tensor in ((first, second), (second, first)):
        product = _behind_views(tensor)
        if product is None or len(product.inputs) > 2 or not _only_reader(tensor, node):
            continue
        addend = _as_matrix(other, product.outputs[0])
        # The product is read here only, so the other summand cannot depend on it.
        if addend is None:
            continue
        attributes = {name: product.attributes.get_int(name, 0) for name in ("transA", "transB")}
        fused = ir.node(
            "Gemm", [*product.inputs, addend], {k: v for k, v in attributes.items() if v}, name=f"{product.name}/sum"
        )
        out, old = fused.outputs[0], product.outputs[0]
        out.name, out.shape, out.type = f"{old.name}_sum", old.shape, old.type
        graph.insert_before(node, fused)
        view = tensor.producer()
        if view is product:
            result = out
        else:  # the views between the product and the sum, over the sum now
            assert view is not None
            shaped = ir.node("Reshape", [out, view.inputs[1]], name=f"{view.name}/sum")
            result = shaped.outputs[0]
            result.name, result.shape, result.type = f"{tensor.name}_sum", tensor.shape, tensor.type
            graph.insert_before(node, shaped)
        total = node.outputs[0]
        if total.is_graph_output():
            _swap_output(graph, total, result)
        total.replace_all_uses_with(result)
        return True
    return False


def _behind_views(value: ir.Value) -> ir.Node | None:
    """The product a value is a view of, when nothing else reads what lies between."""
    node = value.producer()
    if node is not None and node.op_type == "Reshape":
        inner = node.inputs[0]
        if inner is None or not _only_reader(inner, node):
            return None
        node = inner.producer()
    if node is None or node.op_type not in _PRODUCTS:
        return None
    shape = node.outputs[0].shape
    return node if shape is not None and len(shape) == 2 else None


def _as_matrix(value: ir.Value, like: ir.Value) -> ir.Value | None:
    """The 2-D tensor a value is a view of, when it has the shape of ``like``."""
    node = value.producer()
    if node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        value = node.inputs[0]
    return value if _same_shape(value, like) else None


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return [str(d) for d in a.shape] == [str(d) for d in b.shape]


def _readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, looking through Reshape and through Transpose of a matrix."""
    if value.is_graph_output():
        return []
    found = []
    for node, _ in value.uses():
        if node.op_type == "Reshape":
            inner = _readers(node.outputs[0])
            if not inner:
                return []
            found += inner
        else:
            found.append(node)
    return found


def _only_reader(value: ir.Value, node: ir.Node) -> bool:
    uses = list(value.uses())
    return len(uses) == 1 and uses[0][0] is node and not value.is_graph_output()


def _last(value: ir.Value | None) -> int | None:
    if value is None or value.shape is None or not len(value.shape):
        return None
    dim = value.shape[-1]
    return dim if isinstance(dim, int) else None


def _new(graph: ir.Graph, before: ir.Node, op_type: str, inputs: list[ir.Value], like: ir.Value) -> ir.Value:
    node = ir.node(op_type, inputs, name=f"{before.name}/{op_type.lower()}")
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{like.name}_{op_type.lower()}_{before.name}", like.shape, like.type
    graph.insert_before(before, node)
    return out


def _swap_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    place = next(i for i, value in enumerate(graph.outputs) if value is old)
    new.name, old.name = old.name, f"{old.name}_before"
    graph.outputs[place] = new

"""Names a person can read: tensors as the checkpoint calls them, dimensions by meaning."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

#: The attribute under which the traced wrappers hold the model.
WRAPPER_PREFIX = "model."


def name_initializers(model: ir.Model, rename: Callable[[str], str] | None = None) -> None:
    """Drops the wrapper's prefix: ``model.model.layers.0...`` becomes ``model.layers.0...``.

    Args:
        rename: changes what is left of the names of the model's own tensors.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        short = name.removeprefix(WRAPPER_PREFIX)
        if rename is not None and short != name:
            short = rename(short)
        if short != name and short not in graph.initializers:
            graph.initializers.pop(name)
            value.name = short
            if value.const_value is not None:
                value.const_value.name = short
            graph.register_initializer(value)


def name_dimensions(model: ir.Model, shapes: dict[str, tuple[int | str | None, ...]]) -> None:
    """Gives the exporter's symbols (``s28``) the names in ``shapes``: input name -> one entry per dimension."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for dim, name in zip(value.shape or (), shapes.get(value.name or "", ()), strict=False):
            symbol = getattr(dim, "value", None)
            if isinstance(name, str) and isinstance(symbol, str):
                names.setdefault(symbol, name)
    values = [*model.graph.inputs, *model.graph.outputs]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        values.extend(node.outputs)
    seen: set[int] = set()
    for value in values:
        if id(value) in seen or value.shape is None:
            continue
        seen.add(id(value))
        new = [ir.SymbolicDim(names[s]) if (s := _symbol(d)) in names and s is not None else d for d in value.shape]
        value.shape = ir.Shape(new)


def _symbol(dim: object) -> str | None:
    value = getattr(dim, "value", None)
    return value if isinstance(value, str) else None

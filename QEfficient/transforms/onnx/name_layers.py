"""NameLayers: nodes are named after the module they come from, so that tools can tell the layers apart."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import layer_of

#: Where torch's exporter notes the modules a node comes from, outermost first.
_SCOPES = "pkg.torch.onnx.name_scopes"
_STATE = re.compile(r"^past_\w+\.(\d+)$|^\w+_state\.(\d+)(\.\d+)?$")


@dataclass(frozen=True)
class NameLayers(OnnxTransform):
    """Names every node ``/model/layers.3/self_attn/MatMul_41``: the path of its module, its operator, its place.

    A node without a module of its own (a transform made it) is of the layer of the weights and states it reads, or of
    the latest layer among the nodes it reads from.
    """

    name: ClassVar[str] = "NameLayers"

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        paths: dict[ir.Node, str] = {}
        for number, node in enumerate(model.graph):
            path = _module(node)
            read = [p for p in (paths[n] for n in _makers(node)) if layer_number(p) is not None]
            latest = max(read, key=lambda p: layer_number(p) or 0, default="")
            own = layer_number(path)
            # No node of an earlier layer can need a later one: what a transform moved goes with what it reads.
            if not path or (own is not None and own < (layer_number(latest) or 0)):
                path = _of_layer(latest)
            paths[node] = path
            node.name = f"{path}/{node.op_type}_{number}"
        layers = {layer_number(path) for path in paths.values()} - {None}
        return TransformResult(True, {"layers": len(layers)})


def layer_number(name: str) -> int | None:
    """The layer in a node's name: of its first path component ``layers.<n>``, ``h.<n>`` or ``layer_<n>``."""
    for part in name.split("/"):
        found = re.fullmatch(r"(?:layers\.|h\.|layer_)(\d+)", part)
        if found is not None:
            return int(found[1])
    return None


def _makers(node: ir.Node) -> list[ir.Node]:
    return [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]


def _of_layer(path: str) -> str:
    """``/model/layers.3/self_attn`` -> ``/model/layers.3``."""
    parts = path.split("/")
    place = next((i for i, part in enumerate(parts) if layer_number(part) is not None), None)
    return "/".join(parts[: place + 1]) if place is not None else ""


def _module(node: ir.Node) -> str:
    """The path of the module a node comes from, or of the weight or state it reads; empty when there is none."""
    scopes = node.metadata_props.get(_SCOPES)
    if scopes:
        try:
            names = [str(part) for part in ast.literal_eval(scopes)]
        except (ValueError, SyntaxError):
            names = []
        # The last entry is the operation itself; each module's name repeats those around it.
        modules = [name for name in names[:-1] if name and not name.startswith("_empty")]
        if modules:
            return "/" + _path(modules[-1])
    if node.op_type in ("Shape", "Size"):
        return ""  # any layer's state has this size, and positions and masks of all layers come of it
    for value in node.inputs:
        if value is None:
            continue
        state = _STATE.match(str(value.name))
        if value.is_graph_input() and state is not None:
            return f"/layers.{state[1] or state[2]}"
        layer = layer_of(str(value.name)) if value.is_initializer() or value.is_graph_input() else None
        if layer is not None:
            return "/" + _path(layer)
    return ""


def _path(module: str) -> str:
    """``model.model.layers.3.self_attn`` -> ``model/layers.3/self_attn``: a number stays with the name before it."""
    out: list[str] = []
    for part in module.removeprefix("model.").split("."):
        if part.isdigit() and out:
            name = out.pop()
            # Whatever the family calls its layers, tools look for layers, h or layer_.
            out.append(
                f"{name if name in ('layers', 'h') else 'layers'}.{part}" if _is_stack(name) else f"{name}.{part}"
            )
        else:
            out.append(part)
    return "/".join(out)


def _is_stack(name: str) -> bool:
    return name in ("layers", "h", "layer", "blocks", "block", "transformer_blocks")

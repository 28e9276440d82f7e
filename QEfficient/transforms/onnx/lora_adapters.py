"""LoraAdapters: weights that change between calls (adapters, trained tensors) become graph inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from QEfficient.errors import OptionError, TransformError
from QEfficient.suggest import did_you_mean
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult

#: What PEFT's LoRA layers are made of, and the vector that scales them.
LORA_NAMES = ("*.lora_A.*", "*.lora_B.*", "lora_scaling")


@dataclass(frozen=True)
class LoraAdapters(OnnxTransform):
    """Turns initializers into inputs of the same name, dtype and shape, so that one graph serves any adapter.

    Every reader of the initializer reads the input afterwards, subgraphs (``If``, ``Loop``, ``Scan``) included. The
    new inputs come last, in the order of the names here and of the graph within a pattern. Values are not kept: whoever
    runs the graph feeds them. A package holds them as `Manifest.parameters`.

    Parameters:
        names: initializer names, or patterns with ``*``, ``?`` and ``[…]``, each of which must match something. As
            one text they are separated by ``|``.
    """

    name: ClassVar[str] = "LoraAdapters"
    changes_interface: ClassVar[bool] = True
    names: str | tuple[str, ...] = LORA_NAMES

    def __post_init__(self) -> None:
        given = self.names.split("|") if isinstance(self.names, str) else self.names
        if not isinstance(given, tuple | list) or not given or not all(isinstance(n, str) and n for n in given):
            raise OptionError(f"LoraAdapters takes names or patterns of initializers, got {self.names!r}.")
        object.__setattr__(self, "names", tuple(given))

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError, before it changes anything, when a name or pattern matches no initializer."""
        places = {str(value.name): graph for graph in _graphs(model) for value in graph.initializers.values()}
        lifted: dict[str, None] = {}
        for pattern in self.names:
            found = [pattern] if pattern in places else [name for name in places if fnmatchcase(name, pattern)]
            if not found:
                raise TransformError(
                    f"LoraAdapters: {pattern!r} matches none of the graph's {len(places)} initializers."
                    f"{did_you_mean(pattern.strip('*'), places) or _examples(places)}"
                )
            lifted |= dict.fromkeys(found)
        for name in lifted:
            _lift(places[name], name, model.graph)
        return TransformResult(True, {"inputs": list(lifted)})


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph and every graph inside it that may hold initializers of its own."""
    seen: set[int] = set()
    for graph in (model.graph, *model.graph.subgraphs()):
        if id(graph) not in seen:
            seen.add(id(graph))
            yield graph


def _examples(names: Iterable[str]) -> str:
    shown = list(names)[:3]
    return f" It has, for example, {', '.join(shown)}." if shown else ""


def _lift(place: ir.Graph, name: str, graph: ir.Graph) -> None:
    value = place.initializers.pop(name)
    tensor = value.const_value
    if tensor is not None:
        # An initializer may carry its type in the tensor only; an input must say it itself.
        value.type = value.type or ir.TensorType(tensor.dtype)
        value.shape = value.shape or ir.Shape(tensor.shape.numpy())
    value.const_value = None
    if not value.is_graph_input():  # an initializer may also be the default of an input
        graph.inputs.append(value)

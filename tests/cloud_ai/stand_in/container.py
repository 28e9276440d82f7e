"""The stand-in's ``programqpc.bin``: no program, only where its graph is and what was compiled for which sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stand_in.errors import Refused, need
from stand_in.graph import Graph

MARK = b"QEFFICIENT-STAND-IN"
#: Numbers of the vendor's types (contract, e.1).
TYPES = {"float32": 0, "float16": 1, "int32": 6, "int64": 7, "int8": 8, "bool": 8, "bfloat16": 11}
#: MXINT8 has no public number, and no public layout on the host.
MXINT8 = 200
_PRECISIONS = {"float": 0, "float16": 1, "bfloat16": 11, "mxint8": MXINT8}


@dataclass(frozen=True)
class Io:
    """An input or output: the graph's dtype, the vendor's type, the shape in each specialization."""

    name: str
    dtype: str
    type: int
    output: bool
    shapes: list[list[int]]


@dataclass(frozen=True)
class Container:
    """What the stand-in's runtime needs."""

    model: str
    digest: str
    devices: int
    io: list[Io]
    states: dict[str, str]


def describe(
    graph: Graph, entries: Sequence[Mapping[str, int]], precision: Mapping[str, str], devices: int, place: Path
) -> Container:
    """Runs the graph at each specialization's sizes for the shapes of its outputs; Refused when it cannot."""
    results = [graph.run(sizes) for sizes in entries]
    io = []
    for name, kind in graph.inputs.items():
        shapes = [[sizes[d.dim_param] if d.dim_param else d.dim_value for d in kind.shape.dim] for sizes in entries]
        io.append(_io(graph, name, precision, False, shapes))
    for value in graph.model.graph.output:
        io.append(_io(graph, value.name, precision, True, [list(shapes[value.name]) for shapes in results]))
    path = graph.path.resolve()
    return Container(str(path.relative_to(place.resolve().parent)), _digest(path), devices, io, dict(graph.states))


def _io(graph: Graph, name: str, precision: Mapping[str, str], output: bool, shapes: list[list[int]]) -> Io:
    dtype = graph.types[name]
    kind = _PRECISIONS[precision[name]] if name in precision else TYPES[dtype]
    return Io(name, dtype, kind, output, shapes)


def write(container: Container, path: Path) -> None:
    path.write_bytes(MARK + b"\n" + json.dumps(asdict(container)).encode())


def read(path: Path) -> tuple[Container, Path]:
    """The container and its graph.

    Raises:
        Refused: not a stand-in's, damaged, or its graph is another one now.
    """
    try:
        content = path.read_bytes()
    except OSError:
        raise Refused(f"Unable to open {path}") from None
    need(content.startswith(MARK + b"\n"), f"{path} was not made by the stand-in's compiler")
    try:
        body = json.loads(content[len(MARK) :])
        container = Container(**{**body, "io": [Io(**entry) for entry in body["io"]]})
    except (ValueError, TypeError, KeyError):
        raise Refused(f"{path} is damaged") from None
    model = path.parent.parent / container.model
    need(model.is_file() and _digest(model) == container.digest, f"{model} is not what {path} was made of")
    return container, model


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

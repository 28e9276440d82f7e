"""The package manifest: what `manifest.json` holds, how it is read, and what makes it trustworthy."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from QEfficient.errors import PackageError

FORMAT = "qefficient-package"
#: 2: specializations may have a program of their own and run by row.
FORMAT_VERSION = 2
FILE_NAME = "manifest.json"

#: The symbol of a compute context length: a step reads that many slots of the KV state instead of all.
WINDOW = "comp_ctx_lengths"

#: A dimension of a tensor: a fixed size or the name of a symbol.
Dim = int | str


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and shape (ints or symbol names) of a program input or output."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class StateSpec:
    """A retained state: program input ``input`` is replaced by program output ``output`` after each step.

    ``kind`` is ``kv`` (positions along ``ctx_len``), ``conv`` or ``recurrent``. ``in_place`` says that the program
    writes the output into the input's own buffer when both are bound to the same memory.
    """

    input: str
    output: str
    dtype: str
    shape: tuple[Dim, ...]
    kind: str
    in_place: bool = False


@dataclass(frozen=True)
class DimRange:
    """Values a symbolic dimension may take in a specialization; ``maximum=None`` means unbounded.

    ``minimum == maximum`` is an exact value: what a fixed-shape target compiles.
    """

    minimum: int
    maximum: int | None

    @classmethod
    def exactly(cls, value: int) -> DimRange:
        return cls(value, value)

    @property
    def exact(self) -> int | None:
        """The single value of an exact range, else None."""
        return self.maximum if self.minimum == self.maximum else None

    def accepts(self, value: int) -> bool:
        return value >= self.minimum and (self.maximum is None or value <= self.maximum)

    def pad_to(self, value: int) -> int | None:
        """The smallest size this dimension can have that holds ``value``; None when none does."""
        if self.maximum is not None and value > self.maximum:
            return None
        return max(value, self.minimum)

    def __str__(self) -> str:
        if self.exact is not None:
            return str(self.exact)
        return f"{self.minimum}..{'any' if self.maximum is None else self.maximum}"


@dataclass(frozen=True)
class Specialization:
    """A named set of dimension values, chosen at compile time.

    Attributes:
        program: file of a program of its own; the package's program when empty.
        by_row: a batch of one for a state of many rows, each prompt on the row it belongs to.
    """

    name: str
    symbols: dict[str, DimRange]
    program: str = ""
    by_row: bool = False

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.symbols.items())})"


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and BLAKE3 digest (hex) of a package file."""

    size: int
    blake3: str


@dataclass(frozen=True)
class Manifest:
    """Everything needed to run a package without asking where it came from."""

    target: str
    task: str
    model: dict[str, Any]
    program: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    specializations: tuple[Specialization, ...]
    options: dict[str, Any]
    transforms: list[dict[str, Any]]
    libraries: dict[str, str]
    #: Inputs a session holds between steps (adapter tensors, trained tensors) until they are set anew.
    parameters: tuple[TensorSpec, ...] = ()
    #: How the target's runtime should be set up for this program; only that target reads it.
    runtime: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    stand_in: bool = False
    files: dict[str, FileRecord] = field(default_factory=dict)

    def specialization(self, name: str) -> Specialization:
        """The specialization called ``name``; KeyError when the package has none of that name."""
        for spec in self.specializations:
            if spec.name == name:
                return spec
        raise KeyError(f"no specialization {name!r}; this package has {[s.name for s in self.specializations]}")

    def steps(self, kind: str) -> tuple[Specialization, ...]:
        """Specializations of a kind: the one called so, or ``<kind>_0``, ``<kind>_1``, …; KeyError without any."""
        numbered = re.compile(rf"{re.escape(kind)}(_\d+)?")
        found = tuple(spec for spec in self.specializations if numbered.fullmatch(spec.name))
        return found or (self.specialization(kind),)

    def replace(self, **changes: Any) -> Manifest:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict, with format, version and a digest over everything else."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        body["digest"] = _digest(body)
        return body

    def save(self, directory: Path) -> Path:
        path = directory / FILE_NAME
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Reads and checks the manifest of a package directory.

        Raises:
            PackageError: no manifest, not one of ours, a newer format, or its own digest does not match.
        """
        path = Path(directory) / FILE_NAME
        if not Path(directory).is_dir():
            raise PackageError(f"{directory} is not a directory: pass the package directory that compile() returned.")
        if not path.is_file():
            raise PackageError(f"{directory} has no {FILE_NAME}: it is not a package made by compile().")
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError):
            raise PackageError(f"{path} is not valid JSON: the package is corrupt, compile it again.") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise PackageError(f"{path} does not describe a QEfficient package: it was made by something else.")
        version = body.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise PackageError(
                f"{path} has package format {version}, this QEfficient reads up to {FORMAT_VERSION}: "
                "upgrade QEfficient or compile the package again."
            )
        if body.get("digest") != _digest(body):
            raise PackageError(f"{path} was changed after it was written: compile the package again.")
        try:
            return _from_json(body)
        except (KeyError, TypeError, AttributeError):
            raise PackageError(f"{path} lacks entries or has malformed ones: compile the package again.") from None


def _digest(body: dict[str, Any]) -> str:
    content = {k: v for k, v in body.items() if k != "digest"}
    return blake3(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _from_json(body: dict[str, Any]) -> Manifest:
    fields = {f.name for f in dataclasses.fields(Manifest)}
    values = {k: v for k, v in body.items() if k in fields}
    values.setdefault("parameters", ())  # packages of before adapters have none
    for kind in ("inputs", "outputs", "parameters"):
        values[kind] = tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in values[kind])
    values["states"] = tuple(StateSpec(**{**s, "shape": tuple(s["shape"])}) for s in values["states"])
    values["specializations"] = tuple(
        Specialization(**{**s, "symbols": {k: DimRange(**r) for k, r in s["symbols"].items()}})
        for s in values["specializations"]
    )
    values["files"] = {name: FileRecord(**record) for name, record in values["files"].items()}
    return Manifest(**values)

"""The files a Cloud AI compiler takes beside the graph: specializations.json and custom_io.yaml."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean
from QEfficient.targets.manifest import Manifest
from QEfficient.targets.qaic_partition import contract_json

SPECIALIZATIONS = "specializations.json"
CUSTOM_IO = "custom_io.yaml"
#: An output of this name is written back into the device memory of the input it is named after.
RETAINED = "_RetainedState"
#: Prefix of the outputs of a training step that hold gradients.
GRADIENT = "grad/"


def specializations_text(entries: Iterable[tuple[str, Mapping[str, int]]], named: bool) -> str:
    """The content of ``specializations.json`` in the form of `contract_json`.

    Args:
        entries: a name and sizes for each specialization.
        named: one ``{"name", "symbols"}`` object per entry, as newer compilers take; otherwise sizes only. All sizes
            are strings.
    """
    written: list[dict[str, Any]] = []
    for name, sizes in entries:
        symbols = {symbol: str(size) for symbol, size in sizes.items()}
        written.append({"name": name, "symbols": symbols} if named else symbols)
    return contract_json({"specializations": written})


def custom_io_entries(manifest: Manifest, *, fp16: bool, mxint8_kv: bool) -> list[tuple[str, str]]:
    """(name, precision) of the inputs and outputs whose type is not the graph's, in the order they are listed.

    Retained states and parameters with their ``_RetainedState`` outputs, and the gradients of a training step. Logits,
    log-probabilities and the loss stay what the graph says (float32).

    Without parameters each state stands beside its output, and float inputs that are no state come first (audio
    features, pictures), with their retained output where they have one. With parameters all inputs come first, as
    adapter graphs list them. A model that keeps nothing has no list: everything travels as the graph says.
    """
    if not manifest.states and not manifest.parameters:
        return []
    plain = "float16" if fp16 else "float"
    held: list[tuple[str, str, str]] = [
        (state.input, state.output, "mxint8" if mxint8_kv and state.kind == "kv" else plain)
        for state in manifest.states
        if "float" in state.dtype
    ]
    if not manifest.parameters:
        results = {spec.name for spec in manifest.outputs}
        features = [spec.name for spec in manifest.inputs if "float" in spec.dtype]
        fed = [n for name in features for n in (name, name + RETAINED) if n == name or n in results]
        paired = [(name, precision) for source, result, precision in held for name in (source, result)]
        return [*((name, plain) for name in fed), *paired]
    floats = [spec.name for spec in manifest.parameters if "float" in spec.dtype]
    held += [(name, name + RETAINED, plain) for name in floats]
    gradients = [(spec.name, plain) for spec in manifest.outputs if spec.name.startswith(GRADIENT)]
    return [(s, p) for s, _, p in held] + [(r, p) for _, r, p in held] + gradients


def custom_io_text(entries: Iterable[tuple[str, str]]) -> str:
    """The content of ``custom_io.yaml``; a blank line follows every entry, the last one too."""
    return "".join(f" - IOName: {name}\n   Precision: {precision}\n\n" for name, precision in entries)


def read_custom_io(path: Path, known: Iterable[str]) -> str:
    """A user's own IO list.

    Raises:
        OptionError: it cannot be read, lists nothing, or names something that is no input or output of the graph.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise OptionError(f"the IO list {path} cannot be read: pass a custom_io.yaml.") from None
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    names = [line.removeprefix("IOName:").strip().strip("\"'") for line in lines if line.startswith("IOName:")]
    if not names:
        raise OptionError(f"{path} lists no IOName: it is not an IO list.")
    known = set(known)
    for name in names:
        if name not in known:
            raise OptionError(f"{path} lists {name!r}, which the graph does not have.{did_you_mean(name, known)}")
    return text

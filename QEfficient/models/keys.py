"""Cache keys: everything that changes an artefact is in its key, nothing else is."""

from __future__ import annotations

import dis
import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from QEfficient.errors import OptionError
from QEfficient.store.digest import json_digest
from QEfficient.version import __version__

#: Libraries whose version shapes an exported graph.
EXPORT_LIBRARIES = ("torch", "transformers", "onnx_ir", "onnxscript")
_CODE = ("exporter", "transforms", "targets", "onnx_io.py", "safetensors_io.py")


@functools.cache
def library_versions(names: tuple[str, ...] = EXPORT_LIBRARIES) -> dict[str, str]:
    """Installed versions, read from package metadata without importing anything."""
    out = {}
    for name in names:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


@functools.cache
def code_digest() -> str:
    """Digest of the rooms that write artefacts, so that a changed exporter never serves what an older one made."""
    root = Path(__file__).parent.parent
    hasher = blake3()
    for part in _CODE:
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            hasher.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return hasher.hexdigest()[:32]


def export_key(source: dict[str, Any], task: str, variant: dict[str, Any]) -> str:
    """Key of an exported graph; ``variant`` holds the arguments that change the graph (pooling, batch_index …)."""
    return json_digest(
        {
            "artefact": "export",
            "source": source,
            "task": task,
            "variant": variant,
            "libraries": library_versions(),
            "qefficient": __version__,
            "code": code_digest(),
        }
    )


def package_key(
    export: str,
    transforms: Sequence[dict[str, Any]],
    options: dict[str, Any],
    toolchain: dict[str, str],
) -> str:
    """Key of a compiled package: the export, what was done to it, and with what."""
    return json_digest(
        {
            "artefact": "package",
            "export": export,
            "transforms": list(transforms),
            "options": options,
            "toolchain": toolchain,
            "code": code_digest(),
        }
    )


def callable_identity(function: Callable[..., Any]) -> str:
    """A digest of a user's function: its source text.

    Raises:
        OptionError: the source cannot be read, or the function holds values the digest could not see.
    """
    if (
        not inspect.isfunction(function)
        or function.__closure__
        or function.__defaults__
        or any(default is not None for default in (function.__kwdefaults__ or {}).values())
    ):
        raise OptionError(
            "a callable for pooling must be a plain function without captured variables or default arguments: only "
            "then can the cache tell two of them apart."
        )
    read = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
    for name in sorted(read):
        value = function.__globals__.get(name)
        if value is not None and not inspect.ismodule(value):
            raise OptionError(
                f"the pooling function reads the global {name!r}, which the cache key cannot see: define it inside the "
                "function."
            )
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        raise OptionError(
            "the source of the pooling function cannot be read: define it in a file, so that the cache can tell two "
            "functions apart."
        ) from None
    # The instructions as well: two lambdas on one line have one source.
    code = function.__code__
    constants = [constant for constant in code.co_consts if isinstance(constant, int | float | str | None)]
    parts = (source, code.co_code.hex(), code.co_names, constants)
    return f"{function.__qualname__}:{blake3(repr(parts).encode()).hexdigest()[:32]}"

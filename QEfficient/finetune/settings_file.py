"""Reads and writes configuration files: YAML or JSON data, never code."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from QEfficient.errors import OptionError
from QEfficient.finetune.keywords import mapping
from QEfficient.store.files import replacing

SUFFIXES = (".yaml", ".yml", ".json")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people write it: ``1e-4`` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str | int | float):
                seen.add(key)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


# PyYAML follows YAML 1.1, where a float needs a dot: learning_rate: 1e-4 would be a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_settings(path: str | Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Args:
        path: the file; its suffix decides the format.
        what: what it should hold, for messages ("a configuration").

    Raises:
        OptionError: no such file, another suffix, a syntax error, a key given twice, or not a mapping.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise OptionError(f"There is no file {path} to read {what} from.{nearest_file(path)}")
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{path} must end in .yaml, .yml or .json to be read as {what}.")
    try:
        body = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            found = json.loads(body, object_pairs_hook=_unique)
        else:
            found = yaml.load(body, Loader=_Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise OptionError(f"{path} cannot be read as {what}: {_one_line(error)}.") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise OptionError(f"{path} must hold {what} as a mapping of names to values.")
    return found


def read_mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping, or what a YAML or JSON file of one holds.

    Raises:
        OptionError: neither; ``name`` says what it should be.
    """
    return mapping(name, read_settings(os.fspath(value), name) if isinstance(value, str | os.PathLike) else value)


def write_settings(path: str | Path, values: Mapping[str, Any], what: str) -> Path:
    """Writes a mapping of plain values as YAML or JSON, by suffix, atomically; returns the path.

    Raises:
        OptionError: another suffix.
        ArtifactWriteError: the file cannot be written; an older one is intact.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{path} must end in .yaml, .yml or .json to hold {what}.")
    if path.suffix.lower() == ".json":
        body = json.dumps(dict(values), indent=2, ensure_ascii=False) + "\n"
    else:
        body = settings_text(values)
    return write_text(path, body, what)


def settings_text(values: Mapping[str, Any]) -> str:
    """A mapping of plain values as YAML."""
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def write_text(path: Path, body: str, what: str) -> Path:
    """Replaces a text file in one step, so that a reader sees the old one or the new one and nothing else."""
    with replacing(path, what) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(body, encoding="utf-8")
    return path


def nearest_file(path: Path) -> str:
    """``" Did you mean 'x'?"`` for the file of the same directory whose name is nearest, or an empty string."""
    folder = path.parent
    if not folder.is_dir():
        return f" The directory {folder} does not exist."
    near = difflib.get_close_matches(path.name, sorted(p.name for p in folder.iterdir()), n=1, cutoff=0.5)
    return f" Did you mean {str(folder / near[0])!r}?" if near else ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def parse_value(text: str) -> Any:
    """A value written on a command line, as YAML would read it (``1e-4`` is a number, ``[a, b]`` a list).

    Raises:
        OptionError: not a YAML value.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise OptionError(f"{text!r} cannot be read as a value: quote it.") from None

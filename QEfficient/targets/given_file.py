"""Files a user hands to a compiler: read at once, so that a package's identity is their content and not their path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from QEfficient.errors import OptionError

#: Options that take a path or what the file holds.
GIVEN_FILES = ("mdp_load_partition_config", "node_precision_info", "qnn_config")
#: The word that asks for a node precision file made from the graph.
NORMS = "norms"
#: The two keys a node precision file can have. The vendor documents the first one only.
PRECISION_KEYS = ("FP16NodeInstanceNames", "FP32NodeInstanceNames")


def read_given(option: str, value: Any) -> Any:
    """The content of the file ``value`` names; content is returned as it is.

    Raises:
        OptionError: there is no such file, or it does not hold what the option takes.
    """
    if isinstance(value, Mapping) or (option == "node_precision_info" and value == NORMS):
        return _checked(option, value, f"{option}=")
    if not isinstance(value, str | Path):
        raise OptionError(f"{option} takes the path of a file or what it holds, got {type(value).__name__}.")
    try:
        text = Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise OptionError(f"{option}: {value} cannot be read, pass the path of a text file.") from None
    if option == "node_precision_info":
        return _checked(option, read_name_lists(text, str(value)), str(value))
    try:
        content = json.loads(text)
    except ValueError as error:
        raise OptionError(f"{option}: {value} is not valid JSON ({error}): mend it there.") from None
    return _checked(option, content, str(value))


def read_name_lists(text: str, path: str) -> dict[str, list[str]]:
    """A YAML file of the form ``key: [name, name]`` or ``key:`` with a ``- name`` per line; no other YAML is needed.

    Raises:
        OptionError: a line has another form.
    """
    lists: dict[str, list[str]] = {}
    current: list[str] | None = None
    pending = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = pending + line.split("#", 1)[0].strip()
        if line.count("[") > line.count("]"):
            pending = line
            continue
        pending = ""
        key, separator, rest = line.partition(":")
        if line.startswith("- ") and current is not None:
            current.append(_unquoted(line[2:]))
        elif separator and not rest.strip():
            current = lists.setdefault(key.strip(), [])
        elif separator and rest.strip().startswith("[") and rest.strip().endswith("]"):
            lists[key.strip()] = [_unquoted(part) for part in rest.strip()[1:-1].split(",") if part.strip()]
        elif line:
            raise OptionError(f"{path}, line {number} is neither 'key: [name, name]' nor '- name': {line[:60]!r}.")
    if pending:
        raise OptionError(f"{path} opens a list with [ and never closes it.")
    return lists


def _unquoted(text: str) -> str:
    return text.strip().strip("\"'")


def _checked(option: str, content: Any, where: str) -> Any:
    if content == NORMS:
        return content
    if not isinstance(content, Mapping):
        raise OptionError(f"{option}: {where} holds no object of keys and values.")
    if option == "node_precision_info":
        unknown = [key for key in content if key not in PRECISION_KEYS]
        if unknown or not content:
            said = repr(unknown[0]) if unknown else "nothing"
            raise OptionError(f"{option}: {where} has {said}, known keys are {' and '.join(PRECISION_KEYS)}.")
        if not all(
            isinstance(names, list | tuple) and all(isinstance(n, str) for n in names) for names in content.values()
        ):
            raise OptionError(f"{option}: {where} must hold lists of tensor names.")
    if option == "mdp_load_partition_config" and not isinstance(content.get("partitions"), list):
        raise OptionError(f"{option}: {where} has no list 'partitions', so it is no partition file.")
    return dict(content)

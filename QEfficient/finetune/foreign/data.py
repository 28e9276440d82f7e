"""What other tools' descriptions of data have in common: files and splits, and one data set or several."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.readers import ROLES
from QEfficient.finetune.keywords import short
from QEfficient.suggest import did_you_mean

#: What ``datasets.load_dataset`` calls files of a kind, in the place of a name.
_KINDS_OF_FILES = ("json", "csv", "parquet", "text", "arrow")
_SPLIT = re.compile(r"[\w.-]+")


def options_of(entries: Sequence[Mapping[str, Any]], title: str) -> dict[str, Any]:
    """Options for one data set or for several; the only place that knows how several are written.

    Args:
        entries: for each data set ``dataset_name`` and whatever of its options differ from the defaults.
        title: the tool, for messages.

    Raises:
        OptionError: there is more than one, where only one can be trained on.
    """
    if len(entries) < 2:
        return dict(*entries)
    if "datasets" not in {f.name for f in dataclasses.fields(QEffConfig)}:
        raise OptionError(
            f"the file of {title} has {len(entries)} data sets, and a run here has one: keep the first "
            f"({short(entries[0]['dataset_name'])}), or put all rows into one file."
        )
    return {"datasets": [dict(entry) for entry in entries]}


def same_for_all(name: str, values: Sequence[Any], title: str) -> Any:
    """The value that every data set of a file has; OptionError when they differ."""
    if not values:
        return None
    if any(value != values[0] for value in values):
        raise OptionError(
            f"the data sets of {title} differ in {name} ({', '.join(map(short, values))}), which is one option of a "
            "run here: keep those that agree."
        )
    return values[0]


def source(path: Any, data_files: Any, title: str) -> str:
    """``dataset_name`` for the arguments of ``datasets.load_dataset``.

    Args:
        path: a file, a directory, a hub id, or a kind of file such as ``json``.
        data_files: one file or a list of them, or None.

    Raises:
        OptionError: several files, or no name at all.
    """
    files = data_files if isinstance(data_files, list) else [data_files] if data_files else []
    if not isinstance(path, str) or not path:
        raise OptionError(f"a data set of {title} needs a path or a name, got {short(path)}.")
    if not files:
        if path in _KINDS_OF_FILES and not Path(path).exists():
            raise OptionError(f"a data set of {title} says {path!r} and names no data_files: add the file.")
        return path
    if len(files) > 1:
        raise OptionError(f"a data set of {title} has {len(files)} data_files: put the rows into one file.")
    return str(files[0]) if path in _KINDS_OF_FILES else str(Path(path) / str(files[0]))


def split(value: Any, key: str) -> str | None:
    """A split by its name; None for the usual one.

    Raises:
        OptionError: a part of a split, such as ``train[:10%]``.
    """
    if value is None or value == "train":
        return None
    if not isinstance(value, str) or not _SPLIT.fullmatch(value):
        raise OptionError(f"{key}={short(value)} is a part of a split: name a whole one, and set sample_size.")
    return value


def renamed(columns: Mapping[str, Any]) -> dict[str, str] | None:
    """``columns`` without those that have no name or the same one; None when nothing is left."""
    return {ours: theirs for ours, theirs in columns.items() if theirs and theirs != ours} or None


def conversations(column: Any, role: str, content: str, title: str) -> dict[str, Any]:
    """Format and column of rows that hold conversations.

    Args:
        column: the name of the column.
        role, content: the keys of a message.

    Raises:
        OptionError: other keys than the two usual pairs.
    """
    formats = {("role", "content"): "messages", ("from", "value"): "sharegpt"}
    if formats.get((str(role), str(content))) is None:
        raise OptionError(
            f"messages of {title} have the keys {role!r} and {content!r}, and only role and content, or from and "
            "value, can be read: rename them with a preprocess function."
        )
    kind = formats[str(role), str(content)]
    ours = "messages" if kind == "messages" else "conversations"
    found: dict[str, Any] = {"dataset_format": kind}
    if column != ours:
        found["columns"] = {ours: column}
    return found


def check_roles(roles: Mapping[str, str], title: str) -> None:
    """Refuses names of speakers (theirs -> what it is) that our readers do not know."""
    for theirs, meant in roles.items():
        if ROLES.get(theirs.lower()) != meant:
            raise OptionError(
                f"{title} calls the role {meant} {theirs!r}, which is not known here: rename it with a preprocess "
                f"function.{did_you_mean(theirs, [name for name, role in ROLES.items() if role == meant])}"
            )

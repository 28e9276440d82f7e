"""Rows of any known format rewritten in one of two plain ones, and written to a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.examples import (
    Conversation,
    Document,
    Example,
    Exchange,
    Judged,
    Labeled,
    Preference,
    Segments,
)
from QEfficient.finetune.data.files import Rows, Unreadable, suffix_of
from QEfficient.finetune.data.filters import read_filters
from QEfficient.finetune.data.formats import Format, read_row
from QEfficient.finetune.data.prepare import filtered_rows
from QEfficient.finetune.data.recognise import recognise
from QEfficient.store.files import replacing
from QEfficient.suggest import did_you_mean

#: What rows can become; None keeps what they are, under our column names.
FORMS = ("messages", "pairs")


@dataclass(frozen=True)
class Read:
    """Rows that were read.

    Attributes:
        format: theirs.
        rows: as asked for, in order.
        filtered: how many filters left out.
        empty: numbers (from 1, in the source) of rows left out because a required value is empty.
        bad: why rows were left out that cannot be read, a sentence each.
    """

    format: Format
    rows: list[dict[str, Any]]
    filtered: int
    empty: list[int]
    bad: list[str]


def left(config: QEffConfig, rows: Rows, where: str) -> np.ndarray:
    """Numbers of the rows that filters leave, ascending from 0; InputError when there are none."""
    known = recognise(config, rows, where)
    return filtered_rows(read_filters(config.filters or ()), rows, known.renamer)[0]


def read_all(
    config: QEffConfig, rows: Rows, where: str, form: str | None = None, numbers: Iterable[int] | None = None
) -> Read:
    """The rows that filters leave, checked against the format of all, and rewritten.

    Args:
        config: its ``columns``, ``dataset_format``, ``task``, ``filters`` and ``on_bad_row`` count.
        where: the name of the data set, for messages.
        form: one of ``FORMS``; None keeps the format.
        numbers: which rows, from 0, instead of those that filters leave.

    Raises:
        OptionError: no format fits, or rows of the format have no such form.
        InputError: a row that does not fit, unless ``on_bad_row="skip"``; or no row is left.
    """
    if form is not None and form not in FORMS:
        raise OptionError(f"rows can become {' or '.join(FORMS)}, not {form!r}.{did_you_mean(form, FORMS)}")
    known = recognise(config, rows, where)
    if numbers is None:
        numbers, _ = filtered_rows(read_filters(config.filters or ()), rows, known.renamer)
    chosen = [int(number) for number in numbers]
    found = Read(known.format, [], len(rows) - len(chosen), [], [])
    for index in chosen:
        row: Any = rows[index]
        try:
            if isinstance(row, Unreadable):
                raise InputError(row.why)
            example = read_row(known.format, known.renamer(row), index + 1)
        except InputError as error:
            if config.on_bad_row == "error":
                raise
            found.bad.append(str(error))
            continue
        if example is None:
            found.empty.append(index + 1)
        else:
            found.rows.append(known.renamer(row) if form is None else rewritten(example, form))
    return found


def rewritten(example: Example, form: str) -> dict[str, Any]:
    """A row that means the same.

    ``messages`` has ``messages`` and, where there are some, ``tools``. ``pairs`` has ``prompt`` and ``completion``, or
    ``question`` and ``answer`` where a line break stands between the two without a chat template; ``system`` and
    ``history`` where there are some. Texts and classes stay rows of ``text`` (and ``label``), segments ``segments``.

    Raises:
        OptionError: a conversation cannot become a pair, or token ids and judged answers anything else.
    """
    if isinstance(example, Document):
        return {"text": example.text}
    if isinstance(example, Labeled):
        texts = (
            {"text": example.text} if example.pair is None else {"sentence1": example.text, "sentence2": example.pair}
        )
        return {**texts, "label": example.label}
    if isinstance(example, Segments):
        return {"segments": [{"label": bool(weight), "text": text} for text, weight in example.pieces]}
    if isinstance(example, Exchange):
        return _pair(example) if form == "pairs" else _messages(example.conversation())
    if isinstance(example, Conversation) and form == "messages":
        return _messages(example)
    kinds = {Conversation: "conversations", Preference: "preferences", Judged: "judged answers"}
    what = kinds.get(type(example), "token ids")
    raise OptionError(f"{what} cannot become {form}: leave out --to to keep what they are.")


def _messages(chat: Conversation) -> dict[str, Any]:
    return {"messages": [dict(m) for m in chat.messages], **({"tools": chat.tools} if chat.tools is not None else {})}


def _pair(example: Exchange) -> dict[str, Any]:
    names = ("question", "answer") if example.joiner else ("prompt", "completion")
    found: dict[str, Any] = dict(zip(names, (example.prompt, example.completion), strict=True))
    if example.system is not None:
        found["system"] = example.system
    if example.history:
        found["history"] = [list(turn) for turn in example.history]
    return found


def check_output(path: Path, overwrite: bool) -> None:
    """Refuses a file that cannot be written to, before anything is read.

    Raises:
        OptionError: an unknown suffix, a file that is there, or no directory to put it into.
    """
    if suffix_of(path) not in _WRITERS or path.name.lower().endswith(".gz"):
        raise OptionError(f"{path} must end in one of {', '.join(_WRITERS)}.")
    if path.is_dir() or (path.exists() and not overwrite):
        raise OptionError(f"{path} is there already: choose another name" + (" or pass --overwrite." * path.is_file()))
    if not path.absolute().parent.is_dir():
        raise OptionError(f"there is no directory {path.parent} to write {path.name} to.")


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes rows as jsonl, json, csv or parquet, by suffix; the file is complete or absent.

    Lists and objects become JSON texts in CSV.

    Raises:
        ArtifactWriteError: there is no room.
    """
    writer = _WRITERS[suffix_of(path)]
    with replacing(path, "the rows") as temporary:
        writer(rows, temporary)


def _lines(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(_json(row) + "\n")


def _array(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join(_json(row) for row in rows) + "\n]\n")


def _table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        for row in rows:
            writer.writerow({n: _json(v) if isinstance(v, list | tuple | Mapping) else v for n, v in row.items()})


def _parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import datasets
    from pyarrow import parquet

    # Through datasets, which knows rows that lack columns, but not with its writer, which shows progress of its own.
    parquet.write_table(datasets.Dataset.from_list([dict(row) for row in rows]).data.table, path)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """Arrays and scalars of numpy and torch as lists and numbers."""
    return value.tolist()


_WRITERS: dict[str, Callable[[Sequence[Mapping[str, Any]], Path], None]] = {
    ".jsonl": _lines,
    ".json": _array,
    ".csv": _table,
    ".parquet": _parquet,
}

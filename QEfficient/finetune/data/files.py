"""Reads one data file: JSON, JSON Lines, CSV, TSV and text strictly, Parquet and Arrow through ``datasets``."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from QEfficient.errors import InputError
from QEfficient.finetune.keywords import short
from QEfficient.finetune.settings_file import nearest_file

Rows = Sequence[dict[str, Any]]

#: Rows of a Parquet file that are in memory at a time.
_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Unreadable:
    """Stands among rows for one that cannot be read; ``why`` is a sentence for people."""

    why: str


#: What is done with a bad row: raises, or returns what stands in its place.
OnBad = Callable[[str], Unreadable]


def stop(why: str) -> Unreadable:
    """Refuses the whole data set for one row."""
    raise InputError(why)


def suffix_of(path: Path) -> str:
    """The suffix that decides how a file is read: that of the name without ``.gz``, in lower case."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def is_data_file(path: Path) -> bool:
    """Whether ``read_file`` knows the suffix."""
    return suffix_of(path) in READERS


def read_file(path: Path, bad: OnBad = stop) -> Rows:
    """The rows of a data file, in order; a list of dicts, or a ``datasets.Dataset`` for Parquet and Arrow.

    Args:
        path: the file.
        bad: what is done with a row that is malformed or does not fit the others.

    Raises:
        InputError: no such file, an unknown suffix, malformed content (with its line), rows that are not objects, a
            column whose values are of several types (with its row), or no rows.
    """
    if not path.is_file():
        raise InputError(f"There is no data file {path}.{nearest_file(path)}")
    reader = READERS.get(suffix_of(path))
    if reader is None:
        raise InputError(f"{path} has a suffix that is no data format: use {', '.join(sorted(READERS))}.")
    with explained(path):
        rows = reader(path, bad)
        rows = list(rows) if isinstance(rows, Iterator) else rows
    if not len(rows):
        raise InputError(f"There are no rows in {path}.")
    return check_rows(rows, str(path), bad) if isinstance(rows, list) else rows


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what goes wrong while text is read into an InputError about the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): convert it.") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path} cannot be decompressed ({error}): make it again.") from error


def check_rows(rows: list[Any], where: str, bad: OnBad = stop) -> list[Any]:
    """The rows, with ``bad`` in place of those that are no dicts or hold another type than a column usually does.

    Raises:
        InputError: by ``bad``.
    """
    if bad is stop:
        check_types(rows, where)
        return rows
    usual = usual_kinds(rows)
    return [check_row(row, number, where, usual, bad) for number, row in enumerate(rows, start=1)]


def usual_kinds(rows: Iterable[Any]) -> dict[str, str]:
    """Column -> the kind of value that most rows have there."""
    kinds: dict[str, Counter[str]] = {}
    for row in rows:
        for name, value in row.items() if isinstance(row, dict) else ():
            if (kind := _kind(value)) is not None:
                kinds.setdefault(name, Counter())[kind] += 1
    return {name: counts.most_common(1)[0][0] for name, counts in kinds.items()}


def check_row(row: Any, number: int, where: str, usual: Mapping[str, str], bad: OnBad) -> Any:
    """The row, or ``bad`` in its place if it is no dict or has another kind of value than is usual in a column."""
    if isinstance(row, Unreadable):
        return row
    if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
        return bad(f"Row {number} of {where} is {short(row)}, and a row must be an object with named columns.")
    for name, value in row.items():
        if name in usual and _kind(value) not in (None, usual[name]):
            return bad(f"Row {number} of {where} holds {_kind(value)} in {name!r}, and others {usual[name]}.")
    return row


def check_types(rows: Sequence[Any], where: str) -> None:
    """Refuses rows that are no dicts and columns that hold several types; None and absent values count as any.

    Raises:
        InputError: with the number of the row, from 1.
    """
    first: dict[str, tuple[str, int]] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(
                f"Row {number} of {where} is {short(row)}, and a row must be an object with named columns."
            )
        for name, value in row.items():
            if not isinstance(name, str):
                raise InputError(f"Row {number} of {where} has the column {short(name)}, and names must be strings.")
            kind = _kind(value)
            if kind is None:
                continue
            known, since = first.setdefault(name, (kind, number))
            if kind != known:
                raise InputError(
                    f"Column {name!r} of {where} holds {kind} in row {number} and {known} in row {since}: give it one "
                    "type."
                )


def _kind(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return "a string"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, dict):
        return "an object"
    return "a list"


def _open(path: Path) -> io.TextIOBase:
    # utf-8-sig: files from Windows start with a mark that is no part of the first column's name.
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _json_lines(path: Path, bad: OnBad) -> Iterator[Any]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = bad(f"Line {number} of {path} is not JSON ({error}): correct or remove it.")
            if not isinstance(row, dict | Unreadable):
                row = bad(f"Line {number} of {path} is {short(row)}, and a row must be an object.")
            yield row


def _json(path: Path, bad: OnBad) -> list[Any]:
    with _open(path) as file:
        body = file.read()
    if not body.strip():
        return []
    try:
        found = json.loads(body)
    except ValueError as error:
        # Several objects in a .json file are JSON Lines under another name.
        first = body.lstrip().splitlines()[0]
        if _is_object(first) and len(body.strip().splitlines()) > 1:
            return list(_json_lines(path, bad))
        raise InputError(f"{path} is not JSON ({error}): correct it.") from error
    if isinstance(found, dict):
        found = _unwrapped(path, found)
    if not isinstance(found, list):
        raise InputError(f"{path} must hold a list of rows, {{'data': […]}} or one list per column.")
    return found


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _unwrapped(path: Path, found: dict[str, Any]) -> Any:
    for name in ("data", "rows"):
        if isinstance(found.get(name), list) and all(isinstance(row, dict) for row in found[name]):
            return found[name]
    if found and all(isinstance(value, list) for value in found.values()):
        lengths = {name: len(value) for name, value in found.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"The columns of {path} have different lengths ({lengths}): make them equal.")
        return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    # One row written as one object.
    return [found]


def _separated(separator: str) -> Callable[[Path, OnBad], Iterator[Any]]:
    def read(path: Path, bad: OnBad) -> Iterator[Any]:
        with _open(path) as file:
            reader = csv.DictReader(file, delimiter=separator, strict=True)
            try:
                names = reader.fieldnames or []
            except csv.Error as error:
                raise InputError(f"The first line of {path} is malformed ({error}): correct it.") from error
            if len(set(names)) != len(names) or not all(names):
                raise InputError(f"The first line of {path} must name every column once, got {short(names)}.")
            while True:
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    yield bad(f"Line {reader.line_num} of {path} is malformed ({error}): correct it.")
                    continue
                if row is None:
                    return
                # DictReader puts surplus fields under None and fills missing ones with None.
                if None in row or None in row.values():
                    yield bad(f"Line {reader.line_num} of {path} does not have {len(names)} fields.")
                else:
                    yield dict(row)

    return read


def _text(path: Path, bad: OnBad) -> Iterator[Any]:
    del bad  # every line is a row
    with _open(path) as file:
        for part in file:
            # Of characters that end a line, a file knows some and a text more.
            yield from ({"text": line} for line in part.splitlines() if line.strip())


def _arrow(kind: str) -> Callable[[Path, OnBad], Any]:
    def read(path: Path, bad: OnBad) -> Any:
        del bad  # columns have types
        import pyarrow
        from datasets import Dataset

        try:
            return Dataset.from_parquet(str(path)) if kind == "parquet" else Dataset.from_file(str(path))
        except (pyarrow.ArrowInvalid, OSError, ValueError) as error:
            raise _not_arrow(path, kind, error) from error

    return read


def _not_arrow(path: Path, kind: str, error: Exception) -> InputError:
    return InputError(f"{path} is not a readable {kind} file ({short(str(error))}): make it again.")


def stream_file(path: Path, bad: OnBad = stop, skip: int = 0) -> Iterator[Any]:
    """The rows of a data file one after the other, without all of it in memory; rows are not compared with others.

    Args:
        path: a file that is there.
        bad: what is done with a malformed row.
        skip: rows to leave out at the beginning.

    Raises:
        InputError: at once, a format that has to be read as a whole; while reading, malformed content.
    """
    suffix = suffix_of(path)
    if suffix == ".json" or suffix not in READERS:
        known = ", ".join(sorted(set(READERS) - {".json"}))
        raise InputError(
            f"{path} cannot be streamed, only {known} can: write it as .jsonl, as qefficient data convert does."
        )
    return _parquet_rows(path, skip) if suffix == ".parquet" else _rows_from(path, bad, skip)


def _rows_from(path: Path, bad: OnBad, skip: int) -> Iterator[Any]:
    with explained(path):
        # An Arrow file is mapped, so it is not in memory either.
        yield from itertools.islice(iter(READERS[suffix_of(path)](path, bad)), skip, None)


def _parquet_rows(path: Path, skip: int) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _not_arrow(path, "parquet", error) from error
    with file:
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if skip < count:
                for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[group]):
                    yield from batch.slice(min(skip, len(batch))).to_pylist()
                    skip = max(0, skip - len(batch))
            else:
                skip -= count


#: Suffix -> reader.
READERS: dict[str, Callable[[Path, OnBad], Any]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".txt": _text,
    ".parquet": _arrow("parquet"),
    ".arrow": _arrow("arrow"),
}

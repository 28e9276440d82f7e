"""Rows one after the other: files, directories, patterns, the hub, databases and objects that can be read again."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.config import QEffConfig, describe_memory
from QEfficient.finetune.data import sources
from QEfficient.finetune.data.database import is_database, stream_database, without_password
from QEfficient.finetune.data.files import is_data_file, stream_file, suffix_of
from QEfficient.finetune.data.named import named_dataset
from QEfficient.finetune.keywords import short

#: What stands between the name of a split and the number of a file: ``train-00003-of-00010.parquet``.
_NUMBERED = re.compile(r"(.+?)[-_.]\d+([-_.]of[-_.]\d+)?")


class SourceRow(NamedTuple):
    """A row, and where it is from: the file or source, and its number there from 1."""

    where: str
    number: int
    row: Any

    @property
    def label(self) -> str:
        """For messages: what follows "Row"."""
        return f"{self.number} of {self.where}"


@dataclass(frozen=True)
class RowStream:
    """Rows that can be read again and again, each time from the beginning.

    Attributes:
        name: for people.
        read: the rows after so many.
        identity: what a resumed run compares, as JSON values: names and sizes, for content would be read whole.
        evaluation: the source's own evaluation rows, or None.
        notes: what was decided about the splits, one sentence each.
    """

    name: str
    read: Callable[[int], Iterator[SourceRow]]
    identity: tuple[Any, ...]
    evaluation: RowStream | None = None
    notes: tuple[str, ...] = ()


def open_stream(config: QEffConfig) -> RowStream:
    """The stream that ``config.dataset_name`` names; nothing is read yet.

    Raises:
        InputError: data that is missing, or a file that has to be read as a whole.
        OptionError: a split that does not exist, or a name that is nothing known or cannot be streamed.
    """
    data = config.dataset_name
    if not isinstance(data, str):
        return _of_memory(data, config)
    if data == "sample":
        return _of_files(data, {"train": [sources.bundled_file(data)]}, config)
    if named_dataset(data, config.custom_dataset_config) is not None:
        raise OptionError(f"{data} is made by a function, which cannot be streamed: stream a file or a hub id.")
    if is_database(data):
        shown = without_password(data)
        query, table = config.dataset_query, config.dataset_table

        def read(skip: int) -> Iterator[SourceRow]:
            return _numbered(shown, stream_database(data, query, table), skip)

        return _chosen(shown, {"train": RowStream(shown, read, (shown, query, table))}, config)
    if glob.has_magic(data):
        found = [Path(name) for name in sorted(glob.glob(str(Path(data).expanduser()), recursive=True))]
        if not found:
            raise InputError(f"No file has a name like {data}.")
        return _of_files(data, {"train": found}, config)
    path = Path(data).expanduser()
    if path.is_file():
        return _of_files(str(path), {"train": [path]}, config)
    if path.is_dir() and sources.is_saved(path):
        from datasets import load_from_disk

        return _of_memory(load_from_disk(str(path)), config, str(path))
    if path.is_dir() and (splits := _files_by_split(path, config)):
        return _of_files(str(path), splits, config)
    if not path.exists() and (is_data_file(path) or not sources.is_hub_id(data)):
        sources.from_path(path, config)  # raises what there is to say
    return _of_memory(sources.load_hub(data, config.dataset_config, streaming=True), config, data)


def _files_by_split(path: Path, config: QEffConfig) -> dict[str, list[Path]]:
    """Split -> files of a directory; one split where no file is named after any."""
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and is_data_file(entry))
    known = (*sources.TRAIN_NAMES, *sources.EVAL_NAMES, config.train_split, config.eval_split)
    found: dict[str, list[Path]] = {}
    for file in files:
        stem = file.name.lower().removesuffix(".gz").removesuffix(suffix_of(file))
        match = _NUMBERED.fullmatch(stem)
        split = stem if stem in known or match is None else match[1]
        if split in known:
            found.setdefault(split, []).append(file)
    return found or ({"train": files} if files else {})


def _of_files(name: str, splits: Mapping[str, Sequence[Path]], config: QEffConfig) -> RowStream:
    found = {}
    for split, files in splits.items():
        for file in files:
            stream_file(file)  # refuses what has to be read as a whole, before anything is read
        identity = tuple((file.name, file.stat().st_size) for file in files)
        found[split] = RowStream(name, _file_reader(tuple(files), config), identity)
    return _chosen(name, found, config)


def _file_reader(files: tuple[Path, ...], config: QEffConfig) -> Callable[[int], Iterator[SourceRow]]:
    bad = sources.on_bad(config)

    def read(skip: int) -> Iterator[SourceRow]:
        if len(files) == 1:
            return _numbered(str(files[0]), stream_file(files[0], bad, skip), 0, skip)
        every = itertools.chain.from_iterable(_numbered(str(file), stream_file(file, bad)) for file in files)
        return itertools.islice(every, skip, None)

    return read


def _of_memory(data: Any, config: QEffConfig, name: str | None = None) -> RowStream:
    """Objects that can be iterated, among them what ``datasets`` streams."""
    splits = data if isinstance(data, Mapping) else {"train": data}
    found = {}
    for split, rows in splits.items():
        if not isinstance(rows, Iterable) or isinstance(rows, Iterator | str | bytes):
            raise OptionError(
                f"streaming needs data that can be read again, got {short(rows)}: pass a file, a hub id, or an object "
                "whose __iter__ begins anew."
            )
        shown = name or describe_memory(rows)
        identity = (shown, str(split), len(rows) if isinstance(rows, Sized) else None)
        found[str(split)] = RowStream(shown, _object_reader(shown, rows, hub=name is not None), identity)
    return _chosen(name or describe_memory(data), found, config)


def _object_reader(name: str, rows: Any, hub: bool) -> Callable[[int], Iterator[SourceRow]]:
    def read(skip: int) -> Iterator[SourceRow]:
        # Sources of `datasets` can skip without reading.
        ahead = callable(getattr(rows, "skip", None))
        found = _numbered(name, iter(rows.skip(skip) if ahead else rows), 0 if ahead else skip, skip if ahead else 0)
        return _explained(name, found) if hub else found

    return read


def _explained(name: str, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    with sources.hub_errors(name):
        yield from rows


def _numbered(where: str, rows: Iterable[Any], skip: int = 0, before: int = 0) -> Iterator[SourceRow]:
    """The rows after ``skip``, of a source whose first ``before`` rows are left out already."""
    numbered = (SourceRow(where, number, row) for number, row in enumerate(rows, start=before + 1))
    return itertools.islice(numbered, skip, None)


def _chosen(name: str, splits: Mapping[str, RowStream], config: QEffConfig) -> RowStream:
    train, evaluation, notes = sources.split_names(name, splits, config)
    held = None if evaluation is None else splits[evaluation]
    return dataclasses.replace(splits[train], evaluation=held, notes=notes)

"""The beginning of a stream as a data set of its own: it decides the format, is audited, and holds evaluation rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from QEfficient.errors import InputError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.files import Unreadable, check_row, usual_kinds
from QEfficient.finetune.data.preprocess import one_row
from QEfficient.finetune.data.row_functions import read_functions
from QEfficient.finetune.data.sources import Source, on_bad
from QEfficient.finetune.data.stream_sources import RowStream, SourceRow, open_stream

#: Training rows that are audited before the first step.
AUDITED = 1000


class RowSteps:
    """What is done to a row of a stream before it is read as an example: a check of its values, and ``preprocess``.

    Args:
        kinds: column -> the kind of value that the first rows have there.
    """

    def __init__(self, config: QEffConfig, kinds: Mapping[str, str]) -> None:
        self._kinds, self._bad = kinds, on_bad(config)
        self._functions = read_functions(config.preprocess or ())

    def __call__(self, found: SourceRow) -> Any:
        """The row, an `Unreadable` in its place, or None where a function drops it.

        Raises:
            InputError: a row that does not fit the others, unless ``on_bad_row="skip"``.
        """
        row = check_row(found.row, found.number, found.where, self._kinds, self._bad)
        for function in self._functions:
            if row is None or isinstance(row, Unreadable):
                return row
            row = one_row(function, row, found.number)
        return row


@dataclass(frozen=True)
class Opened:
    """A stream and its beginning.

    Attributes:
        stream: the source.
        source: the rows held out, if any, and those to audit; or with evaluation rows of its own.
        steps: what was done to them, and is to be done to all rows.
        held: rows at the beginning of the stream that are not trained.
    """

    stream: RowStream
    source: Source
    steps: RowSteps
    held: int


def open_beginning(config: QEffConfig) -> Opened:
    """Opens the stream of a configuration and reads its beginning, and its evaluation rows.

    Raises:
        InputError, OptionError: see `open_stream`; also no rows, or none but those held out.
    """
    stream = open_stream(config)
    held = config.eval_rows or 0 if stream.evaluation is None else 0
    rows = list(itertools.islice(stream.read(0), held + AUDITED))
    if len(rows) <= held:
        raise InputError(
            f"{stream.name} has {len(rows)} rows, which eval_rows={held} holds out: lower it."
            if rows
            else f"There are no rows in {stream.name}."
        )
    steps = RowSteps(config, usual_kinds(found.row for found in rows))
    first, begin = _done(rows[:held], steps), _done(rows[held:], steps)
    evaluation = None
    if stream.evaluation is not None:
        evaluation = [row for _, row in _done(itertools.islice(stream.evaluation.read(0), config.eval_rows), steps)]
    source = Source(
        stream.name,
        [row for _, row in (*first, *begin)],
        evaluation,
        stream.notes,
        held=len(first),
        labels=tuple(label for label, _ in (*first, *begin)),
    )
    return Opened(stream, source, steps, held)


def _done(rows: Iterable[SourceRow], steps: RowSteps) -> list[tuple[str, Any]]:
    found = ((row.label, steps(row)) for row in rows)
    return [(label, row) for label, row in found if row is not None]

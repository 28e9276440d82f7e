"""Training rows of a stream: read, shuffled in a buffer, encoded and packed on the way, from any position."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from QEfficient.errors import InputError
from QEfficient.finetune.data.audit import MOST_BAD_ROWS
from QEfficient.finetune.data.batching import STREAM, permutation
from QEfficient.finetune.data.encode import Dropped, Encoded
from QEfficient.finetune.data.files import Unreadable
from QEfficient.finetune.data.filters import read_filters
from QEfficient.finetune.data.packing import PackedRows
from QEfficient.finetune.data.prepare import Preparation
from QEfficient.finetune.data.stream_options import BUFFER
from QEfficient.finetune.data.stream_prepare import Opened
from QEfficient.finetune.data.stream_sources import SourceRow
from QEfficient.finetune.data.token_rows import Item, TokenRows

logger = logging.getLogger("QEfficient.finetune")


@dataclass(frozen=True)
class Position:
    """A place in a stream: small, and enough to go on from there.

    Attributes:
        epoch: passes over the source that are complete.
        first: rows of the source before those in the buffer, without rows held out.
        taken: training rows made of the buffer that were handed out.
    """

    epoch: int = 0
    first: int = 0
    taken: int = 0


class StreamRows:
    """Training rows of a source of any size; what is in memory is the buffer.

    The source is read in order, ``shuffle_buffer_size`` rows at a time. Those are shuffled among themselves by (seed,
    pass, place) and handed out before more are read, so that a position is three numbers.

    Args:
        opened: the source, and how many rows at its beginning are not trained.
        preparation: of the rows at its beginning, which decided the format.
        sample: training rows made of these.
        names: label name -> class id, for classification.

    Attributes:
        sample: training rows from the beginning, packed where all are.
        left_out: reason -> rows left out since the stream was made; rows that are read again count again.
    """

    def __init__(
        self, opened: Opened, preparation: Preparation, sample: TokenRows, names: dict[str, int] | None
    ) -> None:
        self.stream, self.left_out = opened.stream, Counter[str]()
        self.classes = names is not None
        self._preparation, self._names = preparation, names
        self._steps, self._held = opened.steps, opened.held
        config = preparation.config
        self._config, self._size = config, config.shuffle_buffer_size or BUFFER
        self._filters = [(item.name, item.start()) for item in read_filters(config.filters or ())]
        self.sample = PackedRows(sample, config.max_ctx_len) if config.packing else sample

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a position depends on besides the rows at the beginning, as JSON values."""
        return (self.stream.identity, self._size, self._config.packing)

    def one_pass(self, at: Position, *, seed: int, shuffle: bool) -> Iterator[tuple[Item, Position]]:
        """The rest of a pass: training rows, and the position after each.

        Raises:
            InputError: a row that cannot be read or encoded, by ``on_bad_row`` and ``truncation``.
        """
        first, taken = at.first, at.taken
        rows = self.stream.read(self._held + first)
        while buffer := list(itertools.islice(rows, self._size)):
            order = np.arange(len(buffer))
            items = self._packed(buffer, first) if self._config.packing else buffer
            if shuffle:
                order = permutation(len(items), seed, STREAM, at.epoch, first)
            made = self._items(items, order, first)
            for count, item in enumerate(itertools.islice(made, taken, None), start=taken + 1):
                yield item, Position(at.epoch, first, count)
            first, taken = first + len(buffer), 0

    def _items(self, items: PackedRows | Sequence[SourceRow], order: np.ndarray, first: int) -> Iterator[Item]:
        for index in order.tolist():
            if isinstance(items, PackedRows):
                yield items[index]
            else:
                encoded = self._encoded(items[index], self._held + first + index + 1)
                yield from TokenRows.from_encoded(encoded, self._names)

    def _packed(self, buffer: Sequence[SourceRow], first: int) -> PackedRows:
        place = self._held + first
        encoded = [pair for n, row in enumerate(buffer, start=place + 1) for pair in self._encoded(row, n)]
        return PackedRows(TokenRows.from_encoded(encoded), self._config.max_ctx_len)

    def _encoded(self, found: SourceRow, place: int) -> list[tuple[int, Encoded]]:
        """The training rows that a row of the source becomes, none when it is left out."""
        try:
            made = self._tokens(found, place)
        except InputError as error:
            if self._config.on_bad_row == "error":
                raise
            self.left_out["malformed"] += 1
            if self.left_out["malformed"] <= MOST_BAD_ROWS:
                logger.warning("left out (on_bad_row='skip'): %s", error)
            return []
        kept = []
        for row in made:
            if isinstance(row, list):
                kept += [(found.number, encoded) for encoded in row]
            elif isinstance(row, Dropped) and row.needs:
                raise InputError(
                    f"Row {found.label} needs {row.needs} tokens, more than max_ctx_len={self._config.max_ctx_len}: "
                    "raise it, or set truncation='cut_answer' or 'drop'."
                )
            else:
                self.left_out["empty" if row is None else row.reason] += 1
        return kept

    def _tokens(self, found: SourceRow, place: int) -> Sequence[list[Encoded] | Dropped | None]:
        row = self._steps(found)
        if row is None:
            self.left_out["preprocess"] += 1
            return ()
        for name, keep in self._filters:
            if not isinstance(row, Unreadable) and not keep(self._preparation.renamer(row)):
                self.left_out[f"filter {name}"] += 1
                return ()
        made = self._preparation.encode(row, found.label, augment=True, place=place)
        known = self._names
        for encoded in (row for rows in made if isinstance(rows, list) for row in rows):
            if known is not None and str(encoded.label) not in known:
                raise InputError(
                    f"Row {found.label} has the label {encoded.label!r}, and the rows at the beginning have "
                    f"{', '.join(known)} only: put a row of every class there."
                )
        return made

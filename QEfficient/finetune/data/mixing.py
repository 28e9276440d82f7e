"""Rows of several sources as one set: how many of each, and which."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from QEfficient.errors import InputError
from QEfficient.finetune.data.batching import MIX, permutation
from QEfficient.finetune.data.pairs import PairRows
from QEfficient.finetune.data.token_rows import IGNORE, TokenRows


def shares(sizes: Sequence[int], weights: Sequence[float] | None, temperature: float) -> list[Fraction]:
    """What part of a mixture each source is.

    Args:
        sizes: rows of each source.
        weights: relative; None makes them of the sizes.
        temperature: without weights, the shares are in proportion to ``size ** (1 / temperature)``: 1 keeps the
            sizes, large values make the sources equal (T5, Raffel et al. 2020, arXiv:1910.10683, section 3.5.2).

    Returns:
        Fractions that add up to 1, in the order of the sources.
    """
    if weights is not None:
        # By its decimal digits: 0.1 is a tenth.
        parts = [Fraction(str(weight)) for weight in weights]
    elif temperature == 1:
        parts = [Fraction(size) for size in sizes]
    else:
        # In proportion to the largest, so that no power is too large a number.
        parts = [Fraction((size / max(sizes)) ** (1 / temperature)) for size in sizes]
    return [part / sum(parts) for part in parts]


def row_counts(
    names: Sequence[str], sizes: Sequence[int], parts: Sequence[Fraction], upsample: bool, rows: int | None
) -> list[int]:
    """How many rows of each source a mixture has.

    The total is ``rows``. Without it, it is the most that repeats no row (the source that is scarcest for its share is
    used up), or with ``upsample`` the least that leaves none out (the most plentiful source is used up). The total is
    divided by largest remainders, so a count is less than one row from its share.

    Args:
        names: of the sources, for messages.
        sizes: rows of each, at least 1.
        parts: from `shares`.

    Raises:
        InputError: a row would have to be repeated without ``upsample``, or a source gets no row.
    """
    # A share may be too small a number to be told from nothing; then its source gets no row, which is refused.
    most = [Fraction(size) / part for size, part in zip(sizes, parts, strict=True) if part]
    total = rows if rows is not None else math.ceil(max(most)) if upsample else math.floor(min(most))
    counts = [math.floor(total * part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda place: (counts[place] - total * parts[place], place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    for name, size, count in zip(names, sizes, counts, strict=True):
        if count > size and not upsample:
            raise InputError(
                f"A mixture of {total:,} rows needs {count:,} of {name}, which has {size:,}: lower mixing_rows to "
                f"{math.floor(min(most)):,}, or repeat rows with mixing='upsample'."
            )
        if not count:
            raise InputError(
                f"A mixture of {total:,} rows has none of {name}, whose share is too small: raise its weight or "
                "mixing_rows, or repeat rows of the others with mixing='upsample'."
            )
    return counts


def draw(size: int, count: int, seed: int, place: int) -> np.ndarray:
    """Which rows of a source are used: every row ``count // size`` times, and some once more, drawn by the seed.

    Returns:
        Row numbers from 0, ascending, int64 ``[count]``.
    """
    times, rest = divmod(count, size)
    drawn = permutation(size, seed, MIX, place)[:rest]
    return np.sort(np.concatenate([np.tile(np.arange(size), times), drawn])).astype(np.int64)


class MixedRows:
    """Rows of several sources, one source after the other; like `TokenRows`, and nothing is copied.

    Args:
        parts: the rows of each source; all of them classified, or none, all pairs, or none.
        chosen: row numbers of each, in order.
    """

    def __init__(self, parts: Sequence[TokenRows | PairRows], chosen: Sequence[np.ndarray]) -> None:
        self.parts, self.chosen = tuple(parts), tuple(chosen)
        self.classes = self.parts[0].classes
        self._ends = np.cumsum([len(rows) for rows in self.chosen])
        self._weighted = any(part.weights is not None for part in self.parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        place = int(np.searchsorted(self._ends, index, side="right"))
        number = self.chosen[place][index - (self._ends[place - 1] if place else 0)]
        item = self.parts[place][int(number)]
        if self._weighted and "weights" not in item:
            # Rows of one packed row or batch have the same arrays.
            item = {**item, "weights": (item["labels"] != IGNORE).astype(np.float32)}
        return item

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, int64 ``[N]``."""
        return np.concatenate([part.lengths[rows] for part, rows in zip(self.parts, self.chosen, strict=True)])

    @property
    def trained(self) -> np.ndarray:
        """Trained tokens of every row, int64 ``[N]``; 1 per row for classification."""
        return np.concatenate([part.trained[rows] for part, rows in zip(self.parts, self.chosen, strict=True)])


#: Rows that are not packed.
SingleRows: TypeAlias = TokenRows | MixedRows

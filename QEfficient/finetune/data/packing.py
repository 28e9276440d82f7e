"""Packing: several short rows in one, kept apart by segment numbers, so that less of a batch is padding."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from QEfficient.errors import InputError
from QEfficient.finetune.data.mixing import SingleRows
from QEfficient.finetune.data.token_rows import Item


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Which rows share a packed row: best fit, longest first (TRL's ``bfd``).

    Args:
        lengths: tokens of every row, each from 1 to ``capacity``.
        capacity: most tokens of a packed row.

    Returns:
        Lists of row indices; every index is in exactly one. The result depends on the arguments only.

    Raises:
        InputError: a row is longer than ``capacity``.
    """
    sizes = [int(length) for length in lengths]
    if sizes and max(sizes) > capacity:
        raise InputError(f"A row of {max(sizes)} tokens does not fit into packed rows of {capacity}: truncate first.")
    bins: list[list[int]] = []
    # (free tokens, index of the bin), ascending: the first with enough room is the tightest fit.
    free: list[tuple[int, int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(free, (sizes[index], -1))
        if at == len(free):
            bins.append([])
            room, place = capacity, len(bins) - 1
        else:
            room, place = free.pop(at)
        bins[place].append(index)
        if room > sizes[index]:
            bisect.insort(free, (room - sizes[index], place))
    return bins


class PackedRows:
    """Tokenized rows packed into rows of at most ``capacity`` tokens.

    ``rows[i]`` has ``"attention_mask"`` int64 ``[L]`` with the number of the segment (from 1) at every token, besides
    what ``TokenRows`` gives.
    """

    classes = False

    def __init__(self, rows: SingleRows, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.bins = pack(rows.lengths, capacity)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Item:
        items = [self.rows[i] for i in self.bins[index]]
        joined = {name: np.concatenate([item[name] for item in items]) for name in items[0]}
        counts = [len(item["input_ids"]) for item in items]
        joined["attention_mask"] = np.repeat(np.arange(1, len(items) + 1), counts).astype(np.int64)
        return joined

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every packed row, int64 ``[N]``."""
        lengths = self.rows.lengths
        return np.array([sum(int(lengths[i]) for i in group) for group in self.bins], np.int64)

    @property
    def trained(self) -> np.ndarray:
        """Trained tokens of every packed row, int64 ``[N]``."""
        trained = self.rows.trained
        return np.array([sum(int(trained[i]) for i in group) for group in self.bins], np.int64)

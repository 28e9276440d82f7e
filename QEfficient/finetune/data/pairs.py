"""Data sets whose unit is a pair of tokenized rows: two answers to compare, or an answer and a mismatched one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from QEfficient.errors import InputError
from QEfficient.finetune.data.token_rows import IGNORE, Item, TokenRows

#: Names of the two rows of a unit.
PREFERENCE, JUDGED = ("chosen", "rejected"), ("answer", "mismatched")


class PairRows:
    """An indexable set of pairs; ``rows[i]`` is ``{name of the first: Item, name of the second: Item}`` and columns.

    Args:
        rows: rows 2i and 2i + 1 are pair i.
        names: of the two rows of a pair.
        columns: name -> array of any shape [pairs, …] whose i-th entry goes with pair i.
    """

    classes = False
    #: Of single tokens; the rows of a pair have their own.
    weights = None

    def __init__(
        self, rows: TokenRows, names: tuple[str, str], columns: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self.rows, self.names, self.columns = rows, names, dict(columns or {})

    @classmethod
    def of_judged(cls, rows: TokenRows, most: int) -> PairRows:
        """Judged answers, each beside the previous row's answer to its prompt, which tells how far the policy is off.

        Args:
            rows: with ``desirable``.
            most: tokens a mismatched row may have; its answer is cut to that.

        Raises:
            InputError: there is one row only, so that no answer belongs to another prompt.
        """
        if len(rows) < 2:
            raise InputError("method='kto' compares answers with those to other prompts: give it two rows or more.")
        assert rows.desirable is not None
        items: list[Item] = []
        for index in range(len(rows)):
            items += [rows[index], _mismatched(rows[index], rows[index - 1], most)]
        offsets = np.concatenate([[0], np.cumsum([len(item["input_ids"]) for item in items])]).astype(np.int64)
        joined = {name: np.concatenate([item[name] for item in items]) for name in ("input_ids", "labels")}
        pairs = TokenRows(joined["input_ids"], joined["labels"], offsets, np.repeat(rows.numbers, 2))
        return cls(pairs, JUDGED, {"desirable": np.asarray(rows.desirable)})

    def __len__(self) -> int:
        return len(self.rows) // 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        first, second = self.names
        columns = {name: values[index] for name, values in self.columns.items()}
        return {first: self.rows[2 * index], second: self.rows[2 * index + 1], **columns}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of both rows of every pair, int64 ``[pairs]``."""
        return self.rows.lengths.reshape(-1, 2).sum(axis=1)

    @property
    def trained(self) -> np.ndarray:
        """Trained tokens of every pair, int64 ``[pairs]``."""
        return self.rows.trained.reshape(-1, 2).sum(axis=1)

    @property
    def numbers(self) -> np.ndarray:
        """The row of the source that every pair came from, from 1 ``[pairs]``."""
        return np.asarray(self.rows.numbers).reshape(-1, 2)[:, 0]


def _mismatched(asked: Item, answered: Item, most: int) -> Item:
    """The prompt of one row with the answer of another."""
    begin, other = (int(np.flatnonzero(item["labels"] != IGNORE)[0]) for item in (asked, answered))
    prompt = asked["input_ids"][: min(begin, most - 1)]
    ids = np.concatenate([prompt, answered["input_ids"][other:]])[:most]
    labels = np.concatenate([np.full_like(prompt, IGNORE), answered["labels"][other:]])[:most]
    return {"input_ids": ids, "labels": labels}

"""Tokenized rows in flat arrays: small in memory, quick to save, read back without unpickling anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from QEfficient.finetune.data.encode import Encoded

IGNORE = -100

#: What a row of a batch is made of.
Item = dict[str, np.ndarray]


class TokenRows:
    """An indexable, iterable set of tokenized rows.

    ``rows[i]`` is ``{"input_ids": int64 [L], "labels": int64 [L]}``, with ``"weights": float32 [L]`` where a row
    has weights other than 0 and 1; for classification ``"labels"`` is an int64 scalar array; ``"desirable"``, a bool
    scalar array, where answers are judged.

    Args:
        ids: all tokens ``[T]``; labels: -100 or the token ``[T]``, or the class of every row ``[N]``.
        offsets: where each row starts, and the end ``[N + 1]``.
        numbers: the row of the source each came from, from 1 ``[N]``.
        weights: ``[T]`` or None.
        classes: whether labels are classes.
        desirable: bool ``[N]``, whether each answer is good, or None.
    """

    def __init__(
        self,
        ids: np.ndarray,
        labels: np.ndarray,
        offsets: np.ndarray,
        numbers: np.ndarray,
        weights: np.ndarray | None = None,
        classes: bool = False,
        desirable: np.ndarray | None = None,
    ) -> None:
        self.ids, self.labels, self.offsets, self.numbers = ids, labels, offsets, numbers
        self.weights, self.classes, self.desirable = weights, classes, desirable

    @classmethod
    def from_encoded(cls, rows: Iterable[tuple[int, Encoded]], names: dict[str, int] | None = None) -> TokenRows:
        """Rows with the numbers of their source rows; ``names`` gives the class id of a label that is a string."""
        found = list(rows)
        lengths = [len(row.ids) for _, row in found]
        ids = np.array([i for _, row in found for i in row.ids], np.int64)
        weights = np.array([w for _, row in found for w in row.weights], np.float32)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        numbers = np.array([number for number, _ in found], np.int64)
        if names is not None:
            classes = [names.get(str(row.label), row.label) for _, row in found]
            return cls(ids, np.array(classes, np.int64), offsets, numbers, classes=True)
        # The first token of a row has nothing before it to be predicted from.
        weights[offsets[:-1]] = 0
        labels = np.where(weights != 0, ids, IGNORE)
        plain = np.isin(weights, (0.0, 1.0)).all()
        verdicts = [row.desirable for _, row in found]
        desirable = np.array(verdicts, bool) if verdicts and None not in verdicts else None
        return cls(ids, labels, offsets, numbers, None if plain else weights, desirable=desirable)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Item:
        # A numpy index past the end would wrap or give an empty row; iteration needs the IndexError.
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        span = slice(self.offsets[index], self.offsets[index + 1])
        if self.classes:
            return {"input_ids": self.ids[span], "labels": self.labels[index]}
        item = {"input_ids": self.ids[span], "labels": self.labels[span]}
        if self.weights is not None:
            item["weights"] = self.weights[span]
        if self.desirable is not None:
            item["desirable"] = self.desirable[index]
        return item

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, int64 ``[N]``."""
        return np.diff(self.offsets)

    @property
    def trained(self) -> np.ndarray:
        """Trained tokens of every row, int64 ``[N]``; 1 per row for classification."""
        if self.classes:
            return np.ones(len(self), np.int64)
        running = np.concatenate([[0], np.cumsum(self.labels != IGNORE)])
        return running[self.offsets[1:]] - running[self.offsets[:-1]]

    def _arrays(self) -> dict[str, np.ndarray]:
        found = {"ids": self.ids, "labels": self.labels, "offsets": self.offsets, "numbers": self.numbers}
        extra = {"weights": self.weights, "desirable": self.desirable}
        return found | {name: array for name, array in extra.items() if array is not None}

    def save(self, directory: Path, name: str) -> None:
        """Writes ``<name>.<array>.npy`` files into a directory."""
        for key, array in self._arrays().items():
            np.save(directory / f"{name}.{key}.npy", array, allow_pickle=False)

    @classmethod
    def load(cls, directory: Path, name: str, classes: bool) -> TokenRows:
        """Rows that ``save`` wrote; the arrays stay on disk until they are read."""

        def read(key: str) -> Any:
            return np.load(directory / f"{name}.{key}.npy", mmap_mode="r", allow_pickle=False)

        extra = {key: read(key) for key in ("weights", "desirable") if (directory / f"{name}.{key}.npy").is_file()}
        return cls(read("ids"), read("labels"), np.array(read("offsets")), read("numbers"), classes=classes, **extra)

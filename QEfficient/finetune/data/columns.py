"""Rows with further columns, which were computed once for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from QEfficient.finetune.data.loader import Rows


class WithColumns:
    """The same rows; ``rows[i]`` also has the i-th entry of every column.

    Args:
        rows: any set of rows.
        columns: name -> array ``[rows, …]``.
    """

    classes = False

    def __init__(self, rows: Rows, **columns: np.ndarray) -> None:
        self.rows, self.columns = rows, columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], **{name: values[index] for name, values in self.columns.items()}}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, int64 ``[N]``."""
        return self.rows.lengths

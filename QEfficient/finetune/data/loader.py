"""Batches in order, epoch after epoch, with a position that can be saved and restored in the middle of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from QEfficient.errors import OptionError
from QEfficient.finetune.data.batching import BatchOrder
from QEfficient.finetune.data.collate import Batch, without_labels
from QEfficient.finetune.data.token_rows import Item


class Rows(Protocol):
    """What a loader needs of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...

    @property
    def lengths(self) -> np.ndarray: ...


def check_position(state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuses a saved position that depends on something else.

    Raises:
        OptionError: naming what differs.
    """
    for name, value in identity.items():
        if state.get(name) != value:
            raise OptionError(
                f"The saved position is for {name}={state.get(name)!r} and this run has {value!r}: resume with the "
                "data and options the run began with."
            )


class BatchLoader:
    """Iterable over batches; every iteration is one epoch, and the epoch after it follows on its own.

    Args:
        dataset: rows.
        order: which rows are in which batch.
        collate: makes a batch of a list of rows.
        fingerprint: identifies the data; a saved position is only valid for the same.
    """

    def __init__(
        self,
        dataset: Rows,
        order: BatchOrder,
        collate: Callable[[Sequence[Mapping[str, Any]]], Batch],
        fingerprint: str = "",
    ) -> None:
        self.dataset, self.batch_sampler, self.collate_fn = dataset, order, collate
        self._fingerprint = fingerprint
        self._batch = 0
        self._resume_at = 0

    @property
    def batch_size(self) -> int:
        """Rows of a batch; the last may have fewer."""
        return self.batch_sampler.batch_size

    @property
    def epoch(self) -> int:
        """The epoch that is iterated now, or next."""
        return self.batch_sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that is iterated next; a restored position within the same epoch stays."""
        if epoch != self.epoch:
            self._resume_at = self._batch = 0
        self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        batches = self.batch_sampler.batches(epoch)
        start, self._resume_at = self._resume_at, 0
        self._batch = start
        for number in range(start, len(batches)):
            batch = self.collate_fn([self._item(index) for index in batches[number]])
            # Counted before it is handed out: once the caller has it, the next is due.
            self._batch = number + 1
            yield batch
        self._batch = 0
        self.batch_sampler.set_epoch(epoch + 1)

    def _item(self, index: int) -> Mapping[str, Any]:
        return without_labels(self.dataset[0]) if index < 0 else self.dataset[index]

    def _identity(self) -> dict[str, Any]:
        order = self.batch_sampler
        return {
            "data": self._fingerprint,
            "rows": order.count,
            "batch_size": order.batch_size,
            "world_size": order.world_size,
            "seed": order.seed,
            "shuffle": order.shuffle,
            "grouped": order.lengths is not None,
            "drop_last": order.drop_last,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position as plain JSON values: epoch, batches of it that were handed out, and what they depend on."""
        return {"epoch": self.epoch, "batch": self._batch, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state_dict`` was called: the next iteration gives the rest of that epoch.

        Raises:
            OptionError: the state is of other data, another batch size or another seed.
        """
        check_position(state, self._identity())
        batch = int(state["batch"])
        epoch = int(state["epoch"])
        if batch >= len(self):
            batch, epoch = 0, epoch + 1
        self.batch_sampler.set_epoch(epoch)
        self._resume_at = self._batch = batch

"""Batches of a stream: the same global batches for any number of ranks, and a position that can be saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.data.collate import Batch, without_labels
from QEfficient.finetune.data.loader import check_position
from QEfficient.finetune.data.stream import Position, StreamRows
from QEfficient.finetune.data.token_rows import Item
from QEfficient.finetune.keywords import integer


class StreamLoader:
    """Iterable over batches; every iteration is one pass over the source, and the pass after it follows on its own.

    Every rank reads the whole stream and keeps its share of each global batch, so ranks never disagree. The last batch
    of a pass may be short; a rank without a row of it gets one that trains nothing.

    Args:
        rows: the stream.
        batch_size: rows of a batch of one rank.
        collate: makes a batch of a list of rows.
        fingerprint: identifies the data; a saved position is only valid for the same.
        seed, shuffle, drop_last, rank, world_size: as for `BatchOrder`.

    Raises:
        OptionError: a number out of range.
    """

    def __init__(
        self,
        rows: StreamRows,
        batch_size: int,
        collate: Callable[[Sequence[Mapping[str, Any]]], Batch],
        fingerprint: str = "",
        *,
        seed: int = 42,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rows, self.collate_fn, self._fingerprint = rows, collate, fingerprint
        self.batch_size = integer("batch_size", batch_size)
        self.world_size = integer("world_size", world_size)
        self.rank = integer("rank", rank, minimum=0)
        if self.rank >= self.world_size:
            raise OptionError(f"rank={rank} does not exist among world_size={world_size}.")
        self.seed, self.shuffle, self.drop_last = integer("seed", seed, minimum=0), shuffle, drop_last
        self._at = Position()

    def __iter__(self) -> Iterator[Batch]:
        begin = self._at
        for rows, after in self.one_pass(begin):
            # Counted before it is handed out: once the caller has it, the next is due.
            self._at = after
            yield self.collate_fn(rows)
        self._at = _next_pass(begin)

    def one_pass(self, at: Position) -> Iterator[tuple[list[Item], Position]]:
        """This rank's rows of each batch of the rest of a pass, and the position after the batch.

        Raises:
            InputError: a row that cannot be used, see `StreamRows`, or a whole pass without a batch.
        """
        size, group, given = self.batch_size * self.world_size, list[Item](), at != Position(at.epoch)
        for item, after in self.rows.one_pass(at, seed=self.seed, shuffle=self.shuffle):
            group.append(item)
            if len(group) == size:
                yield self._mine(group), after
                group, given = [], True
        if group and not self.drop_last:
            yield self._mine(group), _next_pass(at)
        elif not given:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in self.rows.left_out.items())
            raise InputError(
                f"{self.rows.stream.name} has no batch of {size} rows that can be trained on"
                + (f" ({reasons})" if reasons else "")
                + ": check the data, filters and batch_size."
            )

    def endless(self, at: Position) -> Iterator[tuple[list[Item], Position]]:
        """`one_pass` after `one_pass`."""
        while True:
            yield from self.one_pass(at)
            at = _next_pass(at)

    def _mine(self, group: Sequence[Item]) -> list[Item]:
        # Strided, as in BatchOrder.
        return list(group[self.rank :: self.world_size]) or [dict(without_labels(group[0]))]

    def identity(self) -> dict[str, Any]:
        """What a saved position depends on."""
        return {
            "data": self._fingerprint,
            "rows_of_all_ranks": self.batch_size * self.world_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches handed out, as plain JSON values, and what it depends on."""
        return {**dataclasses.asdict(self._at), **self.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state_dict`` was called: the next iteration gives the rest of that pass.

        Raises:
            OptionError: the state is of other data, another batch size or another seed.
        """
        check_position(state, self.identity())
        self._at = _read(state)


class NumberedBatches:
    """An endless stream as a data set of batches for torch's ``DataLoader``: item n is the rows of batch n.

    Going forward reads on; going back begins anew. With a saved position, nothing before it is read again but the
    buffer it is in.

    Args:
        loader: cuts the batches.
        count: how many there are.
        saved: what `state` gave, or None. It is used where it fits: of the same data and sizes, and of a batch that is
            asked for.
    """

    def __init__(self, loader: StreamLoader, count: int, saved: Mapping[str, Any] | None = None) -> None:
        self._loader, self._count = loader, count
        fits = saved is not None and all(saved.get(name) == value for name, value in loader.identity().items())
        #: A batch, and the position before it: where to begin for that batch and those after it.
        self._known = (int(saved["batch"]), _read(saved)) if saved is not None and fits else (0, Position())
        self._begin(0)

    def _begin(self, number: int) -> None:
        self._number, self._at = self._known if self._known[0] <= number else (0, Position())
        self._batches = self._loader.endless(self._at)

    def __len__(self) -> int:
        return self._count

    def __getitems__(self, numbers: Sequence[int]) -> list[Item]:
        """This rank's rows of the one batch whose number is given."""
        (number,) = numbers
        if number < self._number or self._number < self._known[0] <= number:
            self._begin(number)
        while True:
            rows, self._at = next(self._batches)
            self._number += 1
            if self._number > number:
                return rows

    def state(self) -> dict[str, Any]:
        """The number of the next batch and where the stream is, as plain JSON values."""
        return {"batch": self._number, **dataclasses.asdict(self._at), **self._loader.identity()}


def _next_pass(at: Position) -> Position:
    return Position(at.epoch + 1)


def _read(state: Mapping[str, Any]) -> Position:
    return Position(*(int(state[field.name]) for field in dataclasses.fields(Position)))

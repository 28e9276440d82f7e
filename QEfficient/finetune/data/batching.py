"""Which rows are in which batch: a pure function of (seed, epoch), the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from QEfficient.errors import OptionError
from QEfficient.finetune.keywords import integer

#: Batches whose rows are sorted together when grouping by length: Hugging Face's number.
GROUPED_BATCHES = 50

#: What a permutation is for, so that the same seed gives unrelated ones.
ORDER, SPLIT, SAMPLE, MIX, STREAM = 1, 2, 3, 4, 5


def permutation(count: int, seed: int, purpose: int, epoch: int = 0, *more: int) -> np.ndarray:
    """The numbers 0 … count-1 in an order that depends on the arguments only, int64 ``[count]``."""
    # RandomState is frozen by numpy's compatibility policy (NEP 19); a Generator's streams may change.
    source = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, purpose, epoch, *more])))
    return source.permutation(count)


def row_order(
    count: int,
    seed: int,
    epoch: int,
    *,
    shuffle: bool = True,
    lengths: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 1,
) -> np.ndarray:
    """The order of rows in an epoch.

    Args:
        count: rows.
        seed, epoch: what the order depends on; without ``shuffle`` it depends on neither.
        lengths: tokens of every row ``[count]``, to put rows of like length into the same batch: rows are shuffled,
            then sorted by length, longest first, in groups of ``GROUPED_BATCHES`` batches, and the longest of all
            comes first, so that what does not fit into memory shows at once.
        batch_size: rows of a batch; only used with ``lengths``.

    Returns:
        A permutation, int64 ``[count]``.
    """
    order = permutation(count, seed, ORDER, epoch) if shuffle else np.arange(count)
    if lengths is None or not count:
        return order
    sizes = np.asarray(lengths)
    group = GROUPED_BATCHES * batch_size
    order = np.concatenate([_longest_first(order[start : start + group], sizes) for start in range(0, count, group)])
    longest = int(np.argmax(sizes[order]))
    order[[0, longest]] = order[[longest, 0]]
    return order


def _longest_first(rows: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-sizes[rows], kind="stable")]


class BatchOrder:
    """Lists of row indices, one per batch; iterable again and again. Fits ``DataLoader(batch_sampler=…)``.

    A short last batch is kept. With several ranks every rank gets equally many batches, and -1 stands for a row that
    fills a place and trains nothing.

    Args:
        count: rows.
        batch_size: rows of a batch of one rank.
        seed: of the order.
        shuffle, lengths: as in ``row_order``.
        drop_last: leave out a last batch that is short.
        rank, world_size: which process this is, and of how many.

    Raises:
        OptionError: a number out of range, or ``drop_last`` leaves nothing.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int = 42,
        *,
        shuffle: bool = True,
        lengths: Sequence[int] | np.ndarray | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.count = integer("the number of rows", count)
        self.batch_size = integer("batch_size", batch_size)
        self.seed = integer("seed", seed, minimum=0)
        self.world_size = integer("world_size", world_size)
        self.rank = integer("rank", rank, minimum=0)
        if self.rank >= self.world_size:
            raise OptionError(f"rank={rank} does not exist among world_size={world_size}.")
        self.shuffle, self.lengths, self.drop_last = shuffle, lengths, drop_last
        self.epoch = 0
        if not len(self):
            raise OptionError(f"drop_last leaves no batch of {batch_size} from {count} rows: lower batch_size.")

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order is given next."""
        self.epoch = integer("epoch", epoch, minimum=0)

    def __len__(self) -> int:
        size = self.batch_size * self.world_size
        return self.count // size if self.drop_last else -(-self.count // size)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches(self.epoch))

    def batches(self, epoch: int) -> list[list[int]]:
        """This rank's batches of an epoch."""
        size = self.batch_size * self.world_size
        order = row_order(
            self.count, self.seed, epoch, shuffle=self.shuffle, lengths=self.lengths, batch_size=size
        ).tolist()
        found = []
        for start in range(0, len(self) * size, size):
            # Strided, so that ranks get rows of like length where rows are sorted.
            mine = order[start : start + size][self.rank :: self.world_size]
            found.append(mine or [-1])
        return found

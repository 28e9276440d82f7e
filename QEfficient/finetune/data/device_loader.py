"""Batches made in the background while the last one is computed on, where the device that computes wants them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from QEfficient.finetune.data.collate import Batch
from QEfficient.finetune.data.loader import BatchLoader
from QEfficient.finetune.keywords import integer


class DeviceLoader:
    """A `BatchLoader` that works ahead. Its position is that of the batches handed out, not of those made.

    Args:
        loader: makes the batches.
        place: puts one where it is computed on.
        prefetch: batches made ahead; 0 makes each when it is asked for.
    """

    def __init__(self, loader: BatchLoader, place: Callable[[Batch], Mapping[str, Any]], prefetch: int = 2) -> None:
        self.loader, self._place = loader, place
        self.prefetch = integer("prefetch", prefetch, minimum=0)
        self._handed: dict[str, Any] | None = None

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        self._handed = self.loader.state_dict()
        batches = iter(self.loader)
        if not self.prefetch:
            while (made := self._next(batches)) is not None:
                yield self._hand_out(made)
            self._handed = None
            return
        # One thread, so that batches come in order; it computes in numpy, which lets go of the interpreter's lock.
        with ThreadPoolExecutor(1) as pool:
            waiting: deque[Future[Any]] = deque(pool.submit(self._next, batches) for _ in range(self.prefetch))
            while (made := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(self._next, batches))
                yield self._hand_out(made)
        self._handed = None

    def _next(self, batches: Iterator[Batch]) -> tuple[Mapping[str, Any], dict[str, Any]] | None:
        """The next batch and the position after it; None at the end."""
        batch = next(batches, None)
        return None if batch is None else (self._place(batch), self.loader.state_dict())

    def _hand_out(self, made: tuple[Mapping[str, Any], dict[str, Any]]) -> Mapping[str, Any]:
        batch, self._handed = made
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position as plain JSON values, as `BatchLoader.state_dict`."""
        return dict(self._handed or self.loader.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state_dict`` was called.

        Raises:
            OptionError: the state is of other data, another batch size or another seed.
        """
        self.loader.load_state_dict(state)
        self._handed = None

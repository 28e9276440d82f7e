"""A function over many items in several processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from QEfficient.targets.tuning import available_cores

_Result = TypeVar("_Result")

#: Items below which a process is not worth its start.
WORTH_IT = 2000
_CHUNK = 100


def processes_for(count: int, asked: int | None) -> int:
    """How many processes work on ``count`` items; ``asked`` None chooses one for few items, else one for every core."""
    if "fork" not in multiprocessing.get_all_start_methods() or multiprocessing.current_process().daemon:
        return 1  # what is worked with (a tokenizer, functions of the user's) is inherited, not sent
    wanted = (available_cores() if count >= WORTH_IT else 1) if asked is None else asked
    return max(1, min(wanted, count))


def in_order(work: Callable[[int], _Result], items: Sequence[int], processes: int) -> Iterator[_Result]:
    """``work`` of every item, in the order of the items; an error of ``work`` is raised when its turn comes."""
    if processes < 2:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, _begin, (work,)) as pool:
        yield from pool.imap(_do, items, chunksize=max(1, min(_CHUNK, len(items) // processes)))


_work: Callable[[int], Any]


def _begin(work: Callable[[int], Any]) -> None:
    """In a new process: keeps the function, and stops tokenizers from starting threads beside the processes."""
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _do(item: int) -> Any:
    return _work(item)

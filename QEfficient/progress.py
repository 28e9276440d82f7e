"""Progress a person can read: a callback type, a silent one, and a rich bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

#: Called with (stage, done, total); total 0 means unknown.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


@contextlib.contextmanager
def bar(title: str, enabled: bool | None = None) -> Iterator[Progress]:
    """A progress bar on stderr; ``enabled=None`` shows it only on a terminal. It disappears when the work is done."""
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(title, total=None)

        def report(stage: str, done: int, total: int) -> None:
            display.update(task, description=f"{title}: {stage}", completed=done, total=total or None)

        yield report

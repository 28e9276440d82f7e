"""``qefficient doctor``: what works on this machine and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from QEfficient.cli.cache import human_size
from QEfficient.cli.common import CacheDir
from QEfficient.errors import QEfficientError
from QEfficient.store.home import cache_home

if TYPE_CHECKING:
    from QEfficient.targets.base import Availability


def doctor(cache_dir: CacheDir = None) -> None:
    """Shows which targets can compile and run here, what is installed and how much room there is.

    Exits with 1 when no target can run.

    [bold]Example[/bold]

    qefficient doctor
    """
    from QEfficient.cli.installed import DISTRIBUTION, EXPORT, requirements, version
    from QEfficient.targets.registry import TARGETS

    console = Console()
    checks = [_check(name) for name in sorted(TARGETS)]
    targets = Table("Target", "Compiles", "Runs", "Details", title="Targets", title_justify="left")
    for check in checks:
        details = "\n".join([check.detail, *check.missing])
        targets.add_row(check.target, _yes(check.can_compile), _yes(check.can_run), escape(details))
    console.print(targets)
    console.print(_libraries())
    missing = [name for name in requirements(EXPORT) if version(name) is None]
    if missing:
        hint = f"pip install '{DISTRIBUTION}[{EXPORT}]'"
        console.print(f"Packages run; exporting a checkpoint needs {', '.join(missing)}: {hint}\n", markup=False)
    else:
        console.print("Everything for exporting checkpoints is installed.\n", markup=False)
    console.print(_machine(cache_dir))
    if not any(check.can_run for check in checks):
        raise typer.Exit(1)


def _check(name: str) -> Availability:
    from QEfficient.targets.base import Availability
    from QEfficient.targets.registry import get_target

    try:
        return get_target(name).check()
    except ImportError as error:
        # The target's own runtime is what is missing.
        return Availability(name, False, False, f"{error}", ("pip install qefficient",))


def _libraries() -> Table:
    from QEfficient.cli.installed import DISTRIBUTION, EXPORT, requirements, version

    table = Table("Library", "Installed", "Wanted", "For", title="Libraries", title_justify="left")
    table.add_row(DISTRIBUTION, version(DISTRIBUTION) or "?", "", "")
    table.add_row("python", platform.python_version(), "", "")
    for extra, purpose in ((None, "running packages"), (EXPORT, "exporting checkpoints")):
        for name, wanted in requirements(extra).items():
            table.add_row(name, version(name) or "[red]missing[/red]", escape(wanted), purpose)
    return table


def _machine(cache_dir: Path | None) -> Table:
    table = Table(show_header=False, title="Machine", title_justify="left")
    table.add_row("system", escape(f"{platform.system()} {platform.release()} {platform.machine()}"))
    table.add_row("cores", str(_cores()))
    table.add_row("memory", human_size(_memory()))
    try:
        home = cache_home(cache_dir)
        free = human_size(shutil.disk_usage(home).free)
        table.add_row("cache", f"{escape(str(home))}\n{free} free")
    except QEfficientError as error:
        table.add_row("cache", f"[red]{escape(str(error))}[/red]")
    return table


def _cores() -> int:
    """Cores this process may use; fewer than the machine has inside many containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    """Bytes this process may use: the machine's memory or, in a container, its limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _yes(value: bool) -> str:
    return "[green]yes[/green]" if value else "[red]no[/red]"

"""``qefficient cache``: list, verify and clean up the artefacts kept on this machine."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from QEfficient.errors import OptionError, QEfficientError
from QEfficient.store.home import cache_home
from QEfficient.store.store import ArtifactStore, EntryInfo, GcReport

app = typer.Typer(
    name="cache",
    help="List, verify and clean up the exports and packages kept on this machine. "
    "They live in --cache-dir, else in $QEFF_HOME, else in the user's cache directory; "
    "whatever is removed is built again when it is needed.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_UNITS = {"": 1, **{f"{letter}": 1000**power for power, letter in enumerate("KMGT", 1)}}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)(B?)\s*", re.IGNORECASE)

CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        help="Cache to work on, instead of $QEFF_HOME or the user's cache directory.",
        show_default=False,
    ),
]


@app.command("ls")
def ls(cache_dir: CacheDir = None) -> None:
    """Shows every entry with its size, and what removing it would free.

    "Size" adds up the files. "Frees" is less where files are shared with a checkpoint or another entry.
    """
    console = Console()
    with _errors_in_one_line():
        store = ArtifactStore(cache_home(cache_dir))
        entries = store.entries()
        if not entries:
            console.print(f"The cache {store.home} is empty.", markup=False, soft_wrap=True)
            return
        console.print(_entry_table(entries))
        total = human_size(sum(entry.size_unique for entry in entries))
        console.print(f"{len(entries)} entries, {total} in {store.home}", markup=False, soft_wrap=True)


@app.command("verify")
def verify(cache_dir: CacheDir = None) -> None:
    """Rereads every byte of every entry and compares it with what was written.

    Exits with 1 if something is damaged or does not belong in the cache. Nothing is changed:
    `qefficient cache gc` cleans up after killed runs, and a damaged entry is built again when it is needed.
    """
    console = Console()
    with _errors_in_one_line():
        store = ArtifactStore(cache_home(cache_dir))
        count = len(store.entries())
        with console.status(f"Hashing {count} entries"):
            problems = store.verify_all()
    if not problems:
        console.print(f"{count} entries, all intact, in {store.home}", markup=False, soft_wrap=True)
        return
    table = Table("Where", "Problem")
    for problem in problems:
        table.add_row(_text(str(problem.path.relative_to(store.home))), _text(problem.message))
    console.print(table)
    console.print(f"{len(problems)} problems in {store.home}", markup=False, soft_wrap=True)
    raise typer.Exit(1)


@app.command("gc")
def gc(
    max_age_days: Annotated[
        float | None,
        typer.Option(help="Remove entries not used for this many days.", show_default=False),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            help='Remove entries, least recently used first, until the cache fits, e.g. "10GB" or "512MiB". '
            "Files shared with a checkpoint do not count: removing them frees nothing.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all entries.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Removes old entries and whatever killed runs left behind.

    Without a limit only leftovers go and every entry stays. Entries that a process is working on are skipped.

    Examples: `qefficient cache gc --max-age-days 30`, `qefficient cache gc --max-size 10GB --dry-run`.
    """
    console = Console()
    with _errors_in_one_line():
        max_bytes = None if max_size is None else parse_size(max_size)
        store = ArtifactStore(cache_home(cache_dir))
        report = store.gc(max_age_days, max_bytes, everything, dry_run)
    if report.removed:
        console.print(_entry_table(report.removed))
    console.print(_summary(report), markup=False, soft_wrap=True)


def parse_size(text: str) -> int:
    """Bytes from text such as "10GB" (powers of 1000), "10GiB" (of 1024) or "1000"; raises OptionError."""
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise OptionError(f'{text!r} is not a size: write for example "10GB", "512MiB" or a number of bytes.')
    number, letter, binary = float(match[1]), match[2].upper(), match[3]
    unit = _UNITS[letter]
    if binary:
        unit = 1024 ** "KMGT".index(letter) * 1024
    return int(number * unit)


def human_size(size: int) -> str:
    """Bytes as people write them, in powers of 1000: "0 B", "1.5 GB"."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        # 999.95 rounds to 1000.0: that is one of the next unit.
        if value < 999.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _entry_table(entries: list[EntryInfo]) -> Table:
    table = Table("Kind", "Key", "Label", title=None)
    for name in ("Size", "Frees"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Created", no_wrap=True)
    table.add_column("Last used", no_wrap=True)
    for entry in entries:
        table.add_row(
            entry.kind,
            entry.key[:12],
            _text(entry.label),
            human_size(entry.size_apparent),
            human_size(entry.size_reclaimable),
            _day(entry.created),
            _day(entry.last_used),
        )
    return table


def _summary(report: GcReport) -> str:
    verb = "Would remove" if report.dry_run else "Removed"
    parts = [f"{len(report.removed)} entries ({human_size(report.freed_bytes)})"]
    parts += [f"{len(report.damaged)} damaged entries"] if report.damaged else []
    parts += [f"{len(report.stale_tmp)} leftovers of killed runs"] if report.stale_tmp else []
    records = report.orphan_locks + report.orphan_memos
    parts += [f"{records} unneeded locks and digests"] if records else []
    skipped = f" Skipped {len(report.skipped)} entries in use." if report.skipped else ""
    return f"{verb} {', '.join(parts)}.{skipped}"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _text(text: str) -> str:
    # A label such as "model [fp16]" is not markup.
    return escape(text)


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    # 2, because 1 is the answer "there are problems" of verify.
    try:
        yield
    except QEfficientError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error

"""Small pieces of Markdown that every table of the report is made of."""

from __future__ import annotations

from collections.abc import Sequence

from peers.stats import Spread

#: Where there is nothing to say.
NOTHING = "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """Lines of a table whose first column is text and whose others are numbers or not; no rows, no table."""
    if not rows:
        return []
    align = ["---", *["--:" if numbers else "---"] * (len(head) - 1)]
    return [_line(head), _line(align), *(_line([*row, *[""] * (len(head) - len(row))]) for row in rows), ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: float | None) -> str:
    """About three significant digits, without an exponent."""
    if value is None:
        return NOTHING
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def between(spread: Spread) -> str:
    """Smallest and largest value."""
    return f"{number(spread.low)}–{number(spread.high)}"


def times(ratio: float | None) -> str:
    """A ratio as the report writes it."""
    return NOTHING if ratio is None else f"{ratio:.2f}×"


def megabytes(size: float | None) -> str:
    """Bytes as MB of 10^6 bytes."""
    return NOTHING if size is None else number(size / 1e6)

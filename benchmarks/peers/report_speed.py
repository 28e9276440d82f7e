"""The tables of prefill, decode and cold start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shapes import shape_named

from peers.contenders import GROUPS, OURS
from peers.markdown import NOTHING, between, megabytes, number, table, times
from peers.stats import bandwidth_share, rate, speedup, spread

Row = dict[str, Any]
GROUP_TITLES = {"float": "float weights", "int8": "8-bit weights", "int4": "4-bit weights"}


def reference(rows: Sequence[Row], row: Row) -> Row | None:
    """Our row that another is compared with: of the same class and shape, and of the same batch of turns."""
    same = ("shape", "group", "batch")
    return next((r for r in rows if r["engine"] == OURS and all(r.get(k) == row.get(k) for k in same)), None)


def compared(rows: Sequence[Row], row: Row, key: str) -> float | None:
    """How many times as fast we were; None without a common round, and for our own reference row."""
    ours = reference(rows, row)
    if ours is None or ours is row:
        return None
    return speedup(ours.get(key, []), row.get(key, []))


def shown(rows: Sequence[Row], group: str) -> list[Row]:
    """A class's rows, each contender once: we take part in every batch of turns."""
    seen: dict[str, Row] = {}
    for row in rows:
        if row["group"] == group:
            seen.setdefault(row["title"], row)
    return list(seen.values())


def decode_section(rows: Sequence[Row], bandwidth: float) -> list[str]:
    def cells(row: Row) -> list[str]:
        speed = rate(row["new"], row["decode_s"])
        per_token = row["bytes_per_token"]
        share = bandwidth_share(per_token, speed.median, bandwidth)
        return [
            number(speed.median),
            between(speed),
            times(compared(rows, row, "decode_s")),
            megabytes(per_token),
            f"{share:.0%}",
            number(row["peak_mb"]),
            megabytes(row["bytes"]),
        ]

    def title(some: Sequence[Row]) -> str | None:
        new = some_value(some, "new")
        return f", {new} tokens after {some_value(some, 'prompt')}" if new else None

    head = ["tokens/s", "min–max", "ours is", "MB per token", "of bandwidth", "peak memory, MB", "files, MB"]
    return ["## Decode: one text at a time", "", *_per_shape(rows, title, head, cells, "decode_s")]


def prefill_section(rows: Sequence[Row]) -> list[str]:
    def cells(row: Row) -> list[str]:
        speed = rate(row["prompt"], row["prefill_s"])
        seconds = spread(row["prefill_s"])
        return [number(speed.median), between(speed), times(compared(rows, row, "prefill_s")), number(seconds.median)]

    def title(some: Sequence[Row]) -> str:
        return f", {some_value(some, 'prompt')} tokens"

    head = ["tokens/s", "min–max", "ours is", "seconds"]
    return ["## Prefill: a prompt in one piece", "", *_per_shape(rows, title, head, cells, "prefill_s")]


def cold_section(rows: Sequence[Row]) -> list[str]:
    from peers.speed import COLD_PROMPT

    def cells(row: Row) -> list[str]:
        seconds = spread(row["seconds"])
        return [number(seconds.median), between(seconds), times(compared(rows, row, "seconds")), number(row["peak_mb"])]

    heading = f"## From the start of a process to its first token, {COLD_PROMPT}-token prompt"
    head = ["seconds", "min–max", "ours is", "peak memory, MB"]
    return [heading, "", *_per_shape(rows, lambda some: "", head, cells, "seconds")]


def _per_shape(
    rows: Sequence[Row],
    title: Callable[[Sequence[Row]], str | None],
    head: Sequence[str],
    cells: Callable[[Row], list[str]],
    key: str,
) -> list[str]:
    """A table and its sentences for each shape; ``title`` says what follows its name, None leaves the shape out."""
    lines: list[str] = []
    for name in dict.fromkeys(row["shape"] for row in rows):
        some = [row for row in rows if row["shape"] == name]
        after = title(some)
        if after is not None:
            lines += [f"### {shape_named(name).title}{after}", ""]
            lines += [*grouped(some, head, cells, key), *sentences(some, key)]
    return lines


def grouped(rows: Sequence[Row], head: Sequence[str], cells: Callable[[Row], list[str]], key: str) -> list[str]:
    """One table, the classes of precision one below the other; a contender without times says why."""
    body = []
    for group in GROUPS:
        found = shown(rows, group)
        if found:
            body.append([f"*{GROUP_TITLES[group]}*"])
        for row in found:
            body.append([row["title"], *(cells(row) if row.get(key) else [row.get("error", NOTHING)])])
    return table(["", *head], body)


def sentences(rows: Sequence[Row], key: str) -> list[str]:
    """In words, per class: how we compare with each peer, and which of them was the fastest."""
    lines = []
    for group in GROUPS:
        peers = [row for row in shown(rows, group) if row["engine"] != OURS and row.get(key)]
        ratios = [(compared(rows, row, key), row["title"]) for row in peers]
        known = sorted((ratio, title) for ratio, title in ratios if ratio is not None)
        if known:
            first = " (the fastest peer)" if len(known) > 1 else ""
            listed = [
                f"{ratio:.2f} times {title}{'' if place else first}" for place, (ratio, title) in enumerate(known)
            ]
            lines.append(f"- {GROUP_TITLES[group]}: the speed of this library is {', '.join(listed)}.")
    return [*lines, ""] if lines else []


def some_value(rows: Sequence[Row], key: str) -> Any:
    """A value all measured rows share."""
    return next((row[key] for row in rows if row.get(key) is not None), None)

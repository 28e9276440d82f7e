"""Prefill, decode and cold start of causal models: the rows of the three tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from shapes import Shape

from peers.contenders import GROUPS, Contender
from peers.prepare import Prepared, Row, Run, in_order, prepare, row
from peers.process import Message, PeerError, cold_start
from peers.turns import Player, batches, take_turns

#: Bytes of a weight in memory, where it is not the size in the file that counts.
FLOAT_BYTES = {"fp32": 4, "f32": 4, "bf16": 2}
COLD_PROMPT = 64


def prompt(shape: Shape, length: int, turn: int) -> list[int]:
    """Token ids, different in every round: some engines remember the state of a prompt they have seen."""
    chosen = np.random.default_rng([turn, length]).integers(3, shape.config["vocab_size"], length)
    return [int(token) for token in chosen]


def bytes_per_token(prepared: Prepared, shape: Shape, loaded: Message | None = None) -> int:
    """Weights that one decode step reads. Float weights may be computed in another width than they are stored in.

    Args:
        loaded: the answer to the command ``load``, which may say in which width.
    """
    width = FLOAT_BYTES.get(prepared.contender.precision)
    return prepared.weight_bytes if width is None else (loaded or {}).get("float_bytes", width) * shape.parameters


def prepare_all(
    run: Run, contenders: Sequence[Contender], shape: Shape, source: Path
) -> tuple[list[Prepared], list[Row]]:
    """(those whose files are ready, rows of those that failed)."""
    ready, failed = [], []
    for contender in contenders:
        try:
            ready.append(prepare(run, contender, source, shape.name, shape.context))
        except PeerError as error:
            if contender.engine not in run.missing:  # which was said at the start
                run.say(f"  {contender.title}: {error}")
            failed.append(row(contender, shape=shape.name, error=str(error)))
    return ready, failed


def measure_speed(run: Run, shape: Shape, source: Path, contenders: Sequence[Contender], new: int) -> list[Row]:
    """Prefill and, when ``new`` is not 0, decode; one class of precisions after the other, interleaved inside."""
    rows = []
    for group in GROUPS:
        ready, failed = prepare_all(run, [c for c in contenders if c.group == group], shape, source)
        rows += failed
        if not ready:
            continue
        run.say(f"{shape.name}: {group}, {len(ready)} contenders in turn")
        turns = batches(run, ready, shape.context, lambda prepared: bytes_per_token(prepared, shape) / 1e6)
        for number, players in enumerate(turns):
            take_turns(
                run, players, lambda turn: {"do": "generate", "ids": prompt(shape, shape.prompt, turn), "new": new}
            )
            rows += [_speed_row(player, shape, new, number) for player in players]
    return in_order(rows, contenders)


def _speed_row(player: Player, shape: Shape, new: int, batch: int) -> Row:
    prepared = player.prepared
    found: dict[str, Any] = {
        "shape": shape.name,
        "batch": batch,
        "prompt": shape.prompt,
        "new": new,
        "prefill_s": [answer["prefill_s"] for answer in player.answers],
        "decode_s": [answer["decode_s"] for answer in player.answers],
        "bytes": prepared.bytes,
        "bytes_per_token": bytes_per_token(prepared, shape, player.loaded),
        "peak_mb": player.peak_mb,
    }
    return row(prepared.contender, **found, **({"error": player.error} if player.error else {}))


def measure_cold(run: Run, shape: Shape, source: Path, contenders: Sequence[Contender]) -> list[Row]:
    """From the start of a process to its first token, files in the page cache, a new process each time."""
    ready, rows = prepare_all(run, contenders, shape, source)
    times: dict[str, list[float]] = {prepared.contender.key: [] for prepared in ready}
    peaks: dict[str, list[float]] = {prepared.contender.key: [] for prepared in ready}
    failed: dict[str, str] = {}
    run.say(f"{shape.name}: cold starts of {len(ready)} contenders in turn")
    ids = prompt(shape, COLD_PROMPT, 0)
    for turn in range(run.rounds + 1):
        for prepared in ready:
            key = prepared.contender.key
            if key in failed:
                continue
            time.sleep(run.pause)
            try:
                elapsed, peak = cold_start(
                    run.launch(prepared.contender.engine), prepared.setup(run.threads, shape.context), ids
                )
            except PeerError as error:
                failed[key] = str(error)
                run.say(f"  {prepared.contender.title}: {error}")
                continue
            if turn:  # the first round brings files into the page cache
                times[key].append(elapsed)
                peaks[key].append(peak)
        run.say(f"  round {turn} of {run.rounds}")
    for prepared in ready:
        key = prepared.contender.key
        found = {"shape": shape.name, "seconds": times[key], "peak_mb": max(peaks[key], default=None)}
        rows.append(row(prepared.contender, **found, **({"error": failed[key]} if key in failed else {})))
    return in_order(rows, contenders)

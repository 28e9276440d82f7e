"""What making a package costs: a compile from an empty cache in a process of its own, and the peers' conversions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from shapes import Shape

from peers.contenders import Contender
from peers.prepare import Row, Run, conversion, prepare, row
from peers.process import PeerError, one_answer


def measure_compile(run: Run, shape: Shape, source: Path, contenders: Sequence[Contender], times: int) -> list[Row]:
    """Seconds and peak memory of whole processes, ours several times; peers once, from when their files were made."""
    rows = []
    for contender in contenders:
        try:
            if contender.ours:
                found = _compile(run, shape, source, contender, times)
            else:
                made = prepare(run, contender, source, shape.name, shape.context)
                found = {"seconds": [made.seconds], "peak_mb": [made.peak_mb], "bytes": made.bytes}
        except PeerError as error:
            if contender.engine not in run.missing:
                run.say(f"  {contender.title}: {error}")
            found = {"error": str(error)}
        rows.append(row(contender, shape=shape.name, **found))
    return rows


def _compile(run: Run, shape: Shape, source: Path, contender: Contender, times: int) -> Row:
    home = run.work / "compile-home"
    starter = run.launch(contender.engine, QEFF_HOME=str(home), BENCH_CONTEXT=str(shape.context))
    seconds, peaks, size = [], [], 0
    try:
        for turn in range(times):
            run.say(f"{shape.name}: compiling {contender.title} from nothing, {turn + 1}")
            shutil.rmtree(home, ignore_errors=True)
            made = one_answer(starter, "--convert", conversion(contender, source, home / "unused"))
            seconds.append(made["seconds"])
            peaks.append(made["peak_mb"])
            size = made["bytes"]
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return {"seconds": seconds, "peak_mb": peaks, "bytes": size}

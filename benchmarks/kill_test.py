"""Kills `from_pretrained(...).compile()` at random moments and checks that the next run succeeds and nothing is broken.

    python benchmarks/kill_test.py CHECKPOINT [--kills 30] [--home DIR] [--seed 0]

Each round starts with a fresh cache; within a round the kills follow each other on what the last one left. A kill falls
between 0 and the measured duration of an undisturbed run, in the export, the compile step or between them.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from QEfficient.store.store import ArtifactStore

#: Kills on one cache before it is emptied.
ROUND = 3

#: Imported once, in the server that the processes are forked from: a kill should meet work, not imports.
PRELOAD = ["torch", "transformers", "QEfficient.models.auto", "QEfficient.exporter.program", "onnxruntime"]


@dataclass
class Outcome:
    """What the kills did.

    Attributes:
        kills: processes killed.
        interrupted: kills that fell before the work was done.
        duration_s: an undisturbed export and compile, in seconds.
        problems: what was wrong after a kill; empty when all is well.
    """

    kills: int = 0
    interrupted: int = 0
    duration_s: float = 0.0
    problems: list[str] = field(default_factory=list)


def kill_rounds(checkpoint: Path, home: Path, kills: int = 30, seed: int = 0) -> Outcome:
    """Kills ``kills`` processes that compile ``checkpoint`` into ``home``, which is emptied every few kills."""
    chance = random.Random(seed)
    outcome = Outcome()
    outcome.duration_s, expected = _whole_run(checkpoint, home, outcome)
    shutil.rmtree(home, ignore_errors=True)
    while outcome.kills < kills:
        for _ in range(min(ROUND, kills - outcome.kills)):
            if _kill_one(checkpoint, home, chance, outcome):
                break  # all is done: more kills on this cache would meet no work
        _, ids = _whole_run(checkpoint, home, outcome)
        if ids != expected:
            outcome.problems.append(f"after kill {outcome.kills} the package answers {ids} instead of {expected}")
        outcome.problems += [f"{problem.path} {problem.message}" for problem in ArtifactStore(home).verify_all()]
        shutil.rmtree(home, ignore_errors=True)
    return outcome


def _kill_one(checkpoint: Path, home: Path, chance: random.Random, outcome: Outcome) -> bool:
    """Starts a process and kills it at a random moment; returns whether it had finished by then."""
    fresh = not home.exists()
    process, pipe = _start(checkpoint, home)
    start = time.monotonic()
    delay = chance.uniform(0, outcome.duration_s)
    finished = pipe.poll(delay)
    duration = time.monotonic() - start
    if finished and _received(pipe)[:1] != ["done"]:
        outcome.problems.append(f"the run before kill {outcome.kills + 1} failed by itself, its error is on stderr")
    if finished and fresh:  # the machine was busier when the duration was measured
        outcome.duration_s = duration
    process.kill()
    process.join()
    outcome.kills += 1
    outcome.interrupted += not finished
    _check_names(home, outcome)
    return finished


def _work(checkpoint: Path, home: Path, pipe: Connection) -> None:
    """In a process of its own: opens, exports, compiles and runs; says how far it is."""
    import torch

    from QEfficient import QEFFAutoModelForCausalLM

    torch.set_num_threads(1)
    model = QEFFAutoModelForCausalLM.from_pretrained(checkpoint, cache_home_dir=home)
    pipe.send("ready")
    model.compile(ctx_len=32)
    pipe.send("done")
    pipe.send(model.generate([[5, 9, 20, 31]], max_new_tokens=6).tolist())


def _start(checkpoint: Path, home: Path) -> tuple[Any, Connection]:
    """A process that is about to compile, and the pipe it talks through."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(checkpoint, home, theirs))
    process.start()
    theirs.close()
    if ours.recv() != "ready":
        raise RuntimeError("the process did not start")
    return process, ours


def _received(pipe: Connection) -> list[Any]:
    """Everything a process that has ended had said."""
    said = []
    with contextlib.suppress(EOFError):
        while True:
            said.append(pipe.recv())
    return said


def _whole_run(checkpoint: Path, home: Path, outcome: Outcome) -> tuple[float, object]:
    """An undisturbed run: (seconds of export and compile, generated ids); a failure becomes a problem."""
    process, pipe = _start(checkpoint, home)
    start = time.monotonic()
    pipe.poll(300)
    duration = time.monotonic() - start
    said = _received(pipe)
    process.join()
    if process.exitcode != 0 or len(said) != 2:
        outcome.problems.append(f"the run after kill {outcome.kills} failed, its error is on stderr")
        return duration, None
    return duration, said[1]


def _check_names(home: Path, outcome: Outcome) -> None:
    """Right after a kill: whatever lies in an entry's place is whole, and unfinished work lies in ``tmp/`` only."""
    left_over = "was left by a run that was killed"
    if home.is_dir():
        for problem in ArtifactStore(home).verify_all():
            if left_over not in problem.message or problem.path.parent != home / "tmp":
                outcome.problems.append(f"after kill {outcome.kills}: {problem.path} {problem.message}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="directory of a small causal checkpoint")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--home", type=Path, help="cache to use; it is emptied (default: a temporary directory)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.home is not None and arguments.home.exists() and any(arguments.home.iterdir()):
        parser.error(f"{arguments.home} is not empty, and this script would empty it")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        home = arguments.home or Path(scratch) / "home"
        outcome = kill_rounds(arguments.checkpoint, home, arguments.kills, arguments.seed)
    for problem in outcome.problems:
        print(problem)
    print(
        f"{outcome.kills} kills, {outcome.interrupted} of them during the work of {outcome.duration_s:.1f} s, "
        f"{len(outcome.problems)} problems, {time.monotonic() - start:.0f} s"
    )
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

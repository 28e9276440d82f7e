"""Kills `from_pretrained(...).compile()` at random moments and checks that the next run succeeds and nothing is broken.

    python benchmarks/kill_test.py CHECKPOINT [--kills 30] [--home DIR] [--seed 0]

Each round starts with a fresh cache; within a round the kills follow each other on what the last one left. A kill falls
between 0 and the measured duration of an undisturbed run, in the export, the compile step or between them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from QEfficient.store.store import ArtifactStore

#: Kills on one cache before it is emptied.
ROUND = 3

# The imports and the opening of the checkpoint come before "ready": they write nothing.
COMPILE = """
import json, sys
import torch, transformers
from QEfficient import QEFFAutoModelForCausalLM
import QEfficient.exporter.program

model = QEFFAutoModelForCausalLM.from_pretrained(sys.argv[1], cache_home_dir=sys.argv[2])
print("ready", flush=True)
package = model.compile(ctx_len=32)
print("done", flush=True)
tokens = model.generate([[5, 9, 20, 31]], max_new_tokens=6)
print(json.dumps({"package": str(package), "ids": tokens.tolist()}))
"""


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
            process = _start(checkpoint, home)
            time.sleep(chance.uniform(0, outcome.duration_s))
            process.send_signal(signal.SIGKILL)
            output, _ = process.communicate(timeout=60)
            outcome.kills += 1
            outcome.interrupted += "done" not in output
            _check_names(home, outcome)
        _, ids = _whole_run(checkpoint, home, outcome)
        if ids != expected:
            outcome.problems.append(f"after kill {outcome.kills} the package answers {ids} instead of {expected}")
        outcome.problems += [f"{problem.path} {problem.message}" for problem in ArtifactStore(home).verify_all()]
        shutil.rmtree(home, ignore_errors=True)
    return outcome


def _start(checkpoint: Path, home: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILE, str(checkpoint), str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    if first != "ready\n":
        raise RuntimeError(f"the process did not start: {process.communicate()[1]}")
    return process


def _whole_run(checkpoint: Path, home: Path, outcome: Outcome) -> tuple[float, object]:
    """An undisturbed run: (seconds of export and compile, generated ids); a failure becomes a problem."""
    process = _start(checkpoint, home)
    assert process.stdout is not None
    start = time.monotonic()
    process.stdout.readline()
    duration = time.monotonic() - start
    output, errors = process.communicate(timeout=300)
    if process.returncode != 0:
        last = errors.strip().splitlines()[-1:] or ["no message"]
        outcome.problems.append(f"the run after kill {outcome.kills} failed: {last[0]}")
        return duration, None
    return duration, json.loads(output.splitlines()[-1])["ids"]


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

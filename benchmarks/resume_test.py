"""Kills fine-tuning runs at random moments and checks that what continues ends with the bits of an undisturbed run.

    python benchmarks/resume_test.py MODEL DATA [--kills 10] [--steps 40] [--seed 0] [--max-ctx-len 64]

Every kill is a SIGKILL between a random optimizer step and the one after the next, so that some fall into the writing
of a checkpoint. A run saves after every step and is continued by the same call that began it. Compared are the adapter,
the optimizer's and the scheduler's state, and the logged loss, gradient norm and learning rate of every step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

#: Imported once, in the server that the processes are forked from: a kill should meet training, not imports.
PRELOAD = ["torch", "transformers", "peft", "onnxruntime", "QEfficient.finetune.refine"]
#: Most seconds between the end of a step and the kill: about what a tiny model's step with its checkpoint takes.
LATEST_KILL = 0.05


@dataclass
class Outcome:
    """What the kills did.

    Attributes:
        kills: runs killed.
        steps: optimizer steps of a whole run.
        continued_from: per kill, the step of the last complete checkpoint.
        unfinished: kills that left a half-written checkpoint behind.
        problems: what was wrong; empty when all is well.
    """

    kills: int = 0
    steps: int = 0
    continued_from: list[int] = field(default_factory=list)
    unfinished: int = 0
    problems: list[str] = field(default_factory=list)


def resume_rounds(
    model: Path, data: str, place: Path, kills: int = 10, steps: int = 40, seed: int = 0, max_ctx_len: int = 64
) -> Outcome:
    """Runs once undisturbed, then ``kills`` times with a kill and a continuation, in directories under ``place``."""
    chance, outcome = random.Random(seed), Outcome(steps=steps)
    whole = place / "whole"
    if _run(model, data, whole, steps, max_ctx_len) != list(range(1, steps + 1)):
        outcome.problems.append("the undisturbed run failed, its error is on stderr")
        return outcome
    for number in range(kills):
        output = place / f"killed-{number}"
        asked = chance.randrange(1, steps)
        _run(model, data, output, steps, max_ctx_len, asked, chance.uniform(0, LATEST_KILL))
        outcome.kills += 1
        left = [path.name for path in output.iterdir()]
        outcome.unfinished += any(name.startswith(".saving-") for name in left)
        last = max((int(name.split("-")[1]) for name in left if name.startswith("checkpoint-")), default=0)
        outcome.continued_from.append(last)
        done = _run(model, data, output, steps, max_ctx_len)
        label = f"kill {number + 1} after step {last}"
        if done != list(range(last + 1, steps + 1)):
            outcome.problems.append(f"{label}: the continued run did the steps {done}")
        else:
            outcome.problems += [f"{label}: {what}" for what in differences(whole, output, steps)]
        shutil.rmtree(output)
    return outcome


def differences(whole: Path, other: Path, steps: int) -> list[str]:
    """What differs between two finished runs, bit by bit."""
    found = []
    last = f"checkpoint-{steps}"
    for name in ("adapter_model.safetensors", f"{last}/adapter_model.safetensors"):
        if (whole / name).read_bytes() != (other / name).read_bytes():
            found.append(f"{name} differs")
    found += [f"{name} differs" for name in ("optimizer.pt", "scheduler.pt") if _differ(whole, other, last, name)]
    if _logged(whole) != _logged(other):
        found.append("the logged losses differ")
    if [row["step"] for row in _metrics(other)] != list(range(1, steps + 1)):
        found.append("metrics.jsonl has not one row per step")
    found += [f"{path.name} was left behind" for path in other.iterdir() if path.name.startswith(".")]
    return found


def _differ(whole: Path, other: Path, last: str, name: str) -> bool:
    import torch

    first, second = (torch.load(path / last / name, weights_only=True) for path in (whole, other))
    return not _equal(first, second)


def _equal(first: Any, second: Any) -> bool:
    """Whether nested containers hold the same bits."""
    import torch

    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(_equal(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def _metrics(output: Path) -> list[dict[str, Any]]:
    lines = (output / "logs" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def _logged(output: Path) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in _metrics(output)]


def _work(model: Path, data: str, output: Path, steps: int, max_ctx_len: int, pipe: Connection) -> None:
    """In a process of its own: trains, or continues; says the number of every step it did."""
    import torch
    from transformers import TrainerCallback

    from QEfficient.finetune import QEffConfig, QEfficient, QEffTrainingArgs

    class Tell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            pipe.send(state.global_step)

    torch.set_num_threads(1)
    config = QEffConfig(model_id=str(model), dataset_name=data, max_ctx_len=max_ctx_len, train_frac=1.0)
    args = QEffTrainingArgs(
        output, max_steps=steps, batch_size=3, gradient_accumulation_steps=2, learning_rate=5e-3, warmup_steps=3,
        lr_scheduler_type="cosine", weight_decay=0.01, save_steps=1, save_total_limit=2, logging_steps=1,
        num_cores=1, validate=False, plot=False, disable_tqdm=True,
    )  # fmt: skip
    QEfficient(config, args, callbacks=[Tell()]).refine(load=False, say=lambda message: None)


def _run(
    model: Path, data: str, output: Path, steps: int, max_ctx_len: int, kill_at: int | None = None, delay: float = 0
) -> list[int]:
    """The steps a process did until its end, or until it was killed ``delay`` seconds after step ``kill_at``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(model, data, output, steps, max_ctx_len, theirs))
    process.start()
    theirs.close()
    done: list[int] = []
    with contextlib.suppress(EOFError):
        while kill_at is None or kill_at not in done:
            done.append(ours.recv())
    if kill_at is not None:
        time.sleep(delay)
        process.kill()
    process.join()
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a small causal checkpoint")
    parser.add_argument("data", help="what to train on: a file, or 'sample'")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-ctx-len", type=int, default=64)
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        outcome = resume_rounds(
            arguments.model, arguments.data, Path(scratch), arguments.kills, arguments.steps, arguments.seed,
            arguments.max_ctx_len,
        )  # fmt: skip
    for problem in outcome.problems:
        print(problem)
    print(
        f"{outcome.kills} kills in runs of {outcome.steps} steps, continued from steps {outcome.continued_from}, "
        f"{outcome.unfinished} of them in the middle of a checkpoint, {len(outcome.problems)} differences, "
        f"{time.monotonic() - start:.0f} s"
    )
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What `torchrun` starts in test_ddp.py: refines the same model in several ways, each into a directory of its own.

torchrun --nproc-per-node 2 ddp_worker.py MODEL OUTPUT BATCH_SIZE

The second process kills itself once, in the middle of the first of the runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from QEfficient.finetune import QEffConfig, QEfficient, QEffTrainingArgs, step_package

#: Rows of a data set, of which one is held out: a global batch of 4 leaves nothing, three rows (two and one), and a
#: single row, so that one rank has nothing to train in the last batch; and the last of these as a stream.
COUNTS = {"even": 25, "uneven": 24, "idle": 26, "stream": 26}
#: The run that a process dies in after this step; it has a checkpoint of the step before.
KILLED, KILL_STEP = "killed", 4
#: No other test trains this rank, so that nobody has captured the step before.
LORA = {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
WORDS = ("ash", "birch", "cedar", "dogwood", "elm", "fir", "gum")


def rows(count: int) -> list[dict[str, str]]:
    """Answers of very different length, so that ranks have different numbers of trained tokens."""
    return [
        {"prompt": f"{WORDS[n % 7]} {n}:", "completion": " ".join([WORDS[n % 7]] * (1 + 3 * (n % 3)))}
        for n in range(count)
    ]


class Saves(TrainerCallback):
    """Counts how often this process was told to save, and who it is."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.steps.append(state.global_step)


class DiesOnce(TrainerCallback):
    """Kills this process after a step, unless a file says that it has been done."""

    def __init__(self, done: Path) -> None:
        self.done = done

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == KILL_STEP and args.process_index == 1 and not self.done.exists():
            self.done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Reduced:
    """Counts what `DistributedDataParallel` exchanges: bytes of gradients, and in how many calls."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        original = DistributedDataParallel.__init__

        def counting(module: DistributedDataParallel, *args: Any, **options: Any) -> None:
            original(module, *args, **options)
            module.register_comm_hook(None, self._reduce)

        DistributedDataParallel.__init__ = counting

    def _reduce(self, state, bucket):  # torch looks at annotations, and those of this file are texts
        self.sizes.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)


def refine(
    model: str, output: Path, batch_size: int, count: int, callbacks: tuple[Any, ...] = (), **options: Any
) -> Saves:
    """Two epochs with accumulation, clipping, decay and a schedule."""
    settings: dict[str, Any] = {
        "num_train_epochs": 2, "gradient_accumulation_steps": 2, "learning_rate": 2e-3, "weight_decay": 0.01,
        "max_grad_norm": 0.5, "lr_scheduler_type": "cosine", "warmup_steps": 2, "save_strategy": "epoch",
        "eval_strategy": "epoch", "logging_steps": 1, "num_cores": 1, "validate": False, "disable_tqdm": True,
    }  # fmt: skip
    what: dict[str, Any] = {"train_frac": 0.99}
    if output.name == "stream":
        # Fourteen batches are two passes of 25 rows.
        what = {"streaming": True, "shuffle_buffer_size": 8, "eval_rows": 1}
        settings |= {"max_steps": 7, "save_strategy": "steps", "save_steps": 4}
    config = QEffConfig(model_id=model, dataset_name=rows(count), max_ctx_len=64, seed=1, lora_config=LORA, **what)
    args = QEffTrainingArgs(output, batch_size=batch_size, **{**settings, **options})
    saves = Saves()
    QEfficient(config, args, callbacks=[saves, *callbacks]).refine(load=False, say=lambda message: None)
    return saves


def refine_killed(model: str, output: Path, batch_size: int, callbacks: tuple[Any, ...] = ()) -> Saves:
    """The run a process dies in: it saves often enough to lose a step."""
    often = {"save_strategy": "steps", "save_steps": KILL_STEP - 1, "eval_strategy": "no"}
    return refine(model, output / KILLED, batch_size, COUNTS["even"], callbacks, **often)


def counted(capture: Any, log: Path, *args: Any) -> Any:
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return capture(*args)


def main() -> None:
    model, output, batch_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    step_package.capture_step = partial(counted, step_package.capture_step, output / "captures")
    killed = refine_killed(model, output, batch_size, (DiesOnce(output / "died"),)).steps
    reduced = Reduced()
    seen = {name: refine(model, output / name, batch_size, count).steps for name, count in COUNTS.items()}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    found = {"steps": seen, "killed": killed, "world": torch.distributed.get_world_size(), "reduced": reduced.sizes}
    (output / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

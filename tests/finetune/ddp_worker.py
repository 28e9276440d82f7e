"""What `torchrun` starts in test_ddp.py: refines the same model in several ways, each into a directory of its own.

torchrun --nproc-per-node 2 ddp_worker.py MODEL OUTPUT BATCH_SIZE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from QEfficient.finetune import QEffConfig, QEfficient, QEffTrainingArgs

#: Rows of a data set, of which one is held out: a global batch of 4 leaves nothing, three rows (two and one), and a
#: single row, so that one rank has nothing to train in the last batch; and the last of these as a stream.
COUNTS = {"even": 25, "uneven": 24, "idle": 26, "stream": 26}
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


def refine(model: str, output: Path, batch_size: int, count: int, **options: Any) -> Saves:
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
    config = QEffConfig(model_id=model, dataset_name=rows(count), max_ctx_len=64, seed=1, **what)
    args = QEffTrainingArgs(output, batch_size=batch_size, **{**settings, **options})
    saves = Saves()
    QEfficient(config, args, callbacks=[saves]).refine(load=False, say=lambda message: None)
    return saves


def main() -> None:
    model, output, batch_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    seen = {name: refine(model, output / name, batch_size, count).steps for name, count in COUNTS.items()}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (output / f"rank-{rank}.json").write_text(json.dumps({"steps": seen, "world": torch.distributed.get_world_size()}))


if __name__ == "__main__":
    main()

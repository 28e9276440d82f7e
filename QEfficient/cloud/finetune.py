"""``python -m QEfficient.cloud.finetune``: fine-tunes with the flags and defaults of efficient-transformers.

Example:
    python -m QEfficient.cloud.finetune --model_name ./my-model --dataset gsm8k_dataset --lr 5e-4 --num_epochs 2
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from QEfficient.cli.user_errors import user_errors
from QEfficient.cloud.arguments import CloudParser, positive, verbose
from QEfficient.errors import OptionError
from QEfficient.finetune.foreign.qeff import QEFF
from QEfficient.finetune.foreign.tool import translate


def main(peft_config_file: str | None = None, **flags: Any) -> dict[str, Any]:
    """Fine-tunes, and returns what was measured.

    Args:
        peft_config_file: YAML or JSON with options of LoRA.
        **flags: as on the command line; see `QEfficient.finetune.foreign.qeff.QEFF`.

    Returns:
        ``last_epoch_train_loss``, ``last_epoch_train_metric``, ``last_epoch_eval_loss``, ``last_epoch_eval_metric``,
        ``train_step_loss``, ``train_step_metric``, ``eval_step_loss``, ``eval_step_metric`` (the metric is perplexity,
        or accuracy of classes), ``avg_epoch_time`` and ``avg_checkpoint_time`` in seconds, ``metrics_filename``. What
        a run does not measure is None.

    Raises:
        OptionError: an unknown flag, or one that cannot be honoured.
    """
    from QEfficient.finetune.options import split_options
    from QEfficient.finetune.refine import QEfficient

    given = dict(flags) if peft_config_file is None else {**flags, "peft_config_file": peft_config_file}
    what, how = split_options(options(given))
    run = QEfficient(what, how)
    run.refine(load=False)
    assert run.trainer is not None
    return _measured(run.trainer, how)


def options(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run from flags by their names in efficient-transformers.

    Raises:
        OptionError: an unknown flag, one that cannot be honoured, or no model.
    """
    reading = translate(QEFF, flags)
    for notice in reading.notices:
        warnings.warn(notice, stacklevel=2)
    if not reading.options.get("model_id"):
        raise OptionError("name a model with model_name: a directory or a hub id.")
    return reading.options


def run(arguments: Sequence[str]) -> None:
    """Runs one command line (without the program's name)."""
    with user_errors(verbose(arguments)):
        values = vars(_parser().read(arguments))
        values.pop("verbose")
        flags = {name: value for name, value in values.items() if value is not None}
        results = main(**flags)
        print(results["metrics_filename"])


def _parser() -> CloudParser:
    parser = CloudParser("finetune", "Fine-tune a model with the flags of efficient-transformers.")
    kinds: dict[str, Any] = dict.fromkeys(("lr", "gamma", "weight_decay", "num_epochs", "convergence_loss"), float)
    counts = (
        "train_batch_size", "batch_size_training", "val_batch_size", "gradient_accumulation_steps", "context_length",
        "intermediate_step_save",
    )  # fmt: skip
    kinds |= dict.fromkeys(counts, positive) | dict.fromkeys(("seed", "max_train_step", "max_eval_step"), int)
    switches = (
        "use_peft", "run_validation", "gradient_checkpointing", "save_model", "enable_pp", "use_profiler",
        "opByOpVerifier", *(name for name in QEFF.no_effect if name not in ("num_workers_dataloader", "log_level")),
    )  # fmt: skip
    refused = {name: f"not available: {text}" for name, text in QEFF.refused.items()}
    same = {name: f"{option} of qefficient finetune" for name, option in QEFF.same.items()}
    helps = {**same, **QEFF.no_effect, **refused}
    for name in QEFF.keys:
        text = helps.get(name)
        if name in QEFF.defaults:
            text = f"{text or name.replace('_', ' ')} (default: {QEFF.defaults[name]})"
        flag = "--" + name.replace("_", "-")
        if name in switches:
            parser.add_argument(flag, nargs="?", const=True, type=_truth, help=text)
            parser.add_argument(
                "--no-" + flag[2:], dest=name, action="store_const", const=False, help=argparse.SUPPRESS
            )
        else:
            parser.add_argument(flag, dest=name, type=kinds.get(name, str), help=text)
    return parser


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")


def _measured(trainer: Any, how: Any) -> dict[str, Any]:
    """What the run measured, under efficient-transformers' names."""
    from QEfficient.finetune.meter import perplexity

    history = trainer.state.log_history
    training = [row for row in history if "loss" in row]
    losses = [row["loss"] for row in training]
    evaluations = [row for row in history if "eval_loss" in row and row.get("step")]
    epochs = training[-1]["epoch"] if training else 0.0
    last_epoch = [row["loss"] for row in training if row["epoch"] > math.ceil(epochs) - 1]
    total = next((row["train_runtime"] for row in reversed(history) if "train_runtime" in row), None)
    metric = "eval_accuracy" if any("eval_accuracy" in row for row in evaluations) else "eval_perplexity"
    of_tokens = metric == "eval_perplexity"
    mean = sum(last_epoch) / len(last_epoch) if last_epoch else None
    saved = trainer.checkpoint_seconds
    return {
        "last_epoch_train_loss": mean,
        "last_epoch_train_metric": perplexity(mean) if mean is not None and of_tokens else None,
        "last_epoch_eval_loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "last_epoch_eval_metric": evaluations[-1][metric] if evaluations else None,
        "train_step_loss": losses,
        "train_step_metric": [perplexity(loss) for loss in losses] if of_tokens else [],
        "eval_step_loss": [row["eval_loss"] for row in evaluations],
        "eval_step_metric": [row[metric] for row in evaluations],
        "avg_epoch_time": total / max(1.0, epochs) if total is not None and training else None,
        "avg_checkpoint_time": sum(saved) / len(saved) if saved else None,
        "metrics_filename": str(how.logs_dir / "metrics.jsonl"),
    }


if __name__ == "__main__":
    run(sys.argv[1:])

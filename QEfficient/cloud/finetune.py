"""``python -m QEfficient.cloud.finetune``: fine-tunes with the flags and defaults of efficient-transformers.

Example:
    python -m QEfficient.cloud.finetune --model_name ./my-model --dataset gsm8k_dataset --lr 5e-4 --num_epochs 2
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from QEfficient.cli.user_errors import user_errors
from QEfficient.cloud.arguments import CloudParser, positive, verbose
from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean

#: Flag -> option of `QEffConfig` or `QEffTrainingArgs` that means the same.
SAME = {
    "model_name": "model_id",
    "tokenizer_name": "tokenizer_name",
    "dataset": "dataset_name",
    "dataset_config": "dataset_config",
    "task_mode": "task",
    "context_length": "max_ctx_len",
    "custom_dataset_config": "custom_dataset_config",
    "lr": "learning_rate",
    "gamma": "epoch_decay",
    "weight_decay": "weight_decay",
    "num_epochs": "num_train_epochs",
    "train_batch_size": "per_device_train_batch_size",
    "val_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "recompute",
    "output_dir": "output_dir",
    "seed": "seed",
}
#: What efficient-transformers' training configuration says where a flag is not given, as far as it changes the result
#: (QEfficient/finetune/configs/training.py and peft_config.py there).
DEFAULTS: dict[str, Any] = {
    "dataset": "alpaca_dataset",
    "lr": 3e-4,
    "gamma": 0.85,
    "weight_decay": 0.0,
    "num_epochs": 1,
    "train_batch_size": 1,
    "val_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "seed": 42,
    "run_validation": True,
    "use_peft": True,
    "intermediate_step_save": 1000,
}
LORA = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
#: Flags without a meaning here -> why; a notice, not an error.
NO_EFFECT = {
    "use_autocast": "the step computes in the precision of its target",
    "grad_scaler": "the step computes in float32",
    "use_fp16": "the host computes in float32",
    "dump_logs": "metrics.jsonl is written in any case",
    "save_metrics": "metrics.jsonl is written in any case",
    "num_workers_dataloader": "batches are made from tokens that are cached",
    "enable_sorting_for_ddp": "every rank takes its share of each batch",
    "enable_ddp": "torchrun decides how many processes there are",
    "log_level": "the run says what it does on stderr",
}
#: Flags that cannot be honoured -> what to do instead.
REFUSED = {
    "enable_pp": "a step is one package: leave it out",
    "num_pp_stages": "a step is one package: leave it out",
    "use_profiler": "leave it out; qefficient finetune --estimate states time and memory",
    "opByOpVerifier": "leave it out; the first step is compared with torch in any case",
    "from_peft_checkpoint": "run again with the same output_dir, which continues from its last checkpoint",
    "num_freeze_layers": "leave it out; LoRA freezes every layer",
    "max_eval_step": "leave it out; evaluation takes all rows, so choose fewer of them",
    "convergence_loss": "leave it out; set num_epochs or max_train_step",
    "convergence_counter": "leave it out; set num_epochs or max_train_step",
}
_OTHER = (
    "batch_size_training", "task_type", "use_peft", "peft_method", "peft_config_file", "run_validation",
    "max_train_step", "intermediate_step_save", "device", "save_model", "batching_strategy",
)  # fmt: skip
#: Older spellings.
_RENAMED = {"batch_size_training": "train_batch_size", "task_type": "task_mode"}
_DEVICES = {"cpu": "host", "host": "host", "qaic": "qaic"}


def main(peft_config_file: str | None = None, **flags: Any) -> dict[str, Any]:
    """Fine-tunes, and returns what was measured.

    Args:
        peft_config_file: YAML or JSON with options of LoRA.
        **flags: as on the command line; see `SAME`.

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
    known = [*SAME, *_OTHER, *NO_EFFECT, *REFUSED]
    given: dict[str, Any] = {}
    for name, value in flags.items():
        if name not in known:
            raise OptionError(f"there is no flag {name!r}.{did_you_mean(name, known)}")
        if value is None:
            continue
        if name in REFUSED and value:
            raise OptionError(f"{name} is not available: {REFUSED[name]}.")
        if name in NO_EFFECT:
            warnings.warn(f"{name} has no effect: {NO_EFFECT[name]}.", stacklevel=2)
        given[_RENAMED.get(name, name)] = value
    if not given.get("model_name"):
        raise OptionError("name a model with model_name: a directory or a hub id.")
    given = {**DEFAULTS, **given}
    found = {SAME[name]: value for name, value in given.items() if name in SAME}
    found["target"] = _target(given.get("device", "cpu"))
    found["lora_config"] = _lora(given)
    found["save_strategy"] = "no"
    if given.get("save_model", True):
        found["save_strategy"] = "steps"
        found["save_steps"] = _optimizer_steps(given["intermediate_step_save"], given)
    if given.get("max_train_step"):
        found["max_steps"] = _optimizer_steps(given["max_train_step"], given)
    if given["run_validation"]:
        found["eval_strategy"] = "epoch"
    else:
        found["train_frac"] = 1.0
    if given.get("batching_strategy") not in (None, "packing", "padding"):
        raise OptionError(f"batching_strategy must be 'packing' or 'padding', got {given['batching_strategy']!r}.")
    if given.get("batching_strategy") == "packing":
        found["packing"] = True
    return found


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
        "opByOpVerifier", *(name for name in NO_EFFECT if name not in ("num_workers_dataloader", "log_level")),
    )  # fmt: skip
    helps = {**NO_EFFECT, **{name: f"not available: {text}" for name, text in REFUSED.items()}}
    for name in dict.fromkeys([*SAME, *_OTHER, *NO_EFFECT, *REFUSED]):
        text = helps.get(name) or (f"{SAME[name]} of qefficient finetune" if name in SAME else None)
        if name in DEFAULTS:
            text = f"{text or name.replace('_', ' ')} (default: {DEFAULTS[name]})"
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


def _target(device: str) -> str:
    kind = str(device).partition(":")[0]
    if kind not in _DEVICES:
        raise OptionError(f"device must be one of {', '.join(_DEVICES)}, got {device!r}: the step runs on a target.")
    return _DEVICES[kind]


def _lora(given: Mapping[str, Any]) -> Any:
    if given.get("peft_method", "lora") != "lora":
        raise OptionError(f"peft_method must be 'lora', got {given['peft_method']!r}.")
    if not given["use_peft"]:
        return None
    return os.fspath(given["peft_config_file"]) if given.get("peft_config_file") else dict(LORA)


def _optimizer_steps(micro_batches: int, given: Mapping[str, Any]) -> int:
    """efficient-transformers counts micro-batches."""
    return max(1, math.ceil(int(micro_batches) / int(given["gradient_accumulation_steps"])))


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

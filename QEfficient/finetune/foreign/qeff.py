"""Files of efficient-transformers: flags of its ``cloud.finetune``, and the description of a ``custom_dataset``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.foreign.tool import Reading, Tool
from QEfficient.finetune.keywords import integer

#: Its adapter, where no ``peft_config_file`` is given (``QEfficient/finetune/configs/peft_config.py`` there).
LORA = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
_DEVICES = {"cpu": "host", "host": "host", "qaic": "qaic"}
_IN_ANY_CASE = "metrics.jsonl is written in any case"
_ONE_PACKAGE = "a step is one package, so leave it out"


def _description(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file that describes a ``custom_dataset`` has keys of its own: it is the setting of one flag."""
    if "preproc_file" not in values:
        return values
    return {"dataset": "custom_dataset", "custom_dataset_config": dict(values)}


def _finish(reading: Reading) -> None:
    given, key = reading.given, "gradient_accumulation_steps"
    accumulation = integer(key, reading[key])
    for older, name in (("batch_size_training", "per_device_train_batch_size"), ("task_type", "task")):
        if older in given:
            reading.options[name] = given[older]
    described = reading["custom_dataset_config"]
    if isinstance(described, dict) and described.get("collate_file"):
        reading.note("collate_file has no effect: rows are padded to the longest of their batch.")
    kind = str(reading["device"]).partition(":")[0]
    if kind not in _DEVICES:
        raise OptionError(
            f"device must be one of {', '.join(_DEVICES)}, got {reading['device']!r}: the step runs on a target."
        )
    reading.options["target"] = _DEVICES[kind]
    reading.options["lora_config"] = _lora(reading)
    reading.options["save_strategy"] = "no"
    if reading["save_model"]:
        reading.put(save_strategy="steps", save_steps=_optimizer_steps(reading["intermediate_step_save"], accumulation))
    if reading["max_train_step"]:
        reading.put(max_steps=_optimizer_steps(reading["max_train_step"], accumulation))
    if reading["run_validation"]:
        reading.put(eval_strategy="epoch")
    else:
        reading.put(train_frac=1.0)
    if reading["batching_strategy"] not in (None, "packing", "padding"):
        raise OptionError(f"batching_strategy must be 'packing' or 'padding', got {reading['batching_strategy']!r}.")
    if reading["batching_strategy"] == "packing":
        reading.put(packing=True)


def _lora(reading: Reading) -> Any:
    if reading["peft_method"] != "lora":
        raise OptionError(f"peft_method must be 'lora', got {reading['peft_method']!r}.")
    if not reading["use_peft"]:
        return None
    file = reading["peft_config_file"]
    return (os.fspath(file) if isinstance(file, os.PathLike) else file) or dict(LORA)


def _optimizer_steps(micro_batches: Any, accumulation: int) -> int:
    """efficient-transformers counts micro-batches."""
    return max(1, math.ceil(integer("a number of micro-batches", micro_batches) / accumulation))


QEFF = Tool(
    name="qeff",
    title="efficient-transformers",
    version="main of 2025-12 (ebf55e8)",
    marks=frozenset(["preproc_file"]),
    enough=1,
    same={
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
    },
    handled={
        "batch_size_training": "`per_device_train_batch_size`",
        "task_type": "`task`",
        "use_peft": "false: `lora_config=None`",
        "peft_method": "`lora` only",
        "peft_config_file": "`lora_config`",
        "run_validation": "`eval_strategy`, or `train_frac=1.0`",
        "max_train_step": "`max_steps`; counts micro-batches there",
        "intermediate_step_save": "`save_steps`; counts micro-batches there",
        "device": "`target`",
        "save_model": "false: `save_strategy=no`",
        "batching_strategy": "`packing`",
    },
    # QEfficient/finetune/configs/training.py there.
    defaults={
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
        "peft_method": "lora",
        "intermediate_step_save": 1000,
        "save_model": True,
        "device": "cpu",
    },
    no_effect={
        "use_autocast": "the step computes in the precision of its target",
        "grad_scaler": "the step computes in float32",
        "use_fp16": "the host computes in float32",
        "dump_logs": _IN_ANY_CASE,
        "save_metrics": _IN_ANY_CASE,
        "num_workers_dataloader": "batches are made from tokens that are cached",
        "enable_sorting_for_ddp": "every rank takes its share of each batch",
        "enable_ddp": "torchrun decides how many processes there are",
        "log_level": "the run says what it does on stderr",
    },
    refused={
        "enable_pp": _ONE_PACKAGE,
        "num_pp_stages": _ONE_PACKAGE,
        "use_profiler": "leave it out; qefficient finetune --estimate states time and memory",
        "opByOpVerifier": "leave it out; the first step is compared with torch in any case",
        "from_peft_checkpoint": "run again with the same output_dir, which continues from its last checkpoint",
        "num_freeze_layers": "leave it out; LoRA freezes every layer",
        "max_eval_step": "leave it out; evaluation takes all rows, so choose fewer of them",
        "convergence_loss": "leave it out; set num_epochs or max_train_step",
        "convergence_counter": "leave it out; set num_epochs or max_train_step",
    },
    prepare=_description,
    finish=_finish,
)

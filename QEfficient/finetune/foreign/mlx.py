"""Files of mlx-lm (``mlx_lm.lora --config``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.foreign import data, shared
from QEfficient.finetune.foreign.tool import Reading, Tool, check_keys
from QEfficient.finetune.keywords import choice, integer, mapping, number
from QEfficient.finetune.settings_file import read_settings
from QEfficient.models.hub import resolve

_OPTIMIZERS = {"adam": "adamw_torch", "adamw": "adamw_torch", "sgd": "sgd"}
_ENTRY = (
    "path", "config", "train_split", "valid_split", "test_split", "prompt_feature", "completion_feature",
    "chat_feature", "text_feature",
)  # fmt: skip
_EVERY = ("steps_per_report", "steps_per_eval", "save_every")


def _finish(reading: Reading) -> None:
    per_step = integer("grad_accumulation_steps", reading["grad_accumulation_steps"])
    # The step of micro-batches left over at the end is not done there.
    total = shared.steps(reading, "iters", per_step)
    logging, evaluating, saving = (shared.steps(reading, key, per_step) for key in _EVERY)
    reading.put(max_steps=total, logging_steps=logging, save_strategy="steps", save_steps=saving)
    reading.put(per_device_eval_batch_size=reading["batch_size"])
    # Neither clips; rows are cut on the right.
    reading.put(max_grad_norm=0.0, truncation="cut_answer")
    reading.put(train_on="completion" if reading["mask_prompt"] else "all")
    _data(reading)
    if reading.options.get("train_frac") != 1.0:
        reading.put(eval_strategy="steps", eval_steps=evaluating)
    _tuned(reading)
    _optimizer(reading)
    _schedule(reading, total or 0)


def _tuned(reading: Reading) -> None:
    kind, last = reading["fine_tune_type"], integer("num_layers", reading["num_layers"], minimum=-1)
    if kind not in ("lora", "full"):
        raise reading.error("fine_tune_type", "must be lora or full")
    layers = _last_layers(reading.options["model_id"], last) if last > 0 else None
    if kind == "full":
        reading.options["lora_config"] = None
        if layers is not None:
            reading.put(trainable=[f"*.{number}.*" for number in layers])
        return
    rank, keys = integer("lora_parameters.rank", reading["lora_parameters.rank"]), reading["lora_parameters.keys"]
    reading.options["lora_config"] = {
        "r": rank, "lora_alpha": number("lora_parameters.scale", reading["lora_parameters.scale"]) * rank,
        "lora_dropout": reading["lora_parameters.dropout"], "target_modules": keys or "all-linear",
        **({} if layers is None else {"layers_to_transform": layers}),
    }  # fmt: skip


def _last_layers(model: str, count: int) -> list[int] | None:
    """The numbers of the last ``count`` layers; None when the model has no more."""
    total = read_settings(resolve(model) / "config.json", "the model's configuration").get("num_hidden_layers")
    if not isinstance(total, int):
        raise OptionError(f"{model} does not say how many layers it has: set num_layers to -1 to train all.")
    return None if count >= total else list(range(total - count, total))


def _optimizer(reading: Reading) -> None:
    name = choice("optimizer", reading["optimizer"], _OPTIMIZERS)
    known = ("betas", "eps", "weight_decay", "bias_correction")
    chosen = mapping("optimizer_config", reading["optimizer_config"] or {}).get(name) or {}
    own = check_keys(mapping(f"optimizer_config.{name}", chosen), known, f"optimizer_config.{name} of mlx-lm")
    # mlx's own defaults.
    reading.put(optim=_OPTIMIZERS[name], weight_decay=own.get("weight_decay", 0.01 if name == "adamw" else 0.0))
    reading.put(adam_epsilon=own.get("eps"), **shared.betas(own.get("betas")))
    if name != "sgd" and not own.get("bias_correction", False):
        reading.note(f"{name} of mlx-lm leaves its moments biased unless bias_correction is set: here they never are.")


def _schedule(reading: Reading, total: int) -> None:
    name = reading["lr_schedule.name"]
    if name is None:
        reading.put(lr_scheduler_type="constant")
        return
    if name != "cosine_decay":
        raise reading.error("lr_schedule.name", "must be cosine_decay, or absent")
    arguments = reading["lr_schedule.arguments"]
    if not isinstance(arguments, list) or not 2 <= len(arguments) <= 3:
        raise reading.error("lr_schedule.arguments", "must be a list: first rate, steps, and maybe a last rate")
    first, length, *end = arguments
    warmup = integer("lr_schedule.warmup", reading["lr_schedule.warmup"], minimum=0)
    reading.put(learning_rate=first, warmup_steps=warmup, lr_scheduler_type="cosine")
    if end and end[0]:
        reading.put(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": end[0]})
    if length != total - warmup:
        reading.note(f"lr_schedule ends with the run, after {total} steps, and not {length} steps after the warm-up.")
    if reading["lr_schedule.warmup_init"]:
        reading.note("lr_schedule.warmup_init has no effect: the warm-up begins at 0.")


def _data(reading: Reading) -> None:
    several = reading["hf_dataset"]
    if several is None:
        place = Path(str(reading["data"])).expanduser()
        reading.put(dataset_name=str(reading["data"]))
        if place.is_dir():
            # Without rows of its own there is no evaluation there.
            held = (place / "valid.jsonl").is_file()
            reading.put(**({"eval_split": "valid"} if held else {"train_frac": 1.0}))
        else:
            reading.note("data without a split for evaluation gives a share of its rows for that: see train_frac.")
        return
    read = [_entry(reading, entry) for entry in (several if isinstance(several, list) else [several])]
    held = data.same_for_all("valid_split", [entry.pop("eval_split", None) for entry in read], reading.title)
    reading.options.update(data.options_of(read, reading.title))
    reading.put(**({"train_frac": 1.0} if held is None else {"eval_split": held}))


def _entry(reading: Reading, entry: Any) -> dict[str, Any]:
    given = check_keys(mapping("hf_dataset of mlx-lm", entry), _ENTRY, "hf_dataset of mlx-lm")
    if "train_split" not in given:
        raise OptionError("hf_dataset of mlx-lm has no train_split, and its default is a part of a split: name one.")
    subset = check_keys(mapping("config", given.get("config", {})), ("name",), "config of hf_dataset of mlx-lm")
    columns = {
        "prompt": given.get("prompt_feature"), "completion": given.get("completion_feature"),
        "messages": given.get("chat_feature"), "text": given.get("text_feature"),
    }  # fmt: skip
    found = {
        "dataset_name": data.source(given.get("path"), None, reading.title), "dataset_config": subset.get("name"),
        "train_split": data.split(given["train_split"], "train_split"),
        "eval_split": data.split(given.get("valid_split"), "valid_split"), "columns": data.renamed(columns),
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


MLX = Tool(
    name="mlx",
    title="mlx-lm",
    version="0.32.0 (d78bf58)",
    marks=frozenset(
        ["fine_tune_type", "lora_parameters", "adapter_path", "iters", "steps_per_report", "steps_per_eval",
         "grad_checkpoint", "mask_prompt", "val_batches", "num_layers", "lr_schedule", "optimizer_config"]
    ),
    sections=("lora_parameters", "lr_schedule"),
    same={
        "model": "model_id",
        "trust_remote_code": "trust_remote_code",
        "batch_size": "per_device_train_batch_size",
        "grad_accumulation_steps": "gradient_accumulation_steps",
        "learning_rate": "learning_rate",
        "max_seq_length": "max_ctx_len",
        "grad_checkpoint": "recompute",
        "adapter_path": "output_dir",
        "seed": "seed",
    },
    handled={
        "data": "`dataset_name`; `valid.jsonl` of a directory is for evaluation",
        "hf_dataset": "the data options",
        "fine_tune_type": "`lora_config`, or `trainable`",
        "num_layers": "the last layers: `lora_config.layers_to_transform`, or `trainable`",
        "lora_parameters.rank": "`lora_config.r`",
        "lora_parameters.scale": "`lora_config.lora_alpha`, times the rank",
        "lora_parameters.dropout": "`lora_config.lora_dropout`",
        "lora_parameters.keys": "`lora_config.target_modules`",
        "mask_prompt": "`train_on`; the prompt is trained by default",
        "iters": "`max_steps`; counts micro-batches there",
        "steps_per_report": "`logging_steps`; counts micro-batches there",
        "steps_per_eval": "`eval_steps`; counts micro-batches there",
        "save_every": "`save_steps`; counts micro-batches there",
        "optimizer": "`optim`; adam, adamw, sgd",
        "optimizer_config": "`weight_decay`, `adam_beta1`, `adam_beta2`, `adam_epsilon`",
        "lr_schedule.name": "`lr_scheduler_type`; cosine_decay",
        "lr_schedule.arguments": "`learning_rate`, `lr_scheduler_kwargs`",
        "lr_schedule.warmup": "`warmup_steps`",
        "lr_schedule.warmup_init": "a notice",
    },
    # CONFIG_DEFAULTS of mlx_lm/lora.py there.
    defaults={
        "model": "Qwen/Qwen3-0.6b",
        "data": "mlx-community/WikiSQL",
        "fine_tune_type": "lora",
        "optimizer": "adam",
        "seed": 0,
        "num_layers": 16,
        "batch_size": 4,
        "iters": 1000,
        "learning_rate": 1e-5,
        "steps_per_report": 10,
        "steps_per_eval": 200,
        "save_every": 100,
        "max_seq_length": 2048,
        "grad_accumulation_steps": 1,
        "adapter_path": "adapters",
        "lora_parameters.rank": 8,
        "lora_parameters.dropout": 0.0,
        "lora_parameters.scale": 20.0,
        "lr_schedule.warmup": 0,
        "mask_prompt": False,
    },
    no_effect={
        "train": "a run trains",
        **dict.fromkeys(("val_batches", "test", "test_batches"), "evaluation takes all rows of its split"),
        "clear_cache_threshold": shared.DEVICES,
        **dict.fromkeys(("report_to", "project_name"), shared.SERVICES),
    },
    refused={
        "resume_adapter_file": "run again with the same output_dir, which continues from its last checkpoint",
        "config": "give one file",
    },
    finish=_finish,
)  # fmt: skip

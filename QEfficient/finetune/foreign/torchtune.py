"""Files of torchtune's recipes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.foreign import data, shared
from QEfficient.finetune.foreign.tool import Reading, Tool, check_keys
from QEfficient.finetune.keywords import integer, mapping, number, short

#: Builder of data -> (its source, format of ours, whether the prompt is trained); None is said in the file.
_BUILDERS: dict[str, tuple[str | None, str | None, bool]] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca", True),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca", True),
    "instruct_dataset": (None, "prompt_completion", False),
    "chat_dataset": (None, None, False),
    "text_completion_dataset": (None, "text", True),
}
_ENTRY = (
    "_component_", "source", "data_files", "split", "name", "column_map", "column", "conversation_column",
    "conversation_style", "train_on_input", "new_system_prompt", "packed", "split_across_pack", "add_eos",
)  # fmt: skip
_STYLES = {"sharegpt": ("from", "value"), "openai": ("role", "content")}
_MODULES = {"output_proj": "o_proj"}
_MLP = ["gate_proj", "up_proj", "down_proj"]
_OPTIMIZERS = {"AdamW": "adamw_torch", "SGD": "sgd", "PagedAdamW8bit": "adamw_bnb_8bit", "AdamW8bit": "adamw_bnb_8bit"}
#: The key of every section of a recipe.
COMPONENT = "_component_"
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def _prepare(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file with every ``${section.key}`` replaced by the value it names."""

    def value_of(path: str, above: tuple[str, ...]) -> Any:
        found: Any = values
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is None or path in above:
            raise OptionError(f"${{{path}}} in the file of torchtune leads nowhere: write the value.")
        return resolved(found, (*above, path))

    def resolved(value: Any, above: tuple[str, ...] = ()) -> Any:
        if isinstance(value, Mapping):
            return {key: resolved(item, above) for key, item in value.items()}
        if isinstance(value, list):
            return [resolved(item, above) for item in value]
        if not isinstance(value, str):
            return value
        if whole := _REFERENCE.fullmatch(value):
            return value_of(whole[1], above)
        return _REFERENCE.sub(lambda match: str(value_of(match[1], above)), value)

    return {key: resolved(value) for key, value in values.items()}


def _finish(reading: Reading) -> None:
    shared.required(reading, "model._component_", "optimizer.lr", "batch_size", "epochs")
    reading.options["lora_config"] = _lora(reading)
    _length(reading)
    _optimizer(reading)
    _data(reading)
    limit = reading["max_steps_per_epoch"]
    if limit is not None:
        total = integer("max_steps_per_epoch", limit) * integer("epochs", reading["epochs"])
        reading.put(max_steps=total)
        reading.note(f"the run has {total} steps, however few an epoch has.")
    clip = reading["clip_grad_norm"]
    # "inf" measures and does not clip.
    reading.put(max_grad_norm=0.0 if clip in (None, "inf", math.inf) else number("clip_grad_norm", clip))
    reading.put(per_device_eval_batch_size=reading["batch_size"])
    every = reading["save_every_n_steps"]
    reading.put(save_strategy="steps" if every else "epoch", save_steps=every)
    if reading["shuffle"] is False:
        reading.put(train_sampling_strategy="sequential")
    if reading["resume_from_checkpoint"]:
        reading.put(resume_from_checkpoint=True)


def _lora(reading: Reading) -> dict[str, Any] | None:
    builder = str(reading["model._component_"]).rpartition(".")[2]
    if not builder.startswith(("lora_", "qlora_")):
        return None
    if builder.startswith("qlora_") or reading["model.quantize_base"]:
        shared.quantized(reading, "model.quantize_base", 4)
    named = reading["model.lora_attn_modules"] or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise reading.error("model.lora_attn_modules", "must be a list of names")
    targets = [_MODULES.get(name, name) for name in named]
    targets += _MLP if reading["model.apply_lora_to_mlp"] else []
    targets += ["lm_head"] if reading["model.apply_lora_to_output"] else []
    if not targets:
        raise OptionError("the file of torchtune says what LoRA trains nowhere: add model.lora_attn_modules.")
    return {
        "r": reading["model.lora_rank"], "lora_alpha": reading["model.lora_alpha"],
        "lora_dropout": reading["model.lora_dropout"], "target_modules": targets,
    }  # fmt: skip


def _length(reading: Reading) -> None:
    length = reading["tokenizer.max_seq_len"]
    if length is not None:
        reading.put(max_ctx_len=length, truncation="cut_answer")
        return
    # Rows have any length there, and a compiled step has a longest one: none is cut unseen.
    reading.put(truncation="error")
    reading.note("tokenizer.max_seq_len is not set: a row longer than max_ctx_len is an error.")


def _optimizer(reading: Reading) -> None:
    name = str(reading["optimizer._component_"]).rpartition(".")[2]
    if name not in _OPTIMIZERS:
        raise reading.error("optimizer._component_", f"must be one of {', '.join(_OPTIMIZERS)}")
    if name.endswith("8bit"):
        reading.note(f"{name} keeps its state in float32 here.")
    adam = name != "SGD"
    reading.put(optim=_OPTIMIZERS["AdamW"] if adam else "sgd")
    decay = reading["optimizer.weight_decay"]
    # torch's own defaults.
    reading.put(weight_decay=(0.01 if adam else 0.0) if decay is None else decay)
    reading.put(adam_epsilon=reading["optimizer.eps"], **shared.betas(reading["optimizer.betas"]))
    schedule = reading["lr_scheduler._component_"]
    if schedule is None:
        reading.put(lr_scheduler_type="constant")
    elif str(schedule).endswith("get_cosine_schedule_with_warmup"):
        reading.put(lr_scheduler_type="cosine", warmup_steps=reading["lr_scheduler.num_warmup_steps"])
    else:
        raise reading.error("lr_scheduler._component_", "must be get_cosine_schedule_with_warmup, or absent")


def _data(reading: Reading) -> None:
    title, where = reading.title, reading["dataset"]
    read = [_entry(reading, entry) for entry in (where if isinstance(where, list) else [where] * (where is not None))]
    for name in ("train_on", "packing", "system_prompt"):
        reading.put(**{name: data.same_for_all(name, [entry.pop(name, None) for entry in read], title)})
    reading.options.update(data.options_of(read, title))
    reading.put(train_frac=1.0)
    if reading["dataset_val"] is None:
        return
    held = _entry(reading, reading["dataset_val"])
    if held["dataset_name"] != reading.options.get("dataset_name") or "train_split" not in held:
        raise reading.error("dataset_val", "must be another split of what is trained on")
    reading.options.pop("train_frac")
    reading.put(eval_split=held["train_split"])
    often = reading["run_val_every_n_steps"]
    reading.put(eval_strategy="steps" if often else None, eval_steps=often)


def _entry(reading: Reading, entry: Any) -> dict[str, Any]:
    title = reading.title
    given = check_keys(mapping("dataset of torchtune", entry), _ENTRY, "dataset of torchtune")
    builder = str(given.get(COMPONENT)).rpartition(".")[2]
    if builder not in _BUILDERS:
        raise OptionError(f"the data {short(builder)} of torchtune cannot be read; {', '.join(_BUILDERS)} can be.")
    path, kind, prompt_too = _BUILDERS[builder]
    found: dict[str, Any] = {
        "dataset_name": data.source(given.get("source", path), given.get("data_files"), title),
        "dataset_config": given.get("name"),
        "train_split": data.split(given.get("split"), "split"),
        "dataset_format": kind,
        "train_on": "all" if given.get("train_on_input", prompt_too) else "completion",
        "packing": given.get("packed") or None,
        "system_prompt": given.get("new_system_prompt"),
    }
    columns = mapping("column_map", given.get("column_map", {}))
    if kind == "alpaca":
        found["columns"] = data.renamed(columns)
        reading.note("instructions go through the model's chat template: torchtune has words of its own for them.")
    elif kind == "prompt_completion":
        found["columns"] = {"prompt": columns.get("input", "input"), "completion": columns.get("output", "output")}
    elif kind == "text":
        found["columns"] = data.renamed({"text": given.get("column", "text")})
        found["train_on"] = "all"
    else:
        style = given.get("conversation_style")
        if style not in _STYLES:
            raise OptionError(f"conversation_style={short(style)} of torchtune must be one of {', '.join(_STYLES)}.")
        found |= data.conversations(given.get("conversation_column"), *_STYLES[style], title)
    return {name: value for name, value in found.items() if value is not None}


TORCHTUNE = Tool(
    name="torchtune",
    title="torchtune",
    version="0.7.0 (bd2a0fc)",
    marks=frozenset([COMPONENT]),
    enough=1,
    sections=("model", "tokenizer", "checkpointer", "optimizer", "lr_scheduler"),
    same={
        "checkpointer.checkpoint_dir": "model_id",
        "batch_size": "per_device_train_batch_size",
        "epochs": "num_train_epochs",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "optimizer.lr": "learning_rate",
        "enable_activation_checkpointing": "recompute",
        "log_every_n_steps": "logging_steps",
        "seed": "seed",
        "output_dir": "output_dir",
    },
    handled={
        "model._component_": "`lora_config`; a builder without LoRA is full fine-tuning",
        "model.lora_rank": "`lora_config.r`",
        "model.lora_alpha": "`lora_config.lora_alpha`",
        "model.lora_dropout": "`lora_config.lora_dropout`",
        **dict.fromkeys(("model.lora_attn_modules", "model.apply_lora_to_mlp", "model.apply_lora_to_output"),
                        "`lora_config.target_modules`"),
        "model.quantize_base": "`base_weights`",
        "tokenizer.max_seq_len": "`max_ctx_len`; without it, longer rows are an error",
        "dataset": f"the data options; {', '.join(_BUILDERS)}",
        "dataset_val": "`eval_split`: another split of the same data",
        "run_val_every_n_steps": "`eval_steps`",
        "optimizer._component_": "`optim`; AdamW, SGD, and AdamW with a state of 8 bits, which is kept in 32",
        "optimizer.weight_decay": "`weight_decay`",
        "optimizer.betas": "`adam_beta1`, `adam_beta2`",
        "optimizer.eps": "`adam_epsilon`",
        "lr_scheduler._component_": "`lr_scheduler_type`; get_cosine_schedule_with_warmup",
        "lr_scheduler.num_warmup_steps": "`warmup_steps`",
        "max_steps_per_epoch": "`max_steps`, times `epochs`",
        "clip_grad_norm": "`max_grad_norm`; nothing is no clipping",
        "save_every_n_steps": "`save_steps`",
        "shuffle": "false: `train_sampling_strategy=sequential`",
        "resume_from_checkpoint": "`resume_from_checkpoint`",
    },
    # The recipes and torchtune/models there; the rest must be in the file.
    defaults={
        "model.lora_rank": 8,
        "model.lora_alpha": 16,
        "model.lora_dropout": 0.0,
        "optimizer._component_": "torch.optim.AdamW",
        "gradient_accumulation_steps": 1,
    },
    no_effect={
        "dtype": shared.PRECISION,
        **dict.fromkeys(("device", "enable_activation_offloading", "fsdp_cpu_offload", "low_cpu_ram"), shared.DEVICES),
        **dict.fromkeys(("compile", "loss", "optimizer.fused", "collate_fn"), shared.KERNELS),
        **dict.fromkeys(("tensor_parallel_dim", "data_parallel_shard_dim", "data_parallel_replicate_dim",
                         "context_parallel_dim", "fsdp_reshard_after_forward"), shared.SHARDING),
        **dict.fromkeys(("metric_logger", "log_peak_memory_stats", "log_level", "profiler", "profile_memory"),
                        shared.SERVICES),
        **dict.fromkeys(
            ("tokenizer._component_", "tokenizer.path", "tokenizer.merges_file", "checkpointer._component_",
             "checkpointer.checkpoint_files", "checkpointer.model_type", "checkpointer.output_dir",
             "checkpointer.recipe_checkpoint", "checkpointer.adapter_checkpoint", "tokenizer.special_tokens_path"),
            "the checkpoint directory has all of it"),
        **dict.fromkeys(("save_adapter_weights_only", "enable_async_checkpointing", "cudnn_deterministic_mode"),
                        "checkpoints are whole, and runs repeat to the same bits"),
    },
    refused={
        "model.use_dora": "only LoRA can be trained",
        "optimizer_in_bwd": "leave it out; optimizer_in_graph is the nearest option",
        "tokenizer.prompt_template": "set chat_template to a Jinja file",
        "custom_sharded_layers": "a step is one package",
        "resize_token_embeddings": "resize the model first",
    },
    prepare=_prepare,
    finish=_finish,
)  # fmt: skip

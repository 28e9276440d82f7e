"""Files of axolotl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.foreign import data, preferences, shared
from QEfficient.finetune.foreign.tool import Reading, Tool, check_keys
from QEfficient.finetune.keywords import choice, integer, mapping, number, short
from QEfficient.finetune.settings_file import parse_value

#: ``type`` of a data set -> format of ours.
_TYPES = {
    "alpaca": "alpaca", "alpaca_chat.load_qa": "prompt_completion", "completion": "text", "chat_template": "messages",
    "input_output": "segments", "": "tokenized",
}  # fmt: skip
#: ``rl`` -> method.
_METHODS = {"dpo": "dpo", "orpo": "orpo", "kto": "kto"}
#: The last part of a ``type`` whose rows hold answers that were judged, by what they are for.
_JUDGED = {
    "preference": ("default", "load", "intel", "icr", "prompt_pairs", "ultra", "argilla", "argilla_chat"),
    "unpaired_preference": ("argilla", "intel", "prompt_pairs", "ultra"),
}
#: The first part, which names the words around them.
_WORDS = ("chat_template", "chatml", "llama3", "bradley_terry")
_ENTRY = (
    "path", "data_files", "ds_type", "name", "split", "type", "field", "field_messages", "message_property_mappings",
    "message_field_role", "message_field_content", "roles", "roles_to_train", "train_on_eos", "train_on_eot",
    "chat_template", "field_tools", "field_system", "trust_remote_code", "field_chosen", "field_rejected",
)  # fmt: skip
_OWN_TYPE = ("system_prompt", "field_system", "field_instruction", "field_input", "field_output")
_STRATEGIES = {"drop": "drop", "truncate": "cut_answer", "raise": "error"}


def _finish(reading: Reading) -> None:
    shared.required(reading, "learning_rate")
    rate = reading["learning_rate"]  # a text or a number there
    reading.put(learning_rate=parse_value(rate) if isinstance(rate, str) else rate)
    method = _method(reading)
    reading.options["lora_config"] = _lora(reading)
    _data(reading, method)
    _schedule(reading)
    strategy = reading["excess_length_strategy"]
    reading.put(truncation=_STRATEGIES[choice("excess_length_strategy", strategy, _STRATEGIES)])
    shared.optimizer(reading, "optimizer")
    if reading["eval_batch_size"] is None:
        reading.put(per_device_eval_batch_size=reading["micro_batch_size"])
    if reading["gradient_checkpointing"]:
        reading.put(recompute=True)
    if reading["dataset_exact_deduplication"]:
        reading.put(filters=["dedupe"])
    tokens = mapping("special_tokens", reading["special_tokens"] or {})
    if {name for name, token in tokens.items() if token is not None} - {"pad_token"}:
        raise reading.error("special_tokens", "cannot be set for a run: set them in the tokenizer's own files")
    if tokens:
        reading.note("special_tokens.pad_token has no effect: padding is neither attended to nor trained.")


def _method(reading: Reading) -> str:
    """What is minimised, and its options."""
    if reading["reward_model"]:
        if reading["rl"]:
            raise reading.error("rl", "and reward_model contradict each other: take one of them out")
        reading.put(method="reward")
        return "reward"
    if not reading["rl"]:
        return "sft"
    beta = next((reading[key] for key in ("rl_beta", "dpo_beta", "orpo_alpha") if reading[key] is not None), None)
    weights = reading["kto_desirable_weight"], reading["kto_undesirable_weight"]
    return preferences.put_method(reading, "rl", _METHODS, beta, *weights)


def _lora(reading: Reading) -> dict[str, Any] | None:
    kind = reading["adapter"]
    quantized = next((bits for bits in (4, 8) if reading[f"load_in_{bits}bit"]), None)
    if kind is None:
        if quantized is not None:
            raise OptionError(f"load_in_{quantized}bit of axolotl needs an adapter: add adapter: lora.")
        return None
    if kind not in ("lora", "qlora"):
        raise reading.error("adapter", "must be lora, qlora or nothing")
    shared.quantized(reading, f"load_in_{quantized}bit", quantized)
    targets = "all-linear" if reading["lora_target_linear"] else reading["lora_target_modules"]
    if not targets:
        raise OptionError("the file of axolotl says what LoRA trains nowhere: add lora_target_linear: true.")
    found = {
        "r": reading["lora_r"], "lora_alpha": reading["lora_alpha"], "lora_dropout": reading["lora_dropout"],
        "target_modules": targets, "modules_to_save": reading["lora_modules_to_save"],
        "use_rslora": reading["peft_use_rslora"], "use_dora": reading["peft_use_dora"],
        "layers_to_transform": reading["peft_layers_to_transform"],
        "layers_pattern": reading["peft_layers_pattern"], "rank_pattern": reading["lora_rank_pattern"],
        "alpha_pattern": reading["lora_alpha_pattern"], "fan_in_fan_out": reading["lora_fan_in_fan_out"],
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def _schedule(reading: Reading) -> None:
    epochs, limit = number("num_epochs", reading["num_epochs"]), reading["max_steps"]
    warmup = reading["warmup_ratio"] if reading["warmup_steps"] is None else reading["warmup_steps"]
    if warmup is None:
        # 3 % of the run, of at most 100 steps; only a run whose steps are given can be cut there now.
        warmup = 0.03 if limit is None else min(int(0.03 * integer("max_steps", limit)), 100)
    reading.put(warmup_steps=warmup)
    lowest = reading["cosine_min_lr_ratio"]
    if lowest is not None:
        reading.put(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": lowest})
    for word, strategy, default in (("save", "save_strategy", "epoch"), ("eval", "eval_strategy", None)):
        often, each = reading[f"{word}s_per_epoch"], reading[f"{word}_steps"]
        if (
            often and integer(f"{word}s_per_epoch", often) * epochs > 1
        ):  # as a share of the run; there, too, a whole run is none
            each = 1 / (often * epochs)
        if each:
            reading.put(**{strategy: "steps", f"{word}_steps": each})
        else:
            reading.put(**{strategy: reading[strategy] or default})
    if reading.options["train_frac"] == 1 and "eval_split" not in reading.options:
        reading.options["eval_strategy"] = "no"
        reading.options.pop("eval_steps", None)


def _data(reading: Reading, method: str) -> None:
    title = reading.title
    entries = reading["datasets"] or []
    if not isinstance(entries, list):
        raise reading.error("datasets", "must be a list")
    read = [_entry(reading, entry, method) for entry in entries]
    where = {entry.get("train_on") for entry in read}
    if method == "sft" and (reading["train_on_inputs"] or len(where) == 1):
        for entry in read:
            del entry["train_on"]
        reading.put(train_on="all" if reading["train_on_inputs"] else where.pop())
    reading.options.update(data.options_of(read, title))
    shared.train_share(reading, "val_set_size")
    held = reading["test_datasets"]
    if held:
        _held_out(reading, held, method)
    tokens = reading["tokens"]
    if tokens:
        reading.put(new_tokens=tokens)
        reading.note("of the embeddings the rows of new tokens are trained, whatever lora_modules_to_save says.")
    template = reading["chat_template"]
    if template == "jinja" and isinstance(reading["chat_template_jinja"], str):
        if not Path(reading["chat_template_jinja"]).is_file():
            raise reading.error("chat_template_jinja", "must be a file: write the template into one")
        reading.put(chat_template=reading["chat_template_jinja"])
    elif template != "tokenizer_default":
        shared.template_notice(reading, "chat_template", template)


def _held_out(reading: Reading, held: Any, method: str) -> None:
    """``test_datasets``: another split of what is trained on."""
    of = _entry(reading, held[0], method) if isinstance(held, list) and len(held) == 1 else {}
    if of.get("dataset_name") != reading.options.get("dataset_name") or "train_split" not in of:
        raise reading.error("test_datasets", "must be one other split of the data set that is trained on")
    reading.put(eval_split=of["train_split"])
    reading.options.pop("train_frac")


def _entry(reading: Reading, entry: Any, method: str) -> dict[str, Any]:
    title = reading.title
    given = check_keys(mapping("an entry of datasets in axolotl", entry), _ENTRY, "an entry of datasets in axolotl")
    found: dict[str, Any] = {
        "dataset_name": data.source(given.get("path"), given.get("data_files"), title),
        "dataset_config": given.get("name"),
        "train_split": data.split(given.get("split"), "split"),
    }
    kind = given.get("type", "")
    if method != "sft":
        found |= _judged(reading, given, kind, method)
        return {name: value for name, value in found.items() if value is not None}
    found["train_on"] = "completion"
    if isinstance(kind, Mapping):
        found |= _own_type(reading, kind)
    elif not isinstance(kind, str) or kind not in _TYPES:
        raise OptionError(
            f"type={short(kind)} of a data set of axolotl cannot be read; {', '.join(filter(None, _TYPES))} can be."
        )
    else:
        found["dataset_format"] = _TYPES[kind]
    if kind == "alpaca" or isinstance(kind, Mapping):
        reading.note(
            "instructions go through the model's chat template, or stand before the answer as they are where it has "
            "none: axolotl writes words of its own around them."
        )
    if kind == "completion":
        found["train_on"] = "all"
        found["columns"] = data.renamed({"text": given.get("field", "text")})
    if kind == "alpaca_chat.load_qa":
        found["columns"] = {"prompt": "question", "completion": "answer"}
    if kind == "chat_template":
        found |= _conversation(reading, given)
    return {name: value for name, value in found.items() if value is not None}


def _judged(reading: Reading, given: Mapping[str, Any], kind: Any, method: str) -> dict[str, Any]:
    """Rows of answers that were judged; their readers find the prompt in whatever column it is."""
    words, _, form = str(kind or "default").rpartition(".")
    rows = preferences.rows_of(method)
    if form not in _JUDGED[rows] or words not in ("", *_WORDS):
        raise OptionError(
            f"type={short(kind)} of a data set of axolotl cannot be read for {method}; the endings that can be are "
            f"{', '.join(_JUDGED[rows])}."
        )
    if words in ("chatml", "llama3"):
        shared.template_notice(reading, "type", f"{words}.{form}")
    roles = mapping("roles", given.get("roles", {}))
    data.check_roles({str(theirs): role for role, those in roles.items() for theirs in those}, reading.title)
    columns = {"chosen": given.get("field_chosen"), "rejected": given.get("field_rejected")}
    columns |= {"messages": given.get("field_messages")}
    return preferences.entry(method, columns if rows == "preference" else {})


def _own_type(reading: Reading, kind: Mapping[str, Any]) -> dict[str, Any]:
    if kind.get("format") or kind.get("no_input_format") or kind.get("system_format"):
        raise OptionError("a format of its own in a type of axolotl cannot be read: write a preprocess function.")
    given = check_keys(kind, _OWN_TYPE, "a type of axolotl")
    reading.put(system_prompt=given.get("system_prompt") or None)
    columns = {
        "instruction": given.get("field_instruction"), "input": given.get("field_input"),
        "output": given.get("field_output"), "system": given.get("field_system"),
    }  # fmt: skip
    return {"dataset_format": "alpaca", "columns": data.renamed(columns)}


def _conversation(reading: Reading, given: Mapping[str, Any]) -> dict[str, Any]:
    title = reading.title
    names = {
        "role": given.get("message_field_role", "role"), "content": given.get("message_field_content", "content"),
        **mapping("message_property_mappings", given.get("message_property_mappings", {})),
    }  # fmt: skip
    roles = mapping("roles", given.get("roles", {}))
    data.check_roles({str(theirs): role for role, those in roles.items() for theirs in those}, title)
    if given.get("roles_to_train", ["assistant"]) not in (["assistant"], ["gpt"], ["assistant", "gpt"]):
        raise OptionError("roles_to_train of axolotl can be assistant only: set train_on=all to train every role.")
    for key in ("train_on_eos", "train_on_eot"):
        if given.get(key, "turn") != "turn":
            raise OptionError(f"{key}={given[key]!r} of axolotl is not available: one end token is trained per answer.")
    if given.get("chat_template", "tokenizer_default") != "tokenizer_default":
        shared.template_notice(reading, "chat_template", given["chat_template"])
    found = data.conversations(given.get("field_messages", "messages"), names["role"], names["content"], title)
    more = data.renamed({"tools": given.get("field_tools"), "system": given.get("field_system")})
    return found if more is None else {**found, "columns": {**found.get("columns", {}), **more}}


_NO_EFFECT = {
    **dict.fromkeys(("bf16", "fp16", "tf32", "bfloat16", "float16", "float32", "fp8"), shared.PRECISION),
    **dict.fromkeys(
        ("flash_attention", "sdp_attention", "flex_attention", "xformers_attention", "eager_attention",
         "sage_attention", "attn_implementation", "flash_attn_cross_entropy", "flash_attn_rms_norm",
         "flash_attn_fuse_mlp", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "chunked_cross_entropy",
         "plugins", "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm",
         "liger_fused_linear_cross_entropy", "cut_cross_entropy", "torch_compile", "torch_compile_backend",
         "unsloth_cross_entropy_loss"), shared.KERNELS),
    **dict.fromkeys(("device", "device_map", "max_memory", "gpu_memory_limit", "low_cpu_mem_usage"), shared.DEVICES),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "ddp", "local_rank", "world_size", "ddp_timeout",
         "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_broadcast_buffers"), shared.SHARDING),
    **dict.fromkeys(
        ("dataset_prepared_path", "dataset_processes", "dataset_num_proc", "dataset_keep_in_memory",
         "dataset_shard_num", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"),
        shared.CACHED),
    **dict.fromkeys(
        ("wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_run_id", "wandb_log_model", "wandb_mode",
         "use_wandb", "use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name", "use_tensorboard", "use_comet",
         "comet_project_name", "use_trackio", "trackio_project_name", "include_tokens_per_second", "include_tkps"),
        shared.SERVICES),
    **dict.fromkeys(("hub_model_id", "hub_strategy", "push_dataset_to_hub", "hf_use_auth_token"), shared.OFFLINE),
    **dict.fromkeys(
        ("model_type", "type_of_model", "tokenizer_type", "tokenizer_use_fast", "tokenizer_legacy",
         "is_llama_derived_model", "is_mistral_derived_model", "is_falcon_derived_model", "is_qwen_derived_model",
         "base_model_config"), "the checkpoint says what it is"),
    **dict.fromkeys(
        ("pad_to_sequence_len", "pad_to_multiple_of", "eval_sample_packing", "sample_packing_group_size",
         "sample_packing_bin_size", "sample_packing_eff_est"), "rows are padded to the longest of their batch"),
    **dict.fromkeys(("loss_watchdog_threshold", "loss_watchdog_patience"), "a loss that is no number stops the run"),
    "gradient_checkpointing_kwargs": "recompute has no settings",
    "auto_resume_from_checkpoints": "a run continues from its last checkpoint in any case",
    "neftune_noise_alpha": "a compiled step adds no noise",
    **dict.fromkeys(("precompute_ref_log_probs", "rl_adapter_ref_model", "dpo_use_logits_to_keep", "dpo_padding_free"),
                    "the reference is the model as it is before training; its log-probabilities are computed once"),
    "save_safetensors": "weights are always saved as safetensors",
    "shuffle_merged_datasets": "training rows are shuffled",
    **dict.fromkeys(("strict", "debug", "gc_steps", "save_first_step"), "the run does not need it"),
}  # fmt: skip
_REFUSED = {
    **dict.fromkeys(
        ("dpo_use_weighting", "dpo_label_smoothing", "dpo_loss_type", "dpo_loss_weights", "dpo_norm_loss", "rpo_alpha",
         "simpo_gamma", "cpo_alpha", "center_rewards_coefficient"), preferences.ONE_LOSS),
    **dict.fromkeys(("trl", "process_reward_model"), "it belongs to methods that are not here"),
    "pretraining_dataset": "give datasets with type: completion",
    "lora_model_dir": "a run starts from the base model; merge the adapter first",
    "loraplus_lr_ratio": "all trained tensors have one learning rate",
    "relora": "only LoRA can be trained",
    "unfrozen_parameters": "set trainable to name patterns instead",
    "gptq": "use load_in_4bit, which quantizes an ordinary checkpoint",
    "revision_of_model": "download that revision and name its directory",
    "auto_find_batch_size": "set micro_batch_size",
    "max_packed_sequence_len": "use sample_packing",
    "rope_scaling": "set it in the checkpoint's own configuration",
    "overrides_of_model_config": "set it in the checkpoint's own configuration",
}  # fmt: skip

AXOLOTL = Tool(
    name="axolotl",
    title="axolotl",
    version="0.18.0 (067b021)",
    marks=frozenset(
        ["adapter", "sample_packing", "val_set_size", "lora_target_linear", "dataset_prepared_path",
         "pad_to_sequence_len", "train_on_inputs", "flash_attention", "special_tokens", "wandb_watch",
         "evals_per_epoch", "saves_per_epoch", "is_llama_derived_model", "type_of_model"]
    ),
    same={
        "base_model": "model_id",
        "tokenizer_config": "tokenizer_name",
        "trust_remote_code": "trust_remote_code",
        "streaming": "streaming",
        "sequence_len": "max_ctx_len",
        "sample_packing": "packing",
        "default_system_message": "system_prompt",
        "micro_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "num_epochs": "num_train_epochs",
        "max_steps": "max_steps",
        "lr_scheduler": "lr_scheduler_type",
        "lr_scheduler_kwargs": "lr_scheduler_kwargs",
        "weight_decay": "weight_decay",
        "max_grad_norm": "max_grad_norm",
        "adam_beta1": "adam_beta1",
        "adam_beta2": "adam_beta2",
        "adam_epsilon": "adam_epsilon",
        "group_by_length": "group_by_length",
        "save_total_limit": "save_total_limit",
        "save_only_model": "save_only_model",
        "logging_steps": "logging_steps",
        "early_stopping_patience": "early_stopping_patience",
        "load_best_model_at_end": "load_best_model_at_end",
        "metric_for_best_model": "metric_for_best_model",
        "greater_is_better": "greater_is_better",
        "dataloader_drop_last": "dataloader_drop_last",
        "resume_from_checkpoint": "resume_from_checkpoint",
        "seed": "seed",
        "output_dir": "output_dir",
    },
    handled={
        "learning_rate": "`learning_rate`",
        "datasets": "the data options; `type` alpaca, alpaca_chat.load_qa, completion, chat_template, input_output, or "
        "none for token ids; with `rl` chat_template.default, chatml.intel, llama3.ultra and their like",
        "test_datasets": "`eval_split`: another split of the same data",
        "val_set_size": "`train_frac`; a share",
        "train_on_inputs": "`train_on`",
        "rl": "`method`: dpo, orpo, kto",
        "reward_model": "`method=reward`",
        **dict.fromkeys(("rl_beta", "dpo_beta", "orpo_alpha"), "`beta`"),
        "kto_desirable_weight": "`desirable_weight`",
        "kto_undesirable_weight": "`undesirable_weight`",
        "tokens": "`new_tokens`",
        "excess_length_strategy": "`truncation`",
        "chat_template": "`chat_template`; `chatml` and the tokenizer's own",
        "chat_template_jinja": "`chat_template`; a file",
        "special_tokens": "`pad_token` only",
        "adapter": "`lora_config`; none is full fine-tuning",
        **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "`base_weights`"),
        "lora_target_linear": "`lora_config.target_modules`",
        **{key: f"`lora_config.{name}`" for key, name in {
            "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
            "lora_target_modules": "target_modules", "lora_modules_to_save": "modules_to_save",
            "lora_fan_in_fan_out": "fan_in_fan_out", "lora_rank_pattern": "rank_pattern",
            "lora_alpha_pattern": "alpha_pattern", "peft_use_rslora": "use_rslora",
            "peft_use_dora": "use_dora", "peft_layers_to_transform": "layers_to_transform",
            "peft_layers_pattern": "layers_pattern",
        }.items()},
        "optimizer": "`optim`; those with a state of 8 bits keep it in 32",
        **dict.fromkeys(("warmup_steps", "warmup_ratio"), "`warmup_steps`"),
        "cosine_min_lr_ratio": "`lr_scheduler_kwargs`",
        **dict.fromkeys(("save_strategy", "save_steps", "saves_per_epoch"), "`save_strategy`, `save_steps`"),
        **dict.fromkeys(("eval_strategy", "eval_steps", "evals_per_epoch"), "`eval_strategy`, `eval_steps`"),
        "gradient_checkpointing": "`recompute`",
        "dataset_exact_deduplication": "`filters=[dedupe]`",
    },
    # src/axolotl/utils/schemas there, and core/builders/base.py for warm-up, saving and clipping.
    defaults={
        "sequence_len": 512,
        "excess_length_strategy": "drop",
        "train_on_inputs": False,
        "val_set_size": 0.0,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1.0,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "cosine",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lora_r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "save_total_limit": 4,
        "seed": 42,
        "output_dir": "./model-out",
    },
    no_effect=_NO_EFFECT,
    refused=_REFUSED,
    finish=_finish,
)  # fmt: skip

"""Files of LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.arguments import HF_NAMES
from QEfficient.finetune.foreign import data, preferences, shared
from QEfficient.finetune.foreign.tool import Reading, Tool, check_keys
from QEfficient.finetune.keywords import choice, integer, mapping, short
from QEfficient.finetune.settings_file import parse_value, read_settings
from QEfficient.suggest import did_you_mean

_ENTRY = (
    "file_name", "hf_hub_url", "formatting", "columns", "tags", "subset", "split", "num_samples", "ranking", "folder",
)  # fmt: skip
#: Its names of columns -> ours, for rows of instructions.
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
#: Columns of answers that were judged.
_ANSWERS = ("chosen", "rejected", "kto_tag")
_TAGS = {"role_tag": "from", "content_tag": "value"}
_ROLES = {
    "user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"), "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function_call"), "system_tag": ("system", "system"),
}  # fmt: skip


#: ``pref_loss`` of the stage ``dpo`` -> method.
_PREFERENCE = {"sigmoid": "dpo", "orpo": "orpo"}


def _finish(reading: Reading) -> None:
    method = _method(reading)
    reading.options["lora_config"] = _lora(reading)
    shared.quantized(reading, "quantization_bit", reading["quantization_bit"])
    names = _listed("dataset", reading["dataset"]) or []
    entries = [_dataset(reading, name, method) for name in names]
    _mixture(reading, entries)
    reading.options.update(data.options_of(entries, reading.title))
    if method == "sft":
        whole = reading["stage"] == "pt" or reading["train_on_prompt"]
        reading.put(train_on="all" if whole else "last" if reading["mask_history"] else "completion")
    _tokens(reading)
    if reading["streaming"]:
        held = reading["val_size"]
        reading.put(streaming=True, shuffle_buffer_size=reading["buffer_size"])
        reading.put(eval_rows=integer("val_size of a stream", held) if held else None)
    else:
        shared.train_share(reading, "val_size")
    # Both parts of a row lose tokens there, the longer one more.
    reading.put(truncation="cut_answer")
    shared.template_notice(reading, "template", reading["template"])
    shared.optimizer(reading, "optim")
    if reading["packing"] or reading["neat_packing"]:
        reading.put(packing=True)
    if reading["packing"] and not reading["neat_packing"]:
        reading.note("packed rows do not see each other, as with neat_packing.")
    if reading["max_samples"] is not None:
        reading.put(sample_size=reading["max_samples"])
        reading.note("max_samples draws rows by seed: LLaMA-Factory takes the first ones.")
    if reading["disable_shuffling"]:
        reading.put(train_sampling_strategy="sequential")
    if reading["eval_dataset"] is not None:
        raise reading.error("eval_dataset", "cannot be read: set val_size, or put both into one directory")


def _method(reading: Reading) -> str:
    """What the stage minimises, and its options."""
    stage = reading["stage"]
    if stage in ("sft", "pt"):
        return "sft"
    beta, weights = reading["pref_beta"], (reading["kto_chosen_weight"], reading["kto_rejected_weight"])
    if stage == "dpo":
        return preferences.put_method(reading, "pref_loss", _PREFERENCE, beta)
    return preferences.put_method(reading, "stage", {"rm": "reward", "kto": "kto"}, beta, *weights)


def _mixture(reading: Reading, entries: list[dict[str, Any]]) -> None:
    """Weights and the way of mixing several data sets; ``concat`` puts them one after the other."""
    strategy = choice("mix_strategy", reading["mix_strategy"], ("concat", "interleave_under", "interleave_over"))
    if strategy == "concat" or len(entries) < 2:
        return
    shares = reading["interleave_probs"]
    shares = shares.split(",") if isinstance(shares, str) else shares or [1] * len(entries)
    if not isinstance(shares, list) or len(shares) != len(entries):
        raise reading.error("interleave_probs", f"must be {len(entries)} numbers, one for each data set")
    for entry, share in zip(entries, shares, strict=True):
        entry["weight"] = parse_value(share) if isinstance(share, str) else share
    reading.put(mixing=strategy)


def _tokens(reading: Reading) -> None:
    """New tokens; without ``resize_vocab`` there is no row for them."""
    added = [token for key in ("add_tokens", "add_special_tokens") for token in _listed(key, reading[key]) or []]
    if not added:
        return
    if not reading["resize_vocab"]:
        raise OptionError("add_tokens of LLaMA-Factory needs rows in the embeddings: add resize_vocab: true.")
    reading.put(new_tokens=added)
    reading.note(
        "of the embeddings only the rows of new tokens are trained: LLaMA-Factory trains and saves them whole."
    )


def _lora(reading: Reading) -> dict[str, Any] | None:
    kind = reading["finetuning_type"]
    if kind == "full":
        return None
    if kind != "lora":
        raise reading.error("finetuning_type", "must be lora or full")
    rank, targets = integer("lora_rank", reading["lora_rank"]), _listed("lora_target", reading["lora_target"])
    found = {
        "r": rank, "lora_alpha": reading["lora_alpha"] or 2 * rank, "lora_dropout": reading["lora_dropout"],
        "target_modules": "all-linear" if targets == ["all"] else targets,
        "modules_to_save": _listed("additional_target", reading["additional_target"]),
        "use_rslora": reading["use_rslora"], "use_dora": reading["use_dora"],
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def _listed(key: str, value: Any) -> list[str] | None:
    """Names, in a list or with commas between them."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",")]
    if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise OptionError(f"{key} must be names with commas between them, got {short(value)}.")
    return value


def _dataset(reading: Reading, name: str, method: str) -> dict[str, Any]:
    """One entry of ``dataset_info.json``."""
    folder = Path(str(reading["dataset_dir"]))
    if str(folder) == "ONLINE":
        return {"dataset_name": name}
    registry = folder / "dataset_info.json"
    known = read_settings(registry, "data sets of LLaMA-Factory")
    if name not in known:
        raise OptionError(f"{registry} has no data set {name!r}.{did_you_mean(name, known)}")
    what = f"the data set {name} in {registry}"
    given = check_keys(mapping(what, known[name]), _ENTRY, what)
    pairs = method not in ("sft", "kto")
    if bool(given.get("ranking")) != pairs:
        has, wants = ("pairs of answers", "single ones") if given.get("ranking") else ("single answers", "pairs")
        raise OptionError(f"{what} has {has}, and stage={reading['stage']} needs {wants}: change ranking or the stage.")
    path = given.get("hf_hub_url")
    if path is None:
        path = str(folder / str(given.get("file_name", name)))
    found = {
        "dataset_name": data.source(path, None, reading.title),
        "dataset_config": given.get("subset"),
        "train_split": data.split(given.get("split"), "split"),
        "sample_size": given.get("num_samples"),
        **_columns(reading, given, what, method),
    }
    return {key: value for key, value in found.items() if value is not None}


def _columns(reading: Reading, given: Mapping[str, Any], what: str, method: str) -> dict[str, Any]:
    columns, tags = (mapping(f"{part} of {what}", given.get(part, {})) for part in ("columns", "tags"))
    kind = given.get("formatting", "alpaca")
    if reading["stage"] == "pt":
        return {"dataset_format": "text", "columns": data.renamed({"text": columns.get("prompt", "text")})}
    answers = _answers(columns, what, method)
    if kind == "alpaca":
        names = dict(_COLUMNS)
        if method != "sft":
            if "history" in columns:
                raise OptionError(f"{what} has a history, which rows with judged answers cannot have: use messages.")
            del names["response"]
            if method == "kto":
                answers = {"completion": columns.get("response", "output"), "label": answers["kto_tag"]}
        check_keys(columns, (*_COLUMNS, *_ANSWERS), f"columns of {what}")
        named = data.renamed({ours: columns.get(theirs) for theirs, ours in names.items()} | answers)
        return {"dataset_format": preferences.rows_of(method) if answers else "alpaca", "columns": named}
    if kind not in ("sharegpt", "openai"):
        raise OptionError(f"formatting={short(kind)} of {what} must be alpaca, sharegpt or openai.")
    check_keys(columns, ("messages", "system", "tools", *_ANSWERS), f"columns of {what}")
    check_keys(tags, (*_TAGS, *_ROLES), f"tags of {what}")
    openai = kind == "openai"
    defaults = {"role_tag": "role", "content_tag": "content"} if openai else _TAGS
    data.check_roles({tags[tag]: role for tag, (_, role) in _ROLES.items() if tag in tags}, reading.title)
    keys = {**defaults, **tags}
    found = data.conversations(
        columns.get("messages", "messages" if openai else "conversations"),
        keys["role_tag"], keys["content_tag"], reading.title,
    )  # fmt: skip
    if answers:
        found["dataset_format"] = preferences.rows_of(method)
    more = data.renamed({name: columns.get(name) for name in ("system", "tools")} | answers)
    return found if more is None else {**found, "columns": {**found.get("columns", {}), **more}}


def _answers(columns: Mapping[str, Any], what: str, method: str) -> dict[str, Any]:
    """The columns that say which answer is good, which have no usual names there; nothing for `sft`."""
    wanted = () if method == "sft" else ("kto_tag",) if method == "kto" else ("chosen", "rejected")
    for name in wanted:
        if not columns.get(name):
            raise OptionError(f"{what} does not say which column is {name}: add it to columns.")
    return {name: columns[name] for name in wanted}


_NO_EFFECT = {
    **dict.fromkeys(
        ("bf16", "fp16", "pure_bf16", "fp8", "bf16_full_eval", "fp16_full_eval", "tf32", "upcast_layernorm",
         "upcast_lmhead_output", "infer_dtype"), shared.PRECISION),
    **dict.fromkeys(
        ("flash_attn", "enable_liger_kernel", "use_unsloth", "use_unsloth_gc", "use_liger_kernel", "torch_compile",
         "torch_compile_backend", "torch_compile_mode", "use_kv_cache", "use_reentrant_gc",
         "disable_gradient_checkpointing"), shared.KERNELS),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "ddp_timeout", "ddp_find_unused_parameters", "local_rank"),
        shared.SHARDING),
    **dict.fromkeys(
        ("overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size", "dataloader_num_workers",
         "tokenized_path", "data_shared_file_system", "cache_dir"), shared.CACHED),
    **dict.fromkeys(
        ("use_swanlab", "swanlab_project", "swanlab_run_name", "swanlab_mode", "include_num_input_tokens_seen",
         "include_effective_tokens_per_second", "compute_accuracy", "print_param_status"), shared.SERVICES),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hf_hub_token"), shared.OFFLINE),
    **dict.fromkeys(("low_cpu_mem_usage", "device_map", "double_quantization", "quantization_type",
                     "quantization_method"), shared.DEVICES),
    **dict.fromkeys(("do_train", "do_eval", "predict_with_generate"),
                    "a run trains, and evaluates where there are rows for it"),
    **dict.fromkeys(("use_fast_tokenizer", "tool_format"), "the checkpoint's tokenizer says how"),
    "enable_thinking": "the chat template decides what it shows",
    "neftune_noise_alpha": "a compiled step adds no noise",
    "eval_on_each_dataset": "there is one evaluation",
}  # fmt: skip
_REFUSED = {
    **dict.fromkeys(
        ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "use_llama_pro"),
        "choose one of transformers' own optimizers with optim"),
    "pissa_init": "the base weights stay as they are",
    **dict.fromkeys(("pref_ftx", "pref_bco_weight", "dpo_label_smoothing", "ld_alpha"), preferences.ONE_LOSS),
    **dict.fromkeys(("ref_model", "ref_model_adapters", "ref_model_quantization_bit"),
                    "the reference is the model as it is before training"),
    **dict.fromkeys(("reward_model", "reward_model_adapters"), "only PPO has a reward model"),
    **dict.fromkeys(("rope_scaling", "shift_attn", "mixture_of_depths"),
                    "set it in the checkpoint's own configuration"),
    "adapter_name_or_path": "a run starts from the base model; merge the adapter first",
    "loraplus_lr_ratio": "all trained tensors have one learning rate",
    "model_revision": "download that revision and name its directory",
    "auto_find_batch_size": "set per_device_train_batch_size",
    "label_smoothing_factor": "the step returns the log-probability of the labels only",
    "use_dft_loss": "the loss is cross entropy",
}  # fmt: skip
_HANDLED = {
    "dataset": "the data options, by `dataset_info.json`",
    "dataset_dir": "where `dataset_info.json` is",
    "eval_dataset": "an error that names `val_size`",
    "stage": "`method`: sft, `rm` is reward, dpo, kto; `pt` is `train_on=all`",
    "pref_loss": "`method` in the stage dpo: `sigmoid` is dpo, `orpo`",
    "pref_beta": "`beta`",
    "kto_chosen_weight": "`desirable_weight`",
    "kto_rejected_weight": "`undesirable_weight`",
    **dict.fromkeys(("mix_strategy", "interleave_probs"), "`mixing`, and `weight` of the data sets"),
    **dict.fromkeys(("add_tokens", "add_special_tokens", "resize_vocab"), "`new_tokens`"),
    "finetuning_type": "`lora_config`; `full` is none",
    **{key: f"`lora_config.{name}`" for key, name in {
        "lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target": "target_modules",
        "additional_target": "modules_to_save", "use_rslora": "use_rslora", "use_dora": "use_dora",
    }.items()},
    "quantization_bit": "`base_weights`",
    **dict.fromkeys(("train_on_prompt", "mask_history"), "`train_on`"),
    "val_size": "`train_frac`, a share; of a stream `eval_rows`, a number",
    "streaming": "`streaming`",
    "buffer_size": "`shuffle_buffer_size`",
    "template": "`chat_template`; `chatml` and the tokenizer's own",
    "optim": "`optim`; those with a state of 8 bits keep it in 32",
    **dict.fromkeys(("packing", "neat_packing"), "`packing`"),
    "max_samples": "`sample_size`",
    "disable_shuffling": "`train_sampling_strategy=sequential`",
}  # fmt: skip
#: Hugging Face's own names, of this version of transformers and of older ones, mean the same here.
_HUGGING_FACE = ("warmup_ratio", "group_by_length", "evaluation_strategy", "gradient_checkpointing", *HF_NAMES)

LLAMA_FACTORY = Tool(
    name="llamafactory",
    title="LLaMA-Factory",
    version="0.9.6.dev0 (ff6d4d1)",
    marks=frozenset(
        ["finetuning_type", "stage", "template", "dataset_dir", "lora_target", "lora_rank", "quantization_bit",
         "overwrite_cache", "plot_loss", "val_size", "flash_attn", "pure_bf16"]
    ),
    same={
        "model_name_or_path": "model_id",
        "trust_remote_code": "trust_remote_code",
        "cutoff_len": "max_ctx_len",
        "default_system": "system_prompt",
        "early_stopping_steps": "early_stopping_patience",
        "overwrite_output_dir": "overwrite_output_dir",
        "plot_loss": "plot",
        **{name: name for name in _HUGGING_FACE if name not in {**_HANDLED, **_NO_EFFECT, **_REFUSED}},
    },
    handled=_HANDLED,
    # src/llamafactory/hparams there; the rest are defaults of transformers.TrainingArguments.
    defaults={
        "cutoff_len": 2048,
        "stage": "sft",
        "pref_loss": "sigmoid",
        "mix_strategy": "concat",
        "buffer_size": 16384,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "dataset_dir": "data",
        "val_size": 0.0,
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "seed": 42,
    },
    no_effect=_NO_EFFECT,
    refused=_REFUSED,
    finish=_finish,
)  # fmt: skip

"""Every option of a fine-tuning run as Markdown tables: ``python -m QEfficient.finetune.option_table FILE``."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from QEfficient.finetune import arguments, config, lora
from QEfficient.finetune.arguments import QEffTrainingArgs
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.layers import BASE_KEYS
from QEfficient.finetune.presets import PRESETS

_HF_DOCS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
#: Names of options in the "Attributes" of a docstring, and what they mean.
_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {6,}.*)*)", re.MULTILINE)

#: What options of transformers mean that most runs set.
_COMMON = {
    "per_device_train_batch_size": "rows of a micro-batch",
    "per_device_eval_batch_size": "rows of an evaluation batch",
    "gradient_accumulation_steps": "micro-batches of an optimizer step",
    "num_train_epochs": "passes over the training rows; a fraction stops early",
    "max_steps": "optimizer steps, instead of epochs; -1: by epochs",
    "learning_rate": "peak of the schedule",
    "lr_scheduler_type": "shape of the schedule: linear, cosine, constant, …",
    "lr_scheduler_kwargs": "options of that schedule, by name",
    "warmup_steps": "steps until the peak; below 1 a share of the run",
    "weight_decay": "of AdamW; not applied to norms and biases",
    "max_grad_norm": "gradients are scaled down to this norm; 0 leaves them",
    "optim": "optimizer, by transformers' name",
    "eval_strategy": "when to evaluate: no, steps, epoch",
    "eval_steps": "steps between evaluations; below 1 a share of the run",
    "save_strategy": "when to write a checkpoint: no, steps, epoch",
    "save_steps": "steps between checkpoints; below 1 a share of the run",
    "save_total_limit": "checkpoints kept, the oldest go first",
    "load_best_model_at_end": "end with the weights of the best evaluation",
    "metric_for_best_model": "which evaluation is best: loss, perplexity, accuracy",
    "resume_from_checkpoint": "directory of the checkpoint to go on from",
    "report_to": "other monitors: tensorboard, wandb, mlflow, trackio, …; none by default",
    "train_sampling_strategy": "order of rows: random, sequential, group_by_length",
    "seed": "of everything drawn at random",
    "data_seed": "of the order of rows, when it is not to be `seed`",
    "dataloader_drop_last": "leave out a short last batch",
    "disable_tqdm": "no progress lines",
    "logging_first_step": "a log line after the first step, whatever logging_steps is",
    "run_name": "what monitors call the run",
}


def page() -> str:
    """The whole page."""
    what = _attributes(QEffConfig)
    how = _attributes(QEffTrainingArgs)
    hf = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    fields = [f for f in dataclasses.fields(QEffTrainingArgs) if f.init]
    lines = [
        "# Options of fine-tuning",
        "",
        "`python -m QEfficient.finetune.option_table docs/finetuning_options.md` wrote this page.",
        "",
        "All options are given the same way: in a YAML or JSON file, as `name=value` or `--name value` behind",
        "`qefficient finetune`, or as keywords of `QEffConfig` and `QEffTrainingArgs`. A dot enters a mapping",
        "(`lora_config.r=16`). The command line wins over the file, the file over the files it names.",
        "",
        "## Of a file or a command line only",
        "",
        *_table(
            [
                (BASE_KEYS[0], "none", BASE_KEYS[1:], "file or files whose options this file builds on"),
                (
                    "preset",
                    "none",
                    (),
                    f"memory to fit into: {', '.join(PRESETS)}. Measures the run and sets batch, accumulation, "
                    "recompute and base_weights",
                ),
            ]
        ),
        "",
        "## What is tuned: `QEffConfig`",
        "",
        *_table(
            (f.name, _default(f), _spellings(f.name, config.ALIASES), what[f.name])
            for f in dataclasses.fields(QEffConfig)
        ),
        "",
        "## `lora_config`",
        "",
        "The keys are [peft's](https://huggingface.co/docs/peft/package_reference/lora).",
        "",
        *_table((name, "", _spellings(name, lora.LORA_ALIASES), _ADAPTER[name]) for name in lora.NAMES),
        "",
        "With `peft_type: IA3` they are those of [IA3](https://huggingface.co/docs/peft/package_reference/ia3):",
        "",
        *_table((name, "", _spellings(name, lora.LORA_ALIASES), _ADAPTER[name]) for name in lora.IA3_NAMES),
        "",
        "## How it runs: `QEffTrainingArgs`",
        "",
        *_table(
            (f.name, _default(f), _spellings(f.name, arguments.ALIASES), how[f.name]) for f in fields if f.name in how
        ),
        "",
        "## Options of transformers that most runs set",
        "",
        *_table(
            (f.name, _default(f), _spellings(f.name, arguments.ALIASES), _COMMON[f.name])
            for f in fields
            if f.name in _COMMON
        ),
        "",
        "Names of older versions are understood: `warmup_ratio`, `group_by_length`, `gradient_checkpointing`"
        " (`recompute`); so are `load_in_8bit` and `load_in_4bit` (`base_weights`), and `dtype` or `torch_dtype` where"
        " it is float32.",
        "",
        "## Other options of transformers",
        "",
        f"They mean what [transformers]({_HF_DOCS}) says.",
        "",
        *_table(
            (f.name, _default(f), _spellings(f.name, arguments.ALIASES), _refused(f.name))
            for f in fields
            if f.name in hf and f.name not in how and f.name not in _COMMON and f.name not in arguments.RENAMED
        ),
    ]
    return "\n".join(lines) + "\n"


#: What peft's keys mean here.
_ADAPTER = {
    "peft_type": "IA3; LoRA when it is left out",
    "feedforward_modules": "of target_modules, those whose input is scaled and not the output",
    "init_ia3_weights": "begin with ones, which change nothing",
    "r": "rank of the adapter",
    "lora_alpha": "the adapter counts lora_alpha / r times; peft's default is 8",
    "lora_dropout": "recorded; training uses 0, so that every run computes the same numbers",
    "target_modules": "module names, a pattern, or all-linear",
    "exclude_modules": "module names to leave out",
    "modules_to_save": "modules trained as a whole, such as a new head",
    "bias": "none, all, or lora_only",
    "use_rslora": "scale by the root of r instead of r",
    "use_dora": "train the magnitudes of the adapted weights apart from their directions (DoRA)",
    "trainable_token_indices": "tokens whose rows train: a list for the embedding, or module name -> list",
    "init_lora_weights": "how the adapter begins",
    "layers_to_transform": "numbers of the layers that get one",
    "layers_pattern": "name of the list of layers, where peft does not know it",
    "rank_pattern": "module pattern -> rank of its own",
    "alpha_pattern": "module pattern -> alpha of its own",
    "fan_in_fan_out": "weights are stored transposed, as in GPT-2",
    "task_type": "set from `task`",
}


def _attributes(cls: type) -> dict[str, str]:
    """Option -> what the class's docstring says it means."""
    body = inspect.cleandoc(cls.__doc__ or "")
    section = body.split("Attributes:\n", 1)[1].split("\n\nRaises:", 1)[0]
    found = {}
    for match in _ENTRY.finditer(section):
        for name in match[1].split(", "):
            found[name] = " ".join(match[2].split()).rstrip(".")
    return found


def _spellings(name: str, aliases: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(alias for alias, meant in aliases.items() if meant == name)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    if value is None:
        return "none"
    return "required" if value == "" and field.name == "model_id" else str(getattr(value, "value", value))


def _refused(name: str) -> str:
    return f"refused: {arguments._REFUSED[name]}" if name in arguments._REFUSED else ""


def _table(rows: Iterable[tuple[str, str, Iterable[str], str]]) -> list[str]:
    lines = ["| option | default | other names | meaning |", "|---|---|---|---|"]
    for name, default, others, meaning in rows:
        shown = "" if default == "" else f"`{default}`"
        spelled = ", ".join(f"`{other}`" for other in others)
        lines.append(f"| `{name}` | {shown} | {spelled} | {_escaped(meaning)} |")
    return lines


def _escaped(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")

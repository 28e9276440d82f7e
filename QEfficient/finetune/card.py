"""The model card of a run: ``README.md`` from what the run measured and wrote down, and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.callbacks import METRICS_FILE, read_rows
from QEfficient.finetune.checkpoint import ADAPTER_WEIGHTS
from QEfficient.finetune.methods.facts import METHODS
from QEfficient.finetune.run_record import ARGUMENTS_FILE, CONFIG_FILE, PROOF_FILE, read_record
from QEfficient.finetune.settings_file import read_settings, write_text

CARD = "README.md"
#: In every card of ours, and in no file that somebody wrote: says which ones may be replaced.
MARK = "<!-- qefficient card: measured values only. It is written anew by every run, unless this line is removed. -->"
_PIPELINES = {"generation": "text-generation", "seq_classification": "text-classification"}

#: Method -> what its loss is a mean over.
_UNITS = {
    **dict.fromkeys(("dpo", "orpo", "reward"), "loss per pair"),
    **dict.fromkeys(("sft", "distill"), "loss per trained token"),
    "kto": "loss per answer",
}

#: Options of `QEffConfig` and `QEffTrainingArgs` that make the update what it is.
_OPTIONS = (
    *("max_ctx_len", "packing", "train_on", "truncation"),
    *("method", *dict.fromkeys(name for facts in METHODS.values() for name in facts.options)),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "epoch_decay", "optim", "weight_decay", "max_grad_norm"),
    *("base_weights", "recompute", "load_best_model_at_end", "seed"),
)

Table = list[tuple[str, ...]]


def write_card(directory: str | Path) -> Path:
    """Writes the card of a run into its directory, atomically; returns the path.

    Raises:
        InputError: there is no finished run. OptionError: the README.md there was written by somebody else.
    """
    place = Path(directory)
    text = card_text(place)
    if not is_ours(place / CARD):
        raise OptionError(f"{place / CARD} was not written by qefficient, so it stays: move it away for a card.")
    return write_text(place / CARD, text, "the model card")


def is_ours(path: Path) -> bool:
    """Whether the file may be replaced: a card of ours, or none at all."""
    return not path.exists() or (path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace"))


def card_text(directory: str | Path) -> str:
    """The card of a run; sections of what was not measured are absent.

    Raises:
        InputError: there is no finished run.
        OptionError: one of its files was changed and cannot be read.
    """
    place = Path(directory)
    record = read_record(place)
    what = read_settings(place / CONFIG_FILE, "the configuration of the run")
    how = read_settings(place / ARGUMENTS_FILE, "the arguments of the run")
    adapter = (place / ADAPTER_WEIGHTS).is_file()
    logs = Path(how.get("logging_dir") or place / "logs")
    rows = read_rows(logs / METRICS_FILE)
    lines = [
        _header(record, what, adapter),
        MARK,
        "",
        f"# {place.resolve().name}",
        "",
        f"{'A LoRA adapter for' if adapter else 'Fine-tuned from'} {record['base_model']['name']}, trained through a "
        f"compiled ONNX step ({record['target']}).",
        *_section("Held-out rows", ("", "before training", "these weights"), _held_out(rows)),
        *_section("Training loss", ("optimizer step", _UNITS.get(what["method"], "loss")), _training_loss(rows)),
        *_section("What was trained", ("", ""), _trained(record, what, adapter)),
        *_section("Data", ("", "rows", "tokens", "trained tokens"), _data(place / "data_report.json", record)),
        *_section("Options", ("option", "value"), _options(what, how)),
        *_section("Cost", ("", ""), _cost(rows, record)),
        *_section("First step against torch autograd", ("", "difference"), _proof(place / PROOF_FILE)),
        *_section("Versions", ("library", "version"), record["libraries"].items()),
    ]
    return "\n".join(lines) + "\n"


def _header(record: Mapping[str, Any], what: Mapping[str, Any], adapter: bool) -> str:
    """The block that the hub reads: names of models and data only where the hub knows them."""
    from huggingface_hub import ModelCardData

    base = record["base_model"]["name"] if record["base_model"]["hub"] else None
    tags = ["lora", "transformers"] if adapter else []
    tags += [] if what["method"] == "sft" else [what["method"]]
    if base is not None:
        tags.insert(0, f"base_model:{'adapter' if adapter else 'finetune'}:{base}")
    data = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=_PIPELINES[what["task"]],
        tags=[*tags, "qefficient"],
        datasets=[record["dataset"]["name"]] if record["dataset"]["hub"] else None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _held_out(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The last evaluation of a run is of the weights it saves, which may be an earlier step's."""
    held = [row for row in rows if isinstance(row.get("eval_loss"), int | float)]
    if not held:
        return []
    first, last = held[0] if held[0]["step"] == 0 else {}, held[-1]
    rates = ("eval_runtime", "eval_tokens_per_second")
    keys = (key for key in last if key.startswith("eval_") and key not in rates)
    return [(key.removeprefix("eval_"), _number(first.get(key)), _number(last[key])) for key in keys]


def _training_loss(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The first and the last one that was logged."""
    logged = [(f"{row['step']:,}", _number(row["loss"])) for row in rows if isinstance(row.get("loss"), int | float)]
    return list(dict.fromkeys([*logged[:1], *logged[-1:]]))


def _trained(record: Mapping[str, Any], what: Mapping[str, Any], adapter: bool) -> Table:
    found: Table = [
        ("parameters", f"{record['trained_parameters']:,} in {record['trained_tensors']:,} tensors"),
        ("optimizer steps", f"{record['steps']:,}"),
    ]
    if adapter:
        found += [(f"lora_config.{name}", f"`{value}`") for name, value in (what.get("lora_config") or {}).items()]
    elif what.get("trainable"):
        found.append(("trainable", f"`{what['trainable']}`"))
    return found


def _data(report: Path, record: Mapping[str, Any]) -> Table:
    if not report.is_file():
        return []
    source, names = record["dataset"]["name"], {"train": "training", "eval": "held out"}
    splits = json.loads(report.read_text(encoding="utf-8"))["splits"]
    return [
        (f"{source}, {names[name]}", f"{split['rows']:,}", f"{split['tokens']:,}", f"{split['trained_tokens']:,}")
        for name, split in splits.items()
    ]


def _options(what: Mapping[str, Any], how: Mapping[str, Any]) -> Table:
    """What decided about the update; a run has a number of steps or of epochs."""
    given = {**what, **{name: value for name, value in how.items() if value is not None}}
    other = "max_steps" if given["max_steps"] == -1 else "num_train_epochs"
    foreign = {name for facts in METHODS.values() for name in facts.options} - {*METHODS[what["method"]].options}
    shown = [name for name in _OPTIONS if given.get(name) is not None and name not in {other, *foreign}]
    return [(name, f"`{given[name]}`") for name in shown]


def _cost(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> Table:
    """Sums over the metrics file. A row's time is its tokens divided by their rate, without evaluation and saving."""
    timed = [row for row in rows if row.get("tokens_per_second")]
    machine = record["machine"]
    found: Table = [("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['system']}")]
    if not timed:
        return found
    seconds = sum(row["tokens"] / row["tokens_per_second"] for row in timed)
    tokens, trained = (sum(row[name] for row in timed) for name in ("tokens", "trained_tokens"))
    of = f" (of the first of {record['processes']} processes)" if record["processes"] > 1 else ""
    found += [
        (f"steps up to {timed[-1]['step']:,}", f"{_number(seconds)} s{of}"),
        ("tokens in them", f"{tokens:,}, {trained:,} of them trained{of}"),
        ("tokens per second", f"{tokens / seconds:,.0f}{of}"),
        ("peak memory", f"{max(row['peak_rss_mb'] for row in timed):,.0f} MB{of}"),
    ]
    evaluations = [row["eval_runtime"] for row in rows if "eval_runtime" in row]
    if evaluations:
        found.append((f"{len(evaluations)} evaluations", f"{_number(sum(evaluations))} s"))
    return found


def _proof(report: Path) -> Table:
    if not report.is_file():
        return []
    found = json.loads(report.read_text(encoding="utf-8"))
    return [
        ("loss, relative", f"{found['loss_difference']:.1e}"),
        (f"worst of {found['tensors']:,} gradients, of its tensor's largest", f"{found['gradient_difference']:.1e}"),
        ("tensors after one AdamW update, of the learning rate", f"{found['update_difference']:.1e}"),
    ]


def _section(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A heading and a table; nothing when there are no rows."""
    body = [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    if not body:
        return []
    return ["", f"## {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body]


def _number(value: Any) -> str:
    """Four decimals of a small number, none of a large one; a dash for what was not measured."""
    if not isinstance(value, int | float):
        return "–"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"

"""``qefficient finetune``: fine-tunes a model through a compiled ONNX training step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from QEfficient.cli.common import CacheDir, TrustRemoteCode
from QEfficient.errors import OptionError


def finetune(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL|CONFIG.yaml] [NAME=VALUE]...",
            help="Model directory or hub id, or a file of options; then any option, as NAME=VALUE or --NAME VALUE.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "-d",
            metavar="DATA",
            help="'sample' (bundled), a file (jsonl, json, csv, parquet, txt), a directory or a hub id.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", "--output-dir", metavar="DIR", help="Where everything is written (./output)."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML or JSON with any option of QEffConfig and QEffTrainingArgs."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(metavar="N", min=0, help="Passes over the data (3).")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", min=1, help="Rows of a micro-batch (8).")] = None,
    accumulation: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Micro-batches of an optimizer step (1).")
    ] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", min=0, help="Learning rate (5e-5).")] = None,
    rank: Annotated[int | None, typer.Option(metavar="R", min=1, help="LoRA rank (8).")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train every weight instead of a LoRA adapter.")] = False,
    max_ctx_len: Annotated[int | None, typer.Option(metavar="N", min=2, help="Most tokens of a row (512).")] = None,
    packing: Annotated[bool, typer.Option("--packing", help="Pack several short rows into one.")] = False,
    base_weights: Annotated[
        str | None, typer.Option(metavar="KIND", help="Frozen weights in fp32, int8 or int4 (fp32).")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute layers again in the backward pass: less memory, more time.")
    ] = False,
    target: Annotated[str | None, typer.Option(metavar="NAME", help="Where the step runs (host).")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any other option, e.g. weight_decay=0.01; repeat for several."
        ),
    ] = None,
    transform: Annotated[
        list[str] | None,
        typer.Option("--transform", metavar="T", help="ONNX transform for the training graph, e.g. my.py:MyTransform."),
    ] = None,
    no_validate: Annotated[
        bool, typer.Option("--no-validate", help="Skip the comparison of the first step with torch.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="State peak memory and step time, and stop before training.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved options, the data audit and the memory estimate, and stop."),
    ] = False,
    from_tool: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TOOL",
            help="Whose file CONFIG is: axolotl, llamafactory, torchtune, mlx or qeff; usually recognised.",
            show_default=False,
        ),
    ] = None,
    write_config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the options read so far as a file of ours, YAML or JSON, and stop."),
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="DIR", help="Continue from this checkpoint.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew where the output directory holds an earlier run.")
    ] = False,
    cache_dir: CacheDir = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fine-tunes a model: LoRA by default, every weight with --full. Runs offline on the CPU.

    Prints what is trained, compares the first step with torch, trains with a progress line, and saves a PEFT adapter,
    metrics and a plot of the loss. Run again, it continues from its last checkpoint.

    [bold]Examples[/bold]

    qefficient finetune ./my-model --dataset rows.jsonl --output tuned --epochs 3 --lr 1e-4
    qefficient finetune ./my-model --dataset sample --output tuned --steps 60 --base-weights int4 --recompute
    qefficient finetune ./my-model --dataset rows.jsonl --output tuned --estimate
    qefficient finetune run.yaml learning_rate=1e-4 lora_config.r=16 --dry-run
    """
    from QEfficient.finetune.layers import overlay, read_words

    model, file, rest = _first_word(list(words or []))
    if file is not None and config is not None:
        raise OptionError(f"{config} and {file} are both files of options: give one, which may name the other as base.")
    source = file or config
    if source is None and from_tool is not None:
        raise OptionError("--from says whose file the options are in: name the file, too.")
    given = read_words([*rest, *(f"--{pair}" for pair in _pairs(setting or []))])
    chosen: dict[str, Any] = {
        "model_id": model, "dataset_name": dataset, "output_dir": output, "num_train_epochs": epochs,
        "max_steps": steps, "batch_size": batch_size, "gradient_accumulation_steps": accumulation,
        "learning_rate": lr, "max_ctx_len": max_ctx_len, "base_weights": base_weights, "target": target,
        "resume_from_checkpoint": resume,
    }  # fmt: skip
    given = overlay(given, {name: value for name, value in chosen.items() if value is not None})
    switches = {
        "packing": packing, "recompute": recompute, "dry_run": dry_run, "overwrite_output_dir": overwrite,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    given = overlay(given, {name: True for name, on in switches.items() if on})
    if no_validate:
        given["validate"] = False
    if full and rank is not None:
        raise OptionError("--full and --rank exclude each other: give one.")
    if full:
        given["lora_config"] = None
    elif rank is not None:
        given = overlay(given, {"lora_config": {"r": rank}})
    from QEfficient.finetune.config import ALIASES
    from QEfficient.finetune.foreign.read import read_options
    from QEfficient.finetune.options import resolved_text, split_options
    from QEfficient.finetune.settings_file import write_settings

    spellings = ("model_id", *(k for k, v in ALIASES.items() if v == "model_id"))
    notices: list[str] = []
    if source is not None:
        named = next((given[name] for name in spellings if given.get(name)), None)
        read, notices = read_options(source, from_tool, named)
        given = overlay(read, given)
    if not any(given.get(name) for name in spellings):
        raise OptionError("name a model: qefficient finetune MODEL --dataset DATA --output DIR.")
    preset = given.pop("preset", None)
    what, how = split_options(given)
    for notice in notices if how.process_index == 0 else ():
        typer.echo(notice, err=True)
    if what.dataset_name is None and what.datasets is None:
        raise OptionError("name the data with --dataset: a file, a directory, a hub id, or 'sample' to try it out.")
    if write_config is not None:
        if write_config.exists():
            raise OptionError(f"{write_config} exists: choose a new file for --write-config.")
        typer.echo(str(write_settings(write_config, given, "fine-tuning options")))
        return
    from QEfficient.finetune.refine import QEfficient

    def prepared(options: Mapping[str, Any]) -> QEfficient:
        return QEfficient(*split_options(options), transforms=tuple(transform or ()), cache_home_dir=cache_dir)

    from QEfficient.finetune.estimate import estimate_run

    if preset is not None:
        from QEfficient.finetune.presets import budget_mb, fitted

        given = fitted(given, budget_mb(preset), lambda options: estimate_run(prepared(options)))
        what, how = split_options(given)
    run = prepared(given)
    if estimate:
        typer.echo(str(estimate_run(run)))
        return
    if how.dry_run and how.process_index == 0:
        typer.echo(resolved_text(what, how))
    run.refine(load=False)
    if how.dry_run and how.process_index == 0:
        typer.echo(str(estimate_run(run)))
    elif how.process_index == 0:
        typer.echo(str(how.output_dir))


def _first_word(words: list[str]) -> tuple[str | None, Path | None, list[str]]:
    """(model, file of options, the other words): the first word names one of the two, unless it is an option."""
    if not words or words[0].startswith("-"):
        return None, None, words
    first = words[0]
    if first.endswith((".yaml", ".yml", ".json")) and not Path(first).is_dir():
        return None, Path(first), words[1:]
    if "=" in first and not Path(first).exists():
        return None, None, words
    return first, None, words[1:]


def _pairs(pairs: list[str]) -> list[str]:
    for pair in pairs:
        name, equals, _ = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"--set takes NAME=VALUE, got {pair!r}.")
    return pairs

"""``qefficient finetune``: fine-tunes a model through a compiled ONNX training step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from QEfficient.cli.common import CacheDir, TrustRemoteCode
from QEfficient.errors import OptionError


def finetune(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Model directory or hub id; may come from --config.", show_default=False),
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the data and the label audit.")] = False,
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
    """
    given = _from_file(config) | _settings(setting or [])
    chosen: dict[str, Any] = {
        "model_id": model, "dataset_name": dataset, "output_dir": output, "num_train_epochs": epochs,
        "max_steps": steps, "batch_size": batch_size, "gradient_accumulation_steps": accumulation,
        "learning_rate": lr, "max_ctx_len": max_ctx_len, "base_weights": base_weights, "target": target,
        "resume_from_checkpoint": resume,
    }  # fmt: skip
    given |= {name: value for name, value in chosen.items() if value is not None}
    switches = {
        "packing": packing, "recompute": recompute, "dry_run": dry_run, "overwrite_output_dir": overwrite,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    given |= {name: True for name, on in switches.items() if on}
    if no_validate:
        given["validate"] = False
    if full and rank is not None:
        raise OptionError("--full and --rank exclude each other: give one.")
    if full:
        given["lora_config"] = None
    elif rank is not None:
        given["lora_config"] = {**(given.get("lora_config") or {}), "r": rank}
    from QEfficient.finetune.config import ALIASES
    from QEfficient.finetune.options import split_options

    if not any(given.get(name) for name in ("model_id", *(k for k, v in ALIASES.items() if v == "model_id"))):
        raise OptionError("name a model: qefficient finetune MODEL --dataset DATA --output DIR.")
    what, how = split_options(given)
    if what.dataset_name is None:
        raise OptionError("name the data with --dataset: a file, a directory, a hub id, or 'sample' to try it out.")
    from QEfficient.finetune.refine import QEfficient

    run = QEfficient(what, how, transforms=tuple(transform or ()), cache_home_dir=cache_dir)
    if estimate:
        from QEfficient.finetune.estimate import estimate_run

        typer.echo(str(estimate_run(run)))
        return
    run.refine(load=False)
    if how.process_index == 0:
        typer.echo(str(how.output_dir))


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    from QEfficient.finetune.settings_file import read_settings

    return dict(read_settings(str(path), "fine-tuning options"))


def _settings(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are YAML of the option's type, so that numbers and lists are what they look like."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"--set takes NAME=VALUE, got {pair!r}.")
        from QEfficient.finetune.options import read_value

        name = name.replace("-", "_")
        found[name] = read_value(name, text)
    return found

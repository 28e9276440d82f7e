"""``qefficient validate``: does the package compute what Hugging Face computes?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from QEfficient.cli.common import (
    AsJson,
    CacheDir,
    Checkpoint,
    Pooling,
    Task,
    Transforms,
    TrustRemoteCode,
    check_texts,
    json_text,
)
from QEfficient.cli.compile_flags import EncoderFlags, ShapeFlags, TargetFlags, asked
from QEfficient.cli.opening import is_package
from QEfficient.errors import OptionError


def validate(
    model: Checkpoint,
    shapes: ShapeFlags,
    encoder: EncoderFlags,
    target: TargetFlags,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            "--text",
            "-t",
            metavar="TEXT",
            help="Input to compare on; repeat for several.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Greedy tokens to compare per prompt.")] = 16,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            help="Largest difference, relative to the largest value, that counts as equal.",
            show_default=False,
        ),
    ] = None,
    transform: Transforms = None,
    task: Task = None,
    pooling: Pooling = None,
    as_json: AsJson = False,
    cache_dir: CacheDir = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compares Hugging Face, transformed torch, ONNX and package; exits with 1 when they differ.

    Causal models: the logits of every token. Encoders: the outputs of a padded batch.
    A few built-in texts are used when none is given.

    [bold]Examples[/bold]

    qefficient validate ./my-model --prompt "How many apples are left?" --tokens 32
    qefficient validate ./my-encoder --pooling mean --json
    """
    options = asked(shapes, encoder, target).to_json()
    check_texts("text", prompt or ())
    if is_package(model):
        raise OptionError(f"{model} is a package, which has no reference: name the checkpoint it was made from.")
    from QEfficient.api import wrap

    wrapped = wrap(model, task=task, pooling=pooling, trust_remote_code=trust_remote_code, cache_home_dir=cache_dir)
    wrapped.compile(transforms=transform or (), **options)
    limits: dict[str, Any] = {"tokens": tokens, **({} if tolerance is None else {"tolerance": tolerance})}
    if wrapped.task == "text-generation":
        report = wrapped.validate(prompts=prompt, **limits)
    else:
        report = wrapped.validate(texts=prompt, **limits)
    if as_json:
        typer.echo(json_text(report.to_json()))
    else:
        from rich.console import Console

        Console().print(report.table())
    if not report.ok:
        raise typer.Exit(1)

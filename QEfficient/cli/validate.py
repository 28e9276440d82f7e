"""``qefficient validate``: does the package compute what Hugging Face computes?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from QEfficient.lines import read_lines

if TYPE_CHECKING:
    from QEfficient.evaluate.numerics_report import NumericsReport
    from QEfficient.evaluate.report import ParityReport


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
    measure: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXTFILE",
            help="With --simulate: take the perplexity of this UTF-8 text (- is standard input).",
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
    With --simulate qaic it measures instead what the number formats of a Cloud AI card cost: perplexity, cosine, equal
    tokens, the weights that lose most, and what overflows.

    [bold]Examples[/bold]

    qefficient validate ./my-model --prompt "How many apples are left?" --tokens 32
    qefficient validate ./my-encoder --pooling mean --json
    qefficient validate ./my-model --simulate qaic --measure held_out.txt
    """
    options = asked(shapes, encoder, target)
    if options.simulate is None and measure is not None:
        raise OptionError("--measure goes with --simulate qaic; qefficient quantize measures quantized weights.")
    if options.simulate is not None and (tolerance is not None or transform):
        raise OptionError("--tolerance and --transform do not go with --simulate, which measures and judges nothing.")
    check_texts("text", prompt or ())
    if is_package(model):
        raise OptionError(f"{model} is a package, which has no reference: name the checkpoint it was made from.")
    from QEfficient.api import wrap

    wrapped = wrap(model, task=task, pooling=pooling, trust_remote_code=trust_remote_code, cache_home_dir=cache_dir)
    if options.simulate is not None:
        plain = options.replace(simulate=None, mxfp6_matmul=False, mxint8_kv_cache=False)
        wrapped.compile(**plain.to_json())
        text = None if measure is None else "\n".join(read_lines(measure))
        _print(wrapped.validate(prompt, simulate=options.simulate, text=text, tokens=tokens), as_json)
        return
    wrapped.compile(transforms=transform or (), **options.to_json())
    limits: dict[str, Any] = {"tokens": tokens, **({} if tolerance is None else {"tolerance": tolerance})}
    if wrapped.task == "text-generation":
        report = wrapped.validate(prompts=prompt, **limits)
    else:
        report = wrapped.validate(texts=prompt, **limits)
    _print(report, as_json)
    if not report.ok:
        raise typer.Exit(1)


def _print(report: ParityReport | NumericsReport, as_json: bool) -> None:
    if as_json:
        typer.echo(json_text(report.to_json()))
    else:
        from rich.console import Console

        Console().print(report.table())

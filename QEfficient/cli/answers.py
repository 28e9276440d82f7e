"""Prompts through a package, and the answers on the terminal or as JSON."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from QEfficient.cli.common import json_text
from QEfficient.errors import OptionError

if TYPE_CHECKING:
    from QEfficient.engine.package import LoadedPackage
    from QEfficient.engine.results import GenerationResult

Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Print text as it is made; by default for one prompt on a terminal.",
        show_default=False,
    ),
]


def streams(texts: Sequence[str], stream: bool | None, as_json: bool) -> bool:
    """Whether to stream; OptionError when that was asked for and cannot be."""
    if stream and len(texts) != 1:
        raise OptionError(f"--stream follows one prompt and there are {len(texts)}: leave it out or pass one.")
    if stream and as_json:
        raise OptionError("--stream and --json exclude each other: give one.")
    if stream is None:
        return len(texts) == 1 and not as_json and sys.stdout.isatty()
    return stream


def answer(
    package: LoadedPackage, texts: Sequence[str], *, chat: bool, settings: dict[str, Any], stream: bool, as_json: bool
) -> None:
    """Generates and prints: text (or JSON) on stdout, measurements on stderr.

    Args:
        chat: the texts are user messages for the chat template.
        settings: keywords of `CompiledCausalLM.generate`.
        stream, as_json: as `streams` and the user decided.
    """
    if chat:
        asked: dict[str, Any] = {"messages": [[{"role": "user", "content": text}] for text in texts]}
    else:
        asked = {"prompts": list(texts)}
    result = package.generate(**asked, stream=stream, **settings)
    if as_json:
        typer.echo(json_text(as_body(package, texts, result)))
        return
    if not stream:
        _show(texts, result.texts)
    typer.secho(str(result.metrics), err=True, dim=True)


def as_body(package: LoadedPackage, texts: Sequence[str], result: GenerationResult) -> dict[str, Any]:
    """A result as JSON-ready data."""
    rows = zip(texts, result.texts, result.ids, result.finish_reasons, strict=True)
    metrics = result.metrics
    return {
        "model": package.manifest.model.get("name"),
        "package": str(package.directory),
        "results": [{"prompt": p, "text": t, "ids": i, "finish_reason": f} for p, t, i, f in rows],
        "metrics": {
            **dataclasses.asdict(metrics),
            "prefill_tokens_per_s": metrics.prefill_tokens_per_s,
            "decode_tokens_per_s": metrics.decode_tokens_per_s,
        },
    }


def _show(texts: Sequence[str], answers: Sequence[str]) -> None:
    if len(texts) == 1:
        typer.echo(answers[0])
        return
    for number, (text, found) in enumerate(zip(texts, answers, strict=True), 1):
        typer.echo(f"[{number}] {text}\n{found}\n")

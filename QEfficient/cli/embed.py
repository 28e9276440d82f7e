"""``qefficient embed``: one vector per text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from QEfficient.cli.common import CacheDir, Model, Threads, Transforms, TrustRemoteCode
from QEfficient.cli.compile_flags import EncoderFlags, TargetFlags, asked
from QEfficient.cli.opening import is_package, open_model
from QEfficient.cli.vectors import TextFlags, print_similarity, print_vectors, save_vectors, unit_length
from QEfficient.errors import OptionError

if TYPE_CHECKING:
    from QEfficient.engine.encoder import CompiledEncoder

#: Entries of a sentence-transformers pooling configuration -> our names.
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
    "mean": "mean",
    "cls": "cls",
    "max": "max",
    "lasttoken": "last",
}


def embed(
    model: Model,
    texts: TextFlags,
    shapes: EncoderFlags,
    target: TargetFlags,
    pooling: Annotated[
        str | None,
        typer.Option(
            metavar="mean|cls|max|last",
            help="How token vectors become one; by default as the checkpoint's 1_Pooling/config.json says, else mean.",
            show_default=False,
        ),
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale every vector to length 1.")] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Texts per call.")] = 32,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.npy", help="Write float32 [texts, size].", show_default=False),
    ] = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Print the cosine of every pair as a table.")
    ] = False,
    transform: Transforms = None,
    threads: Threads = None,
    cache_dir: CacheDir = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Turns texts into vectors.

    Without --output and --similarity one JSON object per text goes to stdout.
    Texts longer than the model takes are cut.

    [bold]Examples[/bold]

    qefficient embed ./all-MiniLM-L6-v2 --text "a cat" --text "a kitten" --similarity
    qefficient embed ./my-encoder --texts-file corpus.txt --normalize --output corpus.npy
    cat corpus.txt | qefficient embed ./my-package > corpus.jsonl
    """
    if output is not None and output.suffix != ".npy":
        raise OptionError(f"--output {output} must end in .npy: JSON lines go to stdout without --output.")
    options, lines = asked(shapes, target), texts.read()
    if pooling is None and not is_package(model):
        pooling = _checkpoint_pooling(model)
    with open_model(
        model,
        "feature-extraction",
        options,
        transforms=transform or (),
        pooling=pooling,
        trust_remote_code=trust_remote_code,
        cache_dir=cache_dir,
        threads=threads,
    ) as package:
        encoder: CompiledEncoder = package  # type: ignore[assignment]
        vectors = encoder.embed(lines, batch_size=batch_size)
    if normalize:
        vectors = unit_length(vectors)
    if output is not None:
        save_vectors(output, vectors)
        typer.echo(f"{output}: {vectors.dtype} {list(vectors.shape)}", err=True)
    if similarity:
        print_similarity(lines, vectors)
    elif output is None:
        print_vectors(lines, vectors)


def _checkpoint_pooling(model: str) -> str:
    """The pooling a sentence-transformers checkpoint was trained with, else "mean" and a line that says so.

    Raises:
        OptionError: it pools in a way this library has not.
        ModelLoadError: there is no such checkpoint.
    """
    from QEfficient.models.hub import resolve

    path = resolve(model) / "1_Pooling" / "config.json"
    if not path.is_file():
        typer.echo(f"{model} names no pooling: using mean (choose with --pooling).", err=True)
        return "mean"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    # Newer versions write one name instead of a switch per mode.
    modes = [str(config["pooling_mode"])] if "pooling_mode" in config else modes
    if len(modes) != 1 or modes[0] not in _MODES:
        raise OptionError(f"{path} asks for {modes or 'no pooling'}, which is not known here: choose with --pooling.")
    return _MODES[modes[0]]

"""Arguments and small helpers that several commands share."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from QEfficient.errors import InputError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint directory, a hub id such as org/name, or a compiled package directory.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A checkpoint directory or a hub id such as org/name.", show_default=False),
]
ModelOrGraph = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_ONNX",
        help="A checkpoint directory, a hub id such as org/name, or the model.onnx that export printed.",
        show_default=False,
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where exports and packages are kept, instead of $QEFF_HOME or the user's cache directory.",
        show_default=False,
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow the checkpoint's own Python code to run.")
]
Transforms = Annotated[
    list[str] | None,
    typer.Option(
        "--transform",
        metavar="NAME",
        help="ONNX transform to run before compiling, e.g. FP16Clip, SplitWeights:max_shard_size=1GB or "
        "file.py:Class; repeat for several, they run in this order.",
        show_default=False,
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="TASK",
        help="text-generation, feature-extraction or text-classification; "
        "chosen from the architecture in config.json when not given.",
        show_default=False,
    ),
]
Pooling = Annotated[
    str | None,
    typer.Option(
        metavar="mean|cls|max|last",
        help="How token vectors become one vector per text; without it an encoder gives one vector per token.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="CPU threads; all available cores by default.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
OutputDir = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="DIR", help="Also copy the result to this new directory.", show_default=False
    ),
]


def check_texts(kind: str, texts: Sequence[str]) -> None:
    """InputError for a text that is empty: said here, before minutes of compiling."""
    for number, text in enumerate(texts, 1):
        if not text:
            raise InputError(f"{kind} {number} is empty: pass some text.")


def json_text(body: Any) -> str:
    """One line of strict JSON: what is not a number in JSON (infinity, NaN) is written as null."""
    return json.dumps(_finite(body), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value

"""Texts through an encoder package: vectors or labels as JSON lines, a .npy file or a table."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from QEfficient.cli.common import check_texts, json_text
from QEfficient.errors import ArtifactWriteError, InputError
from QEfficient.lines import read_lines

if TYPE_CHECKING:
    import numpy as np

    from QEfficient.engine.package import LoadedPackage


@dataclass(frozen=True)
class TextFlags:
    """The texts to embed or classify."""

    text: Annotated[
        list[str] | None,
        typer.Option("--text", "-t", metavar="TEXT", help="A text; repeat for several.", show_default=False),
    ] = None
    texts_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="UTF-8 file with one text per line; - is standard input.", show_default=False
        ),
    ] = None

    @property
    def given(self) -> bool:
        return bool(self.text or self.texts_file)

    def read(self) -> list[str]:
        """The texts, from standard input when no flag gives any; InputError when there is none or an empty one."""
        texts = [*(self.text or ()), *(read_lines(self.texts_file) if self.texts_file else ())]
        if not texts and not sys.stdin.isatty():
            texts = read_lines(Path("-"))
        if not texts:
            raise InputError("there is no text: pass --text, --texts-file, or lines on standard input.")
        check_texts("text", texts)
        return texts


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Rows divided by their length; a zero row stays zero."""
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths).astype(vectors.dtype)


def print_vectors(texts: list[str], vectors: np.ndarray) -> None:
    """One JSON object per line."""
    for text, vector in zip(texts, vectors, strict=True):
        typer.echo(json_text({"text": text, "embedding": vector.tolist()}))


def save_vectors(path: Path, vectors: np.ndarray) -> None:
    """Writes a .npy file; ArtifactWriteError when that fails."""
    import numpy as np

    try:
        with path.open("wb") as file:
            np.save(file, vectors)
    except OSError as error:
        raise ArtifactWriteError(f"{path} cannot be written: {error.strerror}.") from error


def print_similarity(texts: list[str], vectors: np.ndarray) -> None:
    """The cosine of every pair, as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    unit = unit_length(vectors)
    table = Table("", "text", *(str(number) for number in range(1, len(texts) + 1)))
    for number, (text, row) in enumerate(zip(texts, unit @ unit.T, strict=True), 1):
        short = text if len(text) <= 40 else text[:39] + "…"
        table.add_row(str(number), escape(short), *(f"{cosine:.3f}" for cosine in row))
    Console().print(table)


def print_labels(package: LoadedPackage, texts: list[str], logits: np.ndarray) -> None:
    """One JSON object per line: the likeliest label and the probability of every label."""
    import numpy as np

    names = getattr(package, "labels", {})
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    for text, row in zip(texts, powers / powers.sum(axis=1, keepdims=True), strict=True):
        scores = {names.get(i, f"LABEL_{i}"): float(score) for i, score in enumerate(row)}
        best = max(scores, key=lambda name: scores[name])
        typer.echo(json_text({"text": text, "label": best, "scores": scores}))

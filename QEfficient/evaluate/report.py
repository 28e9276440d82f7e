"""The parity report: one row per stage, compared with Hugging Face."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class StageResult:
    """How far one stage is from Hugging Face.

    Attributes:
        stage: "transformed torch", "ONNX" or "package".
        max_abs: largest absolute difference of any output value.
        max_rel: ``max_abs`` divided by the largest magnitude of the reference.
        tokens_equal, tokens: greedy tokens that agree, of how many; 0 of 0 for models that make no tokens.
        ok: ``max_rel`` within the tolerance, every token equal and every value finite.
    """

    stage: str
    max_abs: float
    max_rel: float
    tokens_equal: int
    tokens: int
    ok: bool


@dataclass(frozen=True)
class ParityReport:
    """What `validate` found. ``ok`` is True when every stage agrees with Hugging Face."""

    model: str
    task: str
    compared: str
    tolerance: float
    stages: tuple[StageResult, ...]

    @property
    def ok(self) -> bool:
        return all(stage.ok for stage in self.stages)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [asdict(stage) for stage in self.stages]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok, "stages": self.rows}

    def table(self) -> Table:
        """A rich table of the stages."""
        from rich.table import Table

        table = Table(title=f"{self.model}: {self.compared} against Hugging Face", title_justify="left")
        for name in ("stage", "max |difference|", "relative", "equal tokens", "verdict"):
            table.add_column(name, justify="left" if name in ("stage", "verdict") else "right")
        table.add_row("Hugging Face", "reference", "", "", "")
        for stage in self.stages:
            tokens = f"{stage.tokens_equal} of {stage.tokens}" if stage.tokens else "-"
            verdict = "equal" if stage.ok else "DIFFERS"
            table.add_row(stage.stage, f"{stage.max_abs:.1e}", f"{stage.max_rel:.1e}", tokens, verdict)
        return table

    def __str__(self) -> str:
        return as_text(self.table())


def as_text(printed: Any) -> str:
    """What rich prints of a table, as plain text."""
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    Console(file=text, width=100).print(printed)
    return text.getvalue().rstrip()


def compare(
    stage: str,
    reference: np.ndarray,
    found: np.ndarray,
    tolerance: float,
    tokens: tuple[int, int] = (0, 0),
) -> StageResult:
    """Measures ``found`` against ``reference`` (same shape); a value that is not finite is never equal."""
    if reference.shape != found.shape:
        return StageResult(stage, float("inf"), float("inf"), 0, tokens[1], False)
    difference = np.abs(found.astype(np.float64) - reference.astype(np.float64))
    finite = bool(np.isfinite(difference).all())
    max_abs = float(difference.max(initial=0.0)) if finite else float("inf")
    scale = float(np.abs(reference).max(initial=0.0)) or 1.0
    max_rel = max_abs / scale
    ok = finite and max_rel <= tolerance and tokens[0] == tokens[1]
    return StageResult(stage, max_abs, max_rel, tokens[0], tokens[1], ok)

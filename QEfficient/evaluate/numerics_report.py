"""The numerics preview as a report: a row per number format, the weights that lose most, and what overflows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from QEfficient.evaluate.hot_spots import Overflow, WeightLoss
from QEfficient.evaluate.report import as_text

if TYPE_CHECKING:
    from rich.console import Group

#: Overflows and weights that the printed report names; `to_json` has them all.
_SHOWN = 5
_NOT_FINITE = "not finite"


@dataclass(frozen=True)
class FormatResult:
    """One set of number formats, compared with float32.

    Attributes:
        formats: "fp32", "fp16", "mxfp6", "mxint8 KV" or "mxfp6 + mxint8 KV"; all but the first compute in float16.
        perplexity: of the text; None when it is not finite, where the model makes no text, or there is none.
        cosine, least_cosine: mean and least cosine of logits (one vector per greedy step, or per text for a
            classifier) or of embeddings with those of float32; None when a value is not finite.
        equal, choices: first choices (tokens or classes) that agree with float32, of how many; 0 of 0 for embeddings.
    """

    formats: str
    perplexity: float | None
    cosine: float | None
    least_cosine: float | None
    equal: int
    choices: int


@dataclass(frozen=True)
class NumericsReport:
    """What a card's number formats cost.

    Attributes:
        compared: what the rows compare, in words.
        formats: fp32 first.
        losses: weights by what MXFP6 costs their products, largest first.
        overflows: tensors that float16 cannot hold.
    """

    model: str
    task: str
    compared: str
    formats: tuple[FormatResult, ...]
    losses: tuple[WeightLoss, ...]
    overflows: tuple[Overflow, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def cells(self) -> list[list[str]]:
        """The rows as text: formats, perplexity, mean and least cosine, equal first choices."""
        no_perplexity = "-" if all(row.perplexity is None for row in self.formats) else _NOT_FINITE
        return [
            [
                row.formats,
                no_perplexity if row.perplexity is None else f"{row.perplexity:.4f}",
                _cosine(row.cosine),
                _cosine(row.least_cosine),
                f"{row.equal} of {row.choices}" if row.choices else "-",
            ]
            for row in self.formats
        ]

    def notes(self) -> list[str]:
        """Sentences about weights and overflows, below the table."""
        worst = ", ".join(f"{loss.name} ({loss.output:.2%})" for loss in self.losses[:_SHOWN])
        lines = [f"MXFP6 changes most what comes out of {worst}."] if worst else []
        for kind, happens in (("weight", "clipped to 65504"), ("activation", "infinite in float16")):
            found = [o for o in self.overflows if o.kind == kind]
            if found:
                names = ", ".join(f"{o.name} ({o.largest:.3g})" for o in found[:_SHOWN])
                more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
                lines.append(f"{happens}: the {kind}s {names}{more}.")
        if not self.overflows:
            lines.append("Nothing left the range of float16 on this input.")
        return lines

    def table(self) -> Group:
        """A rich table with the notes below it."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title=f"{self.model}: {self.compared}", title_justify="left")
        for name in HEADINGS:
            table.add_column(name, justify="left" if name == HEADINGS[0] else "right")
        for cells in self.cells():
            table.add_row(*cells)
        return Group(table, *self.notes())

    def __str__(self) -> str:
        return as_text(self.table())


#: Above the columns of `NumericsReport.cells`.
HEADINGS = ("formats", "perplexity", "mean cosine", "least cosine", "equal first choices")


def _cosine(value: float | None) -> str:
    return _NOT_FINITE if value is None else f"{value:.6f}"

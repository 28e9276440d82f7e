"""A picture of a run, drawn from its metrics file: loss, learning rate, gradient norm and throughput over steps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from QEfficient.finetune.callbacks import read_rows
from QEfficient.store.files import replacing


@dataclass(frozen=True)
class Panel:
    """One diagram: what its axis says, and key of a metrics row -> name in the legend."""

    title: str
    curves: Mapping[str, str]


#: Keys of evaluation rows begin with ``eval_``; there are few of them, so each gets a dot.
PANELS = (
    Panel("loss per trained token", {"loss": "training", "eval_loss": "held out"}),
    Panel("learning rate", {"learning_rate": ""}),
    Panel("gradient norm", {"grad_norm": ""}),
    Panel(
        "tokens per second",
        {
            "padded_tokens_per_second": "with padding",
            "tokens_per_second": "real",
            "trained_tokens_per_second": "trained",
        },
    ),
)

Points = list[tuple[int, float]]


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Key of a panel -> its (optimizer step, value) in the order of ``rows``; values that are no numbers are left out.

    Rates are of training alone: evaluation rows have a ``tokens_per_second`` under another name.
    """
    found: dict[str, Points] = {key: [] for panel in PANELS for key in panel.curves}
    for row in rows:
        for key, points in found.items():
            value = row.get(key)
            if isinstance(value, int | float):
                points.append((row["step"], value))
    return found


def draw_run(rows: Sequence[Mapping[str, Any]], picture: Path) -> bool:
    """Writes the picture of a metrics file's rows as PNG, atomically; False when no step was logged yet.

    Raises:
        ArtifactWriteError: the picture cannot be written; an older one is intact.
    """
    found = curves(rows)
    if not found["loss"]:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(2, 2, sharex=True)
    for panel, place in zip(PANELS, places.flat, strict=True):
        for key, label in panel.curves.items():
            if found[key]:
                steps, values = zip(*found[key], strict=True)
                style = "o-" if key.startswith("eval_") or len(steps) == 1 else "-"
                place.plot(steps, values, style, label=label or None, linewidth=1, markersize=4)
        place.set_title(panel.title, fontsize="medium")
        place.grid(alpha=0.3)
        if any(label and found[key] for key, label in panel.curves.items()):
            place.legend()
    for place in places[-1]:
        place.set_xlabel("optimizer step")
    with replacing(picture, "the picture of the run") as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


class RunPlot(TrainerCallback):
    """Draws the picture after every evaluation and at the end. A picture that cannot be had is no reason to stop."""

    def __init__(self, metrics: Path, picture: Path) -> None:
        self.metrics, self.picture = metrics, picture

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._draw(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._draw(state)

    def _draw(self, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        try:
            draw_run(read_rows(self.metrics), self.picture)
        # No disk, a matplotlib that is missing or set up wrongly, a font it cannot read: all of them after the step
        # that was paid for.
        except (OSError, ImportError, ValueError, RuntimeError, MemoryError) as error:
            reason = str(error).split("\n")[0]
            warnings.warn(f"{self.picture.name} was not drawn ({reason}); the run goes on.", stacklevel=2)

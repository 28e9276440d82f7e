"""What a run shows and writes while it trains: a progress line, a metrics file, a picture of the loss."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends one JSON object per log event to ``metrics.jsonl``. A resumed run drops rows after its checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / METRICS_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= state.global_step]
        if state.global_step == 0:
            kept = []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        if logs and state.is_world_process_zero:
            row = {"step": state.global_step, "epoch": state.epoch, **logs}
            row = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class ProgressLine(TrainerCallback):
    """A live line on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream
        self._live = False
        self._began, self._first = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._began, self._first = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._show(_train_line(logs, state, self._remaining(state)), keep=False)
        elif "eval_loss" in logs:
            self._show(_eval_line(logs, state), keep=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if self._live:
            self._out().write("\n")
            self._live = False

    def _out(self) -> TextIO:
        return self.stream if self.stream is not None else sys.stderr

    def _show(self, line: str, keep: bool) -> None:
        out = self._out()
        if not out.isatty():
            out.write(line + "\n")
        else:
            out.write(f"\r\x1b[2K{line}" + ("\n" if keep else ""))
            self._live = not keep
        out.flush()

    def _remaining(self, state: TrainerState) -> str:
        done = state.global_step - self._first
        if done <= 0 or state.max_steps <= state.global_step:
            return "0:00"
        seconds = int((time.perf_counter() - self._began) / done * (state.max_steps - state.global_step))
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _train_line(logs: dict[str, Any], state: TrainerState, remaining: str) -> str:
    parts = [f"step {state.global_step}/{state.max_steps}", f"loss {logs['loss']:.4f}"]
    for name, text in (("learning_rate", "lr {:.2e}"), ("grad_norm", "grad-norm {:.3f}")):
        if isinstance(logs.get(name), int | float):
            parts.append(text.format(logs[name]))
    if "tokens_per_second" in logs:
        parts.append(
            f"{logs['trained_tokens_per_second']:,.0f} trained / {logs['tokens_per_second']:,.0f} / "
            f"{logs['padded_tokens_per_second']:,.0f} padded tok/s"
        )
        parts.append(f"padding {100 * logs['padding_ratio']:.1f}%")
        parts.append(f"memory {logs['rss_mb']:,.0f} MB (peak {logs['peak_rss_mb']:,.0f})")
    return " | ".join([*parts, f"left {remaining}"])


def _eval_line(logs: dict[str, Any], state: TrainerState) -> str:
    when = f"at step {state.global_step}" if state.global_step else "before training"
    parts = [f"evaluation {when}: loss {logs['eval_loss']:.4f}"]
    if "eval_perplexity" in logs:
        parts.append(f"perplexity {logs['eval_perplexity']:.3f}")
    if "eval_accuracy" in logs:
        parts.append(f"accuracy {logs['eval_accuracy']:.4f}")
    return " | ".join(parts)


class LossPlot(TrainerCallback):
    """Draws ``loss.png`` from the metrics file when training ends."""

    def __init__(self, metrics: Path, picture: Path) -> None:
        self.metrics, self.picture = metrics, picture

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if state.is_world_process_zero:
            draw_losses(read_metrics(self.metrics), self.picture)


def draw_losses(rows: list[dict[str, Any]], picture: Path) -> bool:
    """Loss, learning rate and gradient norm over steps as a PNG; False when there is nothing to draw."""
    trained = [(r["step"], r["loss"]) for r in rows if isinstance(r.get("loss"), int | float)]
    if not trained:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    held = [(r["step"], r["eval_loss"]) for r in rows if isinstance(r.get("eval_loss"), int | float)]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(*zip(*trained, strict=True), label="training", linewidth=1)
    if held:
        top.plot(*zip(*held, strict=True), "o-", label="held out")
    top.set_ylabel("loss per trained token")
    top.legend()
    for name in ("learning_rate", "grad_norm"):
        points = [(r["step"], r[name]) for r in rows if isinstance(r.get(name), int | float)]
        if points:
            bottom.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1)
    bottom.set_yscale("log")
    bottom.set_xlabel("optimizer step")
    bottom.legend()
    temporary = picture.with_name(f".{picture.name}")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(picture)
    return True

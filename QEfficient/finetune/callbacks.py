"""What a run shows and writes while it trains: a progress line and a metrics file."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from QEfficient.finetune.settings_file import write_text

METRICS_FILE = "metrics.jsonl"


class RowFile:
    """A file of one JSON object per line, each of an optimizer step. Appended to, and cut back when a run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> None:
        """Keeps the rows up to ``step``, from which a run goes on; a run from the start (0) keeps none."""
        kept = [row for row in read_rows(self.path) if row.get("step", 0) <= step] if step else []
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), "the run's records")

    def add(self, *rows: dict[str, Any]) -> None:
        """Appends rows; not-a-number and infinity, which JSON has no words for, as text."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                plain = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()}
                file.write(json.dumps(plain, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class MetricsFile(TrainerCallback):
    """Appends one JSON object per log event to ``metrics.jsonl``. A resumed run drops rows after its checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.rows = RowFile(directory / METRICS_FILE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if state.is_world_process_zero:
            self.rows.begin(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        if logs and state.is_world_process_zero:
            self.rows.add({"step": state.global_step, "epoch": state.epoch, **logs})


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

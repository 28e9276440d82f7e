"""Counts tokens and time of training steps, and turns them into the rates of a progress line."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field


def perplexity(loss: float) -> float:
    """exp of a mean loss, as large as a float can be where that is larger."""
    return math.exp(min(loss, 700.0))


@dataclass
class Window:
    """Totals since the last log line of this process; ``loss`` and ``sums`` are sums over ``count``."""

    loss: float = 0.0
    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    trained: int = 0
    tokens: int = 0
    padded: int = 0
    steps: int = 0
    began: float = field(default_factory=time.perf_counter)
    paused: float = 0.0


class Meter:
    """Totals of a run and of the current window. Pauses (evaluation, saving) do not count as training time."""

    def __init__(self) -> None:
        self.window = Window()
        self.tokens_seen = 0
        self.trained_seen = 0

    def add(
        self,
        loss_sum: float,
        count: int,
        *,
        trained: int,
        tokens: int,
        padded: int,
        sums: Mapping[str, float] | None = None,
    ) -> None:
        """One micro-batch: the loss summed over what it is a mean of, how many those are, its trained tokens, its real
        tokens, its size with padding, and metrics summed over the same."""
        window = self.window
        window.loss += loss_sum
        window.count += count
        for name, value in (sums or {}).items():
            window.sums[name] = window.sums.get(name, 0.0) + value
        window.trained += trained
        window.tokens += tokens
        window.padded += padded
        self.tokens_seen += tokens
        self.trained_seen += trained

    def begin(self) -> None:
        """Training begins: nothing before it counts."""
        self.window = Window()

    def step(self) -> None:
        """An optimizer step is done."""
        self.window.steps += 1

    def pause(self, seconds: float) -> None:
        """Takes time out of the window."""
        self.window.paused += seconds

    def read(self) -> dict[str, float]:
        """Rates of the window, which then starts anew; empty when nothing was trained since the last call."""
        window, self.window = self.window, Window()
        if not window.steps:
            return {}
        seconds = max(time.perf_counter() - window.began - window.paused, 1e-9)
        found = {
            "trained_tokens": window.trained,
            "tokens": window.tokens,
            "padded_tokens": window.padded,
            "trained_tokens_per_second": round(window.trained / seconds, 1),
            "tokens_per_second": round(window.tokens / seconds, 1),
            "padded_tokens_per_second": round(window.padded / seconds, 1),
            "padding_ratio": round(1 - window.tokens / window.padded, 4) if window.padded else 0.0,
            "step_time_ms": round(1000 * seconds / window.steps, 2),
            "rss_mb": round(current_rss_mb(), 1),
            "peak_rss_mb": round(peak_rss_mb(), 1),
            "num_input_tokens_seen": self.tokens_seen,
        }
        if window.count:
            found["loss"] = window.loss / window.count
            found |= {name: value / window.count for name, value in window.sums.items()}
        return found


def peak_rss_mb() -> float:
    """The most memory this process had at once, in MB."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            # getrusage's figure starts at the parent's peak, which a child never had.
            return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith("VmHWM:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def current_rss_mb() -> float:
    """Memory this process has now, in MB; the peak where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, ValueError, IndexError):
        return peak_rss_mb()

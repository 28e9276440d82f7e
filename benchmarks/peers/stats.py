"""The statistics of the report: medians with their range, ratios round by round, shares of the memory bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median and what it lies between."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def rate(amount: float, seconds: Sequence[float]) -> Spread:
    """Amount per second; the longest time gives the lowest rate."""
    times = spread(seconds)
    return Spread(amount / times.median, amount / times.high, amount / times.low)


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """How many times as fast ours was: the median over rounds of their seconds by ours.

    Round by round, because a slow minute of the machine hits both sides of one round. None without a common round.
    """
    rounds = list(zip(ours, theirs, strict=False))  # a peer that failed on the way has fewer
    return statistics.median(their / our for our, their in rounds) if rounds else None


def bandwidth_share(bytes_per_token: float, tokens_per_s: float, gigabytes_per_s: float) -> float:
    """Which part of the readable bytes per second the weights of the decoded tokens are."""
    return bytes_per_token * tokens_per_s / (gigabytes_per_s * 1e9)

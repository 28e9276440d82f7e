"""Fits a run into memory: batch, accumulation, recompute and the precision of frozen weights, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from QEfficient.errors import OptionError, TrainingError
from QEfficient.finetune.keywords import choice
from QEfficient.finetune.layers import overlay

#: Name -> memory of the machine it is for, GB; None measures what is free here.
PRESETS: dict[str, int | None] = {
    "auto": None,
    "host-4gb": 4,
    "host-8gb": 8,
    "host-16gb": 16,
    "host-32gb": 32,
    "host-64gb": 64,
}
#: Share of the memory that a run may take: the estimate is good to 15 %, and others run here, too.
_SHARE = 0.8
#: Ways to need less memory, those that cost least time first.
_RUNGS: tuple[dict[str, Any], ...] = (
    {},
    {"recompute": True},
    {"recompute": True, "base_weights": "int8"},
    {"recompute": True, "base_weights": "int4"},
)
_ROWS, _WINDOW = "per_device_train_batch_size", "gradient_accumulation_steps"


class Measured(Protocol):
    """What is needed of `QEfficient.finetune.estimate.Estimate`."""

    @property
    def peak_mb(self) -> float: ...
    @property
    def step_mb(self) -> float: ...


def budget_mb(preset: Any) -> float:
    """Megabytes that a run may take under a preset.

    Raises:
        OptionError: no such preset.
    """
    gigabytes = PRESETS[choice("preset", preset, PRESETS)]
    if gigabytes is not None:
        return gigabytes * 1000 * _SHARE
    import psutil

    return float(psutil.virtual_memory().available) / 1e6 * _SHARE


def fitted(
    options: Mapping[str, Any], budget: float, measure: Callable[[Mapping[str, Any]], Measured]
) -> dict[str, Any]:
    """The options with batch and accumulation, and if need be recompute and base weights, that fit into memory.

    The rows of an optimizer step stay as many as asked: what a micro-batch loses, accumulation gains. What the options
    say about recompute and base weights stays.

    Args:
        options: a flat set of options, such as `layers.read_layers` returns.
        budget: megabytes.
        measure: options -> the estimate of a run with them; TrainingError when its largest batch cannot be run.

    Raises:
        OptionError: nothing fits.
    """
    from QEfficient.finetune.options import split_options

    what, how = split_options(options)
    rows = how.per_device_train_batch_size * how.gradient_accumulation_steps
    least = None
    for rung in _RUNGS:
        if any(options.get(name) not in (None, value, False, "fp32") for name, value in rung.items()):
            continue
        if what.uses_dora and "base_weights" in rung:  # which would be refused
            continue
        micro = how.per_device_train_batch_size
        while micro >= 1:
            tried = overlay(options, {**rung, _ROWS: micro, _WINDOW: rows // micro})
            try:
                found = measure(tried)
            except TrainingError:
                micro = _smaller(micro, rows, micro // 2)
                continue
            if found.peak_mb <= budget:
                return tried
            least = min(found.peak_mb, least or found.peak_mb)
            fixed = found.peak_mb - found.step_mb
            micro = _smaller(micro, rows, int((budget - fixed) / max(found.step_mb / micro, 1e-9)))
    wanted = "" if least is None else f" (the least of those tried was {least:,.0f} MB)"
    raise OptionError(
        f"no batch of this run fits into {budget:,.0f} MB{wanted}: lower max_ctx_len, or choose a smaller model."
    )


def _smaller(micro: int, rows: int, wanted: int) -> int:
    """The largest divisor of ``rows`` that is below ``micro`` and at most ``wanted``; 0 when there is none."""
    return next(_divisors(rows, min(micro - 1, wanted)), 0)


def _divisors(rows: int, most: int) -> Iterator[int]:
    return (size for size in range(most, 0, -1) if rows % size == 0)

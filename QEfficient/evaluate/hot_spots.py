"""Where a card's formats cost most on the caller's own input: what leaves the range of float16, what MXFP6 changes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from QEfficient.evaluate.steps import OnnxSteps, encoder_feeds, plain_session
from QEfficient.exporter.interface import Interface
from QEfficient.models.packaging import Workshop
from QEfficient.onnx_io import file_tensors, load_model
from QEfficient.progress import silent
from QEfficient.targets import cloud_graph
from QEfficient.targets.options import CompileOptions
from QEfficient.transforms.onnx.queue import resolve
from QEfficient.transforms.onnx.watch_products import OUTPUT as PRODUCTS
from QEfficient.transforms.onnx.watch_products import WatchProducts
from QEfficient.transforms.onnx.watch_ranges import OUTPUT as RANGES
from QEfficient.transforms.onnx.watch_ranges import WatchRanges

if TYPE_CHECKING:
    from QEfficient.engine.package import LoadedPackage

#: From here on rounding to float16 gives infinity: half a step beyond its largest number, 65504.
OVERFLOW = 65520.0


@dataclass(frozen=True)
class Overflow:
    """A tensor beyond float16.

    Attributes:
        name: of the weight, or of the node of the card's graph that computes it.
        kind: "weight" (clipped to 65504 when compiled for the card) or "activation" (infinite on the card).
        largest: largest magnitude in float32.
    """

    name: str
    kind: str
    largest: float


@dataclass(frozen=True)
class WeightLoss:
    """What MXFP6 costs one weight.

    Attributes:
        output: error of its products on the caller's input, as a share of their length.
        stored: error of the weight itself, as a share of its length.
    """

    name: str
    output: float
    stored: float


def examine(
    onnx_path: Path, package: LoadedPackage, rows: Sequence[np.ndarray]
) -> tuple[list[Overflow], list[WeightLoss]]:
    """Weights, then activations on these rows, that float16 cannot hold, largest first; weights by what MXFP6 costs.

    The card's graph runs in float32, so that one overflow or error does not hide what comes after it.

    Args:
        onnx_path: the export the package was made from.
        rows: token ids int64 [tokens] of each row, which runs alone.
    """
    interface = Interface.load(onnx_path.parent)
    capacity = getattr(package, "ctx_len", None)
    card = cloud_graph.transforms(CompileOptions(ctx_len=capacity), interface.task)
    with tempfile.TemporaryDirectory() as scratch:
        workshop = Workshop(interface, Path(scratch), silent)
        watched, _ = workshop.run(onnx_path, [*resolve(card), WatchRanges(), WatchProducts()])
        facts = {record["name"]: record["facts"] for record in workshop.records}
        found = _run(watched, interface, package, rows)
    peaks = np.max([np.nan_to_num(peaks, nan=np.inf) for peaks, _ in found], axis=0)
    activations = [
        Overflow(name, "activation", float(peak))
        for name, peak in zip(facts["WatchRanges"]["nodes"], peaks.tolist(), strict=True)
        if peak >= OVERFLOW
    ]
    weights = [Overflow(name, "weight", peak) for name, peak in _peaks(onnx_path, facts["FP16Clip"]["clipped"])]
    sums = np.sum([squares.astype(np.float64) for _, squares in found], axis=0).reshape(-1, 2)
    outputs = np.sqrt(sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], 1)).tolist()
    stored: dict[str, float] = facts["WatchProducts"]["relative_error"]
    losses = [WeightLoss(name, output, stored[name]) for name, output in zip(stored, outputs, strict=True)]
    overflows = [*sorted(weights, key=lambda o: -o.largest), *sorted(activations, key=lambda o: -o.largest)]
    return overflows, sorted(losses, key=lambda loss: -loss.output)


def _run(
    watched: Path, interface: Interface, package: LoadedPackage, rows: Sequence[np.ndarray]
) -> list[list[np.ndarray]]:
    """The watching outputs for each row."""
    wanted = [RANGES, PRODUCTS]
    if interface.task != "text-generation":
        session = plain_session(watched)
        return [session.run(wanted, encoder_feeds(session, row[None], np.ones_like(row[None]))) for row in rows]
    runner = OnnxSteps(watched, interface, package.adapter_values)  # type: ignore[attr-defined]
    found = []
    for row in rows:
        runner.begin(package.ctx_len)  # type: ignore[attr-defined]
        feeds = runner.feeds(row[None], np.arange(len(row), dtype=np.int64)[None])
        found.append(runner.session.run(wanted, feeds))
    return found


def _peaks(onnx_path: Path, clipped: Sequence[str]) -> list[tuple[str, float]]:
    """Largest magnitudes of the weights among clipped constants: a mask of -3.4e38 is meant to be clipped."""
    weights = file_tensors(load_model(onnx_path))
    found = [(name, weights[name].numpy()) for name in clipped if name in weights]
    return [(name, float(np.abs(array.astype(np.float32)).max())) for name, array in found]

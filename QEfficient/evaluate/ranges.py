"""Which numbers of a model leave the range of float16 on the caller's own input."""

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
from QEfficient.onnx_io import load_model
from QEfficient.progress import silent
from QEfficient.targets import cloud_graph
from QEfficient.targets.options import CompileOptions
from QEfficient.transforms.onnx.queue import resolve
from QEfficient.transforms.onnx.watch_ranges import OUTPUT, WatchRanges

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


def overflows(onnx_path: Path, package: LoadedPackage, rows: Sequence[np.ndarray]) -> list[Overflow]:
    """Weights and constants of the export beyond float16, then activations on these rows, largest first.

    The card's graph runs in float32, so that one overflow does not hide what comes after it.

    Args:
        onnx_path: the export the package was made from.
        rows: token ids int64 [tokens] of each row, which runs alone.
    """
    interface = Interface.load(onnx_path.parent)
    capacity = getattr(package, "ctx_len", None)
    card = cloud_graph.transforms(CompileOptions(ctx_len=capacity), interface.task)
    with tempfile.TemporaryDirectory() as scratch:
        workshop = Workshop(interface, Path(scratch), silent)
        watched, _ = workshop.run(onnx_path, [*resolve(card), WatchRanges()])
        facts = {record["name"]: record["facts"] for record in workshop.records}
        if interface.task == "text-generation":
            runner = OnnxSteps(watched, interface, package.adapter_values)  # type: ignore[attr-defined]
            found = [_causal(runner, row, capacity or len(row)) for row in rows]
            del runner
        else:
            session = plain_session(watched)
            feeds = [encoder_feeds(session, row[None], np.ones_like(row[None])) for row in rows]
            found = [session.run([OUTPUT], values)[0] for values in feeds]
            del session
    peaks = np.max(np.stack([np.nan_to_num(values, nan=np.inf) for values in found]), axis=0)
    activations = [
        Overflow(name, "activation", float(peak))
        for name, peak in zip(facts["WatchRanges"]["nodes"], peaks.tolist(), strict=True)
        if peak >= OVERFLOW
    ]
    weights = [Overflow(name, "weight", peak) for name, peak in _peaks(onnx_path, facts["FP16Clip"]["clipped"])]
    return [*sorted(weights, key=_size), *sorted(activations, key=_size)]


def _causal(runner: OnnxSteps, row: np.ndarray, capacity: int) -> np.ndarray:
    runner.begin(capacity)
    feeds = runner.feeds(row[None], np.arange(len(row), dtype=np.int64)[None])
    return np.asarray(runner.session.run([OUTPUT], feeds)[0])


def _peaks(onnx_path: Path, clipped: Sequence[str]) -> list[tuple[str, float]]:
    """Largest magnitudes of those of the clipped constants that are weights of the export."""
    stored = load_model(onnx_path).graph.initializers
    tensors = {name: stored[name].const_value for name in clipped if name in stored}
    return [(name, float(np.abs(t.numpy().astype(np.float32)).max())) for name, t in tensors.items() if t is not None]


def _size(overflow: Overflow) -> float:
    return -overflow.largest

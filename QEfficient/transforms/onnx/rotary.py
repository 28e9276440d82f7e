"""Recognises rotary position embedding by what a part of the graph computes, not by how it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from QEfficient.transforms.onnx.probe import Part

#: Nodes a rotation may consist of; more is something else.
_MOST_NODES = 40
#: Positions evaluated at a time.
_BLOCK = 1024
#: Largest difference of the rotation from its formula, for inputs of standard deviation 1.
_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Rotation:
    """``x`` [batch, heads, seq, dim] -> rotated, with these factors for positions 0, 1, …

    ``cos`` and ``sin`` are float32 [positions, pairs]; pair i is (i, i + pairs), or (2i, 2i + 1) when interleaved.
    Dimensions beyond the pairs pass unchanged. Formula: https://arxiv.org/abs/2104.09864, equation 34.
    """

    cos: np.ndarray
    sin: np.ndarray
    interleaved: bool

    def same(self, other: Rotation) -> bool:
        return (
            self.interleaved == other.interleaved
            and self.cos.shape == other.cos.shape
            and np.array_equal(self.cos, other.cos)
            and np.array_equal(self.sin, other.sin)
        )

    def apply(self, x: np.ndarray, start: int) -> np.ndarray:
        """float32 [batch, heads, seq, dim] whose first column is at position ``start``."""
        pairs = self.cos.shape[1]
        cos, sin = self.cos[start : start + x.shape[2]], self.sin[start : start + x.shape[2]]
        out = x.copy()
        first, second = _halves(pairs, self.interleaved)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out


def _halves(pairs: int, interleaved: bool) -> tuple[slice, slice]:
    if interleaved:
        return slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    return slice(0, pairs), slice(pairs, 2 * pairs)


def before_rotation(value: ir.Value, positional: set[ir.Value], order: Mapping[ir.Node, int]) -> ir.Value | None:
    """The one value [batch, heads, seq, dim], output of a Transpose, that ``value`` is computed from.

    Besides it only positional values may enter; None when there is no such value close by. ``order`` is the place of
    each node in the graph.
    """
    frontier = {value}
    for _ in range(_MOST_NODES):
        if len(frontier) == 1:
            (only,) = frontier
            node = only.producer()
            if node is not None and node.op_type == "Transpose":
                return only
        producers = {v: v.producer() for v in frontier}
        if any(node not in order for node in producers.values()):
            return None
        # The value made last: nothing else in the frontier is computed from it.
        last = max(frontier, key=lambda v: order[producers[v]])  # type: ignore[index]
        frontier.remove(last)
        producer = producers[last]
        assert producer is not None
        frontier |= {v for v in producer.inputs if v is not None and v not in positional}
    return None


def find_rotation(
    model: ir.Model, before: ir.Value, after: ir.Value, shape: tuple[int, int], positions: int
) -> Rotation | None:
    """The rotation between two values, with factors for ``positions`` positions; None when it is none.

    Args:
        shape: (heads, dim) of both values, which are [batch, heads, seq, dim].
    """
    try:
        part = Part(model, [after], [before])
    except ValueError:
        return None
    if set(part.inputs) - {str(before.name), "position_ids"}:
        return None

    def run(x: np.ndarray, start: int) -> np.ndarray:
        steps = np.arange(start, start + x.shape[2], dtype=np.int64)[None]
        (out,) = part.run({str(before.name): x, "position_ids": steps})
        return out

    heads, dim = shape
    rng = np.random.default_rng(0)
    width = min(positions, 64)
    sample = rng.standard_normal((1, heads, width, dim)).astype(np.float32)
    starts = sorted({0, positions // 2, positions - width})
    turned = [run(sample, min(start, positions - width)) for start in starts]
    changed = np.flatnonzero(np.any([(out != sample).any(axis=(0, 1, 2)) for out in turned], axis=0))
    if not len(changed) or (changed[-1] + 1) % 2:
        return None
    pairs = int(changed[-1] + 1) // 2
    for interleaved in (False, True):
        first, second = _halves(pairs, interleaved)
        ones = np.zeros((1, heads, min(positions, _BLOCK), dim), np.float32)
        ones[..., first] = 1
        tables = [run(ones[:, :, : positions - start], start)[0, 0] for start in range(0, positions, _BLOCK)]
        table = np.concatenate(tables)
        found = Rotation(np.ascontiguousarray(table[:, first]), np.ascontiguousarray(table[:, second]), interleaved)
        expected = [found.apply(sample, min(start, positions - width)) for start in starts]
        if all(
            np.abs(a - b).max() < _TOLERANCE * max(1.0, np.abs(b).max()) for a, b in zip(turned, expected, strict=True)
        ):
            return found
    return None

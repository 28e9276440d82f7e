"""Recognises rotary position embedding by what a part of the graph computes, not by how it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

    def apply(self, x: np.ndarray, positions: int | np.ndarray) -> np.ndarray:
        """float32 [batch, heads, seq, dim] at these positions [seq], or from one on."""
        pairs = self.cos.shape[1]
        steps = np.arange(positions, positions + x.shape[2]) if isinstance(positions, int) else positions
        cos, sin = self.cos[steps], self.sin[steps]
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
    if heads_of(before) not in (None, shape):
        return None
    try:
        part = Part(model, [after], [before])
    except ValueError:
        return None
    if set(part.inputs) - {str(before.name), "position_ids"}:
        return None

    def run(x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        (out,) = part.run({str(before.name): x, "position_ids": np.asarray(steps, np.int64)[None]})
        return out

    heads, dim = shape
    blocks = [np.arange(start, min(start + _BLOCK, positions)) for start in range(0, positions, _BLOCK)]
    sample = np.random.default_rng(0).standard_normal((1, heads, min(positions, _BLOCK), dim)).astype(np.float32)
    turned = [run(sample[:, :, : len(steps)], steps) for steps in blocks]
    changed = np.flatnonzero(np.any([(out != sample[:, :, : out.shape[2]]).any(axis=(0, 1, 2)) for out in turned], 0))
    if not len(changed) or (changed[-1] + 1) % 2:
        return None
    pairs = int(changed[-1] + 1) // 2
    for interleaved in (False, True):
        first, second = _halves(pairs, interleaved)
        ones = np.zeros_like(sample)
        ones[..., first] = 1
        table = np.concatenate([run(ones[:, :, : len(steps)], steps)[0, 0] for steps in blocks])
        found = Rotation(np.ascontiguousarray(table[:, first]), np.ascontiguousarray(table[:, second]), interleaved)
        if all(
            _close(out, found.apply(sample[:, :, : len(steps)], steps))
            for out, steps in zip(turned, blocks, strict=True)
        ):
            return found if _depends_on_own_position(run, found, sample, positions) else None
    return None


def _depends_on_own_position(
    run: Callable[[np.ndarray, np.ndarray], np.ndarray], found: Rotation, sample: np.ndarray, positions: int
) -> bool:
    """Whether a token's factors are the same alone and beside tokens far away (long RoPE's are not)."""
    last = positions - 1
    places = sorted(
        {0, last, *(min(last, max(0, 2**k + d)) for k in range(positions.bit_length()) for d in (-1, 0, 1))}
    )
    for place in places:
        for steps in ([place], [place, last], [place, 0], [0, place, last]):
            x = sample[:, :, : len(steps)]
            if x.shape[2] == len(steps) and not _close(run(x, np.array(steps)), found.apply(x, np.array(steps))):
                return False
    return True


def heads_of(value: ir.Value) -> tuple[int, int] | None:
    """(heads, dim) of a value [batch, heads, seq, dim], where they are known."""
    if value.shape is None or len(value.shape) != 4:
        return None
    heads, dim = value.shape[1], value.shape[3]
    return (heads, dim) if isinstance(heads, int) and isinstance(dim, int) else None


def _close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() < _TOLERANCE * max(1.0, np.abs(expected).max()))

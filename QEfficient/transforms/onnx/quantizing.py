"""The arithmetic of weight quantization: whole rows, or groups of a row, to integers and scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from QEfficient.errors import TransformError
from QEfficient.onnx_io import FileTensor

#: Elements converted at a time by a thread: what the processor's caches hold, and a few copies of it in memory.
_CHUNK = 1 << 20
#: numpy lets go of the interpreter's lock while it computes; more threads than this wait for the memory.
_THREADS = 4

T = TypeVar("T")


def map_rows(work: Callable[[slice], T], rows: int, width: int) -> list[T]:
    """Results of ``work`` for all ``rows`` of a matrix, some whole rows at a time, in order, in several threads."""
    step = max(1, _CHUNK // width)
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, (slice(start, min(start + step, rows)) for start in range(0, rows, step))))


def map_floats(work: Callable[[np.ndarray], T], array: np.ndarray, owner: str, name: str | None) -> list[T]:
    """`map_rows` over a matrix [rows, width], whose rows come as float32.

    Raises:
        TransformError: ``name`` holds infinities or NaN, which ``owner`` cannot quantize.
    """

    def converted(rows: slice) -> T:
        chunk = array[rows].astype(np.float32)
        if not np.isfinite(chunk).all():
            raise TransformError(f"{owner}: {name} holds infinities or NaN and cannot be quantised.")
        return work(chunk)

    return map_rows(converted, *array.shape)


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array, in order; not copied where they lie in order already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def register(graph: ir.Graph, stored: dict[str, FileTensor], names: list[str]) -> list[ir.Value]:
    """Initializers for stored tensors, in the order of ``names``."""
    parts = []
    for name in names:
        tensor = stored[name]
        part = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(part)
        parts.append(part)
    return parts


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [n, k] and float32 scales [n] of float32 [n, k]: symmetric, absolute maximum 127, 0 stays 0."""
    peak = np.abs(x).max(axis=1)
    scale = np.where(peak > 0, peak / 127, 1).astype(np.float32)
    return np.clip(np.rint(x / scale[:, None]), -127, 127).astype(np.int8), scale


def quantize_blocks(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 values 0..15 [n, k], float32 scales and uint8 zero points [n, ceil(k / block)] of float32 [n, k].

    Asymmetric; the range of a block always contains 0, which therefore stays 0 exactly.
    """
    values, scale, zero = quantize_groups(x, 4, block, symmetric=False)
    return values.reshape(x.shape[0], -1)[:, : x.shape[1]], scale, zero


def quantize_groups(x: np.ndarray, bits: int, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned values [n, groups, group], float32 scales and unsigned zero points [n, groups] of float32 [n, k].

    ``x ≈ (value - zero) * scale``. Symmetric: the zero point is half the range and the scale has the sign that makes
    the element of largest magnitude the lowest value, which has no positive counterpart. Otherwise the range of a
    group always contains 0, which stays 0 exactly.
    """
    n, k = x.shape
    count, top, half = math.ceil(k / group), 2**bits - 1, 2 ** (bits - 1)
    padded = np.zeros((n, count * group), np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(n, count, group)
    if symmetric:
        peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
        scale = np.where(peak != 0, peak / -half, 1).astype(np.float32)
        zero = np.full(scale.shape, half, np.float32)
    else:
        low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
        scale = np.where(high > low, (high - low) / top, 1).astype(np.float32)
        zero = np.clip(np.rint(-low / scale), 0, top)
    values = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, top)
    return values.astype(np.uint8), scale, zero.astype(np.uint8)


def quantize_channels(x: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `quantize_groups`, symmetric, with one scale for a whole row, repeated for each of its groups."""
    n, k = x.shape
    count = math.ceil(k / group)
    values, scale, zero = quantize_groups(x, bits, k, symmetric=True)
    padded = np.full((n, count * group), 2 ** (bits - 1), np.uint8)
    padded[:, :k] = values[:, 0]
    return padded.reshape(n, count, group), np.repeat(scale, count, axis=1), np.repeat(zero, count, axis=1)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Bytes along the last axis: with 4 bits two values each, the first in the low half."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], axis=-1)
    packed: np.ndarray = values[..., ::2] | (values[..., 1::2] << 4)
    return packed


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`: along the last axis each byte holds two values with 4 bits, one with 8."""
    if bits == 8:
        return packed
    values = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    values[..., ::2], values[..., 1::2] = packed & 15, packed >> 4
    return values

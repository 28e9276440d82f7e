"""Arrays in, arrays of the same kind out, without importing torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from QEfficient.errors import InputError


def is_torch(value: object) -> bool:
    """Whether a value is a torch tensor; torch is not imported to find out."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def to_numpy(value: Any) -> Any:
    """A torch tensor as numpy; anything else unchanged."""
    return value.detach().to("cpu").numpy() if is_torch(value) else value


def same_kind(example: object) -> Callable[[np.ndarray], Any]:
    """A function that turns numpy into what ``example`` is: torch tensors for torch, numpy otherwise."""
    if is_torch(example):
        torch = sys.modules["torch"]
        return lambda array: torch.from_numpy(np.ascontiguousarray(array))
    return lambda array: array


def integer_matrix(name: str, value: Any) -> np.ndarray:
    """``value`` as int64 [batch, seq].

    Raises:
        InputError: not an array or nested list of integers, not of rank 2, or empty.
    """
    try:
        array = np.asarray(to_numpy(value))
    except ValueError:
        raise InputError(f"{name} has rows of unequal length: pad them and pass attention_mask.") from None
    if array.dtype == np.bool_:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} must hold integers, got {array.dtype}.")
    if array.ndim != 2:
        raise InputError(f"{name} must have rank 2 [batch, seq], got shape {array.shape}.")
    if array.size == 0:
        raise InputError(f"{name} is empty: it has shape {array.shape}.")
    return array.astype(np.int64, copy=False)


def mask_matrix(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """``attention_mask`` as bool of ``shape``; None is all True.

    Raises:
        InputError: another shape, values other than 0 and 1, or a row without a token.
    """
    if value is None:
        return np.ones(shape, dtype=bool)
    mask = integer_matrix("attention_mask", value)
    if mask.shape != shape:
        raise InputError(f"attention_mask has shape {mask.shape}, input_ids {shape}: they must agree.")
    if ((mask != 0) & (mask != 1)).any():
        raise InputError("attention_mask must hold only 0 and 1.")
    empty = np.flatnonzero(mask.sum(axis=1) == 0)
    if empty.size:
        raise InputError(f"row {empty[0]} has no tokens: its attention_mask is all 0.")
    return mask.astype(bool)

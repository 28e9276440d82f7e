"""Rounding to MXINT8, as the card keeps a compressed KV state (contract, part f): 32 numbers share an exponent."""

from __future__ import annotations

import numpy as np

BLOCK = 32


def mxint8(values: np.ndarray) -> np.ndarray:
    """float32 rounded along the last axis; which axis the compiler takes is not public."""
    width = values.shape[-1]
    padded = np.zeros((*values.shape[:-1], -(-width // BLOCK) * BLOCK), np.float64)
    padded[..., :width] = values
    blocks = padded.reshape(*values.shape[:-1], -1, BLOCK)
    peak = np.abs(blocks).max(-1, keepdims=True)
    scale = np.ldexp(1.0, np.frexp(np.where(peak > 0, peak, 1.0))[1] - 1)
    rounded = np.clip(np.rint(64 * blocks / scale), -127, 127) * scale / 64
    # A NaN or an infinity makes its whole block NaN.
    rounded = np.where(np.isfinite(peak), rounded, np.nan)
    return rounded.reshape(padded.shape)[..., :width].astype(np.float32)

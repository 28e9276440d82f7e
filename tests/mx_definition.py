"""Microscaling formats by their definition, in exact fractions and independent of the library."""

from __future__ import annotations

import bisect
import functools
from fractions import Fraction

import numpy as np

#: Table 5 of the specification: exponent bias, mantissa bits, exponent bits, largest exponent, largest number.
SPECIFIED = {"e2m3": (1, 3, 2, 2, Fraction(15, 2)), "e3m2": (3, 2, 3, 4, Fraction(28))}


@functools.cache
def representable(name: str) -> dict[Fraction, int]:
    """Every magnitude of a format and its code, by the definition of a float with that many bits."""
    if name == "int8":
        return {Fraction(code, 64): code for code in range(128)}
    bias, mantissa_bits, exponent_bits, _, largest = SPECIFIED[name]
    found = {}
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = Fraction(mantissa, 2**mantissa_bits)
        if exponent:
            value = Fraction(2) ** (exponent - bias) * (1 + fraction)
        else:
            value = Fraction(2) ** (1 - bias) * fraction
        found[value] = code
    assert max(found) == largest
    return found


def floor_log2(value: Fraction) -> int:
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= value:
        exponent += 1
    while Fraction(2) ** exponent > value:
        exponent -= 1
    return exponent


def reference(block: list[float], name: str) -> list[float]:
    """A block of up to 32 float32 numbers after storing it, by section 6.3 of the specification, in fractions."""
    if not all(np.isfinite(block)):
        return [float("nan")] * len(block)
    exact = [Fraction(value) for value in block]
    peak = max(abs(value) for value in exact)
    if peak == 0:
        return [0.0] * len(block)
    emax = 0 if name == "int8" else SPECIFIED[name][3]
    scale = Fraction(2) ** min(max(floor_log2(peak) - emax, -127), 127)
    grid = representable(name)
    magnitudes = sorted(grid)
    out = []
    for value in exact:
        wanted = abs(value) / scale
        above = bisect.bisect_left(magnitudes, wanted)
        near = magnitudes[max(above - 1, 0) : above + 1]
        distance = min(abs(wanted - g) for g in near)
        nearest = [g for g in near if abs(wanted - g) == distance]
        chosen = nearest[0] if len(nearest) == 1 else next(g for g in nearest if grid[g] % 2 == 0)
        out.append(float(chosen * scale) * (-1 if value < 0 else 1))
    return out


def by_definition(values: np.ndarray, name: str) -> np.ndarray:
    flat = [float(v) for v in values]
    return np.array([v for start in range(0, len(flat), 32) for v in reference(flat[start : start + 32], name)])

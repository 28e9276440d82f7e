"""Microscaling formats (OCP MX 1.0): blocks of 32 numbers in few bits that share a power of two as their scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Elements that share a scale.
BLOCK = 32
#: E8M0, the format of scales: code + _BIAS is the exponent, and one code is NaN.
_BIAS, SCALE_NAN = -127, 255
_LEAST, _MOST = -127, 127


@dataclass(frozen=True)
class ElementFormat:
    """What one element of a block is.

    A float has a sign bit, exponent bits and mantissa bits, and neither infinities nor NaN; its code is those bits. An
    integer (``exponent_bits`` 0) is in two's complement and counts ``2^-mantissa_bits``.

    Attributes:
        least: exponent of the smallest normal number of a float.
        emax: exponent of the largest power of two that is an element.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    least: int
    emax: int

    @property
    def largest_code(self) -> int:
        """Code of the largest magnitude; MXINT8 leaves -128 unused, so that both signs reach equally far."""
        return int(2 ** (self.exponent_bits + self.mantissa_bits + (self.exponent_bits == 0)) - 1)


MXFP6_E2M3 = ElementFormat("e2m3", 2, 3, least=0, emax=2)
MXFP6_E3M2 = ElementFormat("e3m2", 3, 2, least=-2, emax=4)
MXINT8 = ElementFormat("int8", 0, 6, least=0, emax=0)


def encode(values: np.ndarray, kind: ElementFormat, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the elements and of the scales; blocks lie along ``axis``, the last one may be shorter.

    The scale of a block is ``2^(floor(log2(largest magnitude)) - emax)``, within 2^-127 to 2^127. An element is divided
    by it and rounded to the nearest element, ties to even; beyond the largest element it becomes the largest. A block
    of zeros has the scale 2^-127. A NaN or infinity makes its whole block NaN, which the standard leaves open.

    Source: OCP Microscaling Formats (MX) Specification 1.0, section 6.3 and tables 5 and 6.

    Args:
        values: float array; anything wider than float32 is rounded to float32 first.

    Returns:
        uint8 codes (int8 for MXINT8) of the shape of ``values``, and uint8 codes of the scales, of that shape with
        ``ceil(size / 32)`` along ``axis``. The elements of a block of NaN are 0.
    """
    moved = np.moveaxis(np.asarray(values, np.float32), axis, -1)
    width = moved.shape[-1]
    blocks = np.zeros((*moved.shape[:-1], -(-width // BLOCK), BLOCK), np.float32)
    blocks.reshape(*moved.shape[:-1], -1)[..., :width] = moved
    finite = np.isfinite(blocks).all(axis=-1, keepdims=True)
    magnitudes = np.where(finite, np.abs(blocks), np.float32(0))
    peak = magnitudes.max(axis=-1, keepdims=True)
    scale = np.clip(_exponent(peak) - kind.emax, _LEAST, _MOST)
    codes = _element_codes(np.ldexp(magnitudes, -scale), kind)
    negative = np.signbit(blocks) & finite
    if kind.exponent_bits:
        codes = codes | (negative * (kind.largest_code + 1))
    else:
        codes = np.where(negative, -codes, codes)
    codes = codes.astype(np.uint8 if kind.exponent_bits else np.int8)
    scales = np.where(finite, scale - _BIAS, SCALE_NAN).astype(np.uint8)[..., 0]
    codes = codes.reshape(*moved.shape[:-1], -1)[..., :width]
    return np.moveaxis(codes, -1, axis), np.moveaxis(scales, -1, axis)


def decode(codes: np.ndarray, scales: np.ndarray, kind: ElementFormat, axis: int = -1) -> np.ndarray:
    """The float32 values of what `encode` returned: every one of them is a float32 number exactly."""
    moved, exponents = np.moveaxis(codes, axis, -1), np.moveaxis(scales, axis, -1).astype(np.int32)
    exponents = np.repeat(exponents, BLOCK, axis=-1)[..., : moved.shape[-1]]
    values = np.ldexp(_element_values(kind)[moved.astype(np.uint8)], exponents + _BIAS)
    values = np.where(exponents == SCALE_NAN, np.float32(np.nan), values)
    return np.moveaxis(values, -1, axis)


def round_trip(values: np.ndarray, kind: ElementFormat, axis: int = -1) -> np.ndarray:
    """What is left of ``values`` when they were stored in the format: float32 of the same shape."""
    return decode(*encode(values, kind, axis), kind, axis)


def _exponent(values: np.ndarray) -> np.ndarray:
    """floor(log2(values)), from their bits: a float logarithm is off by one next to powers of 2. Of 0 it is _LEAST."""
    return np.where(values > 0, np.frexp(values)[1] - 1, _LEAST)


def _element_codes(magnitudes: np.ndarray, kind: ElementFormat) -> np.ndarray:
    """Codes without sign of magnitudes relative to the scale.

    In units of the last mantissa bit of its own exponent a magnitude is rounded to a whole number. Codes of floats
    count on from one exponent to the next, so one that rounds up to the next power of two needs no special case.
    """
    if kind.exponent_bits:
        exponent = np.maximum(_exponent(magnitudes), kind.least)
    else:
        exponent = np.zeros(magnitudes.shape, np.int32)
    steps = np.rint(np.ldexp(magnitudes, kind.mantissa_bits - exponent)).astype(np.int32)
    return np.minimum(((exponent - kind.least) << kind.mantissa_bits) + steps, kind.largest_code)


def _element_values(kind: ElementFormat) -> np.ndarray:
    """float32 [256]: what each code is worth, as an unsigned byte."""
    codes = np.arange(256)
    if not kind.exponent_bits:
        return np.ldexp(codes.astype(np.int8).astype(np.float32), -kind.mantissa_bits)
    magnitude = codes & kind.largest_code
    field, mantissa = magnitude >> kind.mantissa_bits, magnitude & (2**kind.mantissa_bits - 1)
    whole = mantissa + np.where(field > 0, 2**kind.mantissa_bits, 0)
    values = np.ldexp(whole.astype(np.float32), np.maximum(field - 1, 0) + kind.least - kind.mantissa_bits)
    return np.where(codes > kind.largest_code, -values, values)

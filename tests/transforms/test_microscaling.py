"""Microscaling formats equal an implementation of the OCP definition in exact fractions, element by element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mx_definition import by_definition, representable

from QEfficient.transforms.onnx.microscaling import (
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXINT8,
    SCALE_NAN,
    ElementFormat,
    decode,
    encode,
    round_trip,
)

FORMATS = [MXFP6_E2M3, MXFP6_E3M2, MXINT8]

#: Numbers around every power of two, ties, subnormals, the largest float32, and what is no number.
SPECIAL = [
    0.0, -0.0, 1.0, 1.0625, 1.1875, 1.9375, 1.96875, 1.9999, 7.5, 7.75, 7.96, 28.0, 30.0, -3.3, 100.0, 0.03125,
    2.0**-126, 2.0**-133, 1.5 * 2.0**-130, 2.0**-149, -(2.0**-149), 3.4028234663852886e38, -3.4e38, 65504.0, 1e30,
]  # fmt: skip
numbers = st.one_of(
    st.sampled_from(SPECIAL),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(min_value=-16, max_value=16, width=32),
    # A few significant bits: halves between two elements come up all the time.
    st.builds(lambda m, e: float(np.ldexp(np.float32(m), e)), st.integers(-600, 600), st.integers(-158, 118)),
)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@settings(max_examples=80, deadline=None)
@given(values=arrays(np.float32, st.integers(1, 40), elements=numbers))
def test_equals_the_definition(kind: ElementFormat, values: np.ndarray) -> None:
    found = round_trip(values, kind)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.astype(np.float64), by_definition(values, kind.name))


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_spoils_its_own_block_only(kind: ElementFormat, bad: float) -> None:
    values = np.linspace(-3, 3, 96, dtype=np.float32)
    values[40] = bad
    codes, scales = encode(values, kind)
    assert scales.tolist().count(SCALE_NAN) == 1
    np.testing.assert_array_equal(decode(codes, scales, kind), by_definition(values, kind.name))
    assert np.isnan(decode(codes, scales, kind)).sum() == 32


# Worked by hand from the definition, code by code.
FIRST = [1.0, -3.3, 0.01, 100, 7.9, -0.5, 6.2, 0]
SECOND = [0.125, -0.97, 1.3, -1.99, 0.03, 1.9999, -0.002, 0.5]


@pytest.mark.parametrize(
    ("kind", "block", "exponent", "codes"),
    [
        (MXFP6_E2M3, FIRST, 4, [0, 34, 0, 28, 4, 32, 3, 0]),
        (MXFP6_E3M2, FIRST, 2, [4, 43, 0, 30, 16, 34, 14, 0]),
        (MXINT8, FIRST, 6, [1, -3, 0, 100, 8, 0, 6, 0]),
        (MXFP6_E2M3, SECOND, -2, [4, 56, 26, 63, 1, 31, 32, 16]),
        (MXINT8, SECOND, 0, [8, -62, 83, -127, 2, 127, 0, 32]),
    ],
)
def test_codes(kind: ElementFormat, block: list[float], exponent: int, codes: list[int]) -> None:
    found, scales = encode(np.array(block + [0.0] * 24), kind)
    assert scales.tolist() == [exponent + 127]
    assert found[:8].tolist() == codes
    assert not found[8:].any()


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_every_code_keeps_its_value(kind: ElementFormat) -> None:
    """Decoding all codes and encoding them again gives the codes, and the values are those of the definition."""
    grid = sorted(representable(kind.name))
    magnitudes = np.array([float(g) for g in grid], np.float32)
    # The largest element in each block fixes its scale to 1.
    blocks = np.array([[magnitudes[-1], m, -m, *[0] * 29] for m in magnitudes], np.float32)
    codes, scales = encode(blocks, kind)
    assert (scales == 127).all()
    assert codes[:, 1].tolist() == [representable(kind.name)[g] for g in grid]
    np.testing.assert_array_equal(decode(codes, scales, kind), blocks)


def test_blocks_lie_along_the_axis_asked_for() -> None:
    values = np.random.default_rng(0).standard_normal((3, 40, 5)).astype(np.float32)
    codes, scales = encode(values, MXFP6_E2M3, axis=1)
    assert (codes.shape, scales.shape) == ((3, 40, 5), (3, 2, 5))
    found = round_trip(values, MXFP6_E2M3, axis=1)
    for i in range(3):
        for j in range(5):
            np.testing.assert_array_equal(found[i, :, j], by_definition(values[i, :, j], "e2m3"))


def test_storing_twice_changes_nothing() -> None:
    values = np.random.default_rng(1).standard_normal(3200).astype(np.float32) * 10
    for kind in FORMATS:
        once = round_trip(values, kind)
        np.testing.assert_array_equal(round_trip(once, kind), once)


def test_wider_input_is_float32_first() -> None:
    values = np.array([1.0625 + 2.0**-40, 4.0])  # float32 has the tie itself, which goes to even
    assert round_trip(values, MXFP6_E2M3).tolist() == [1.0, 4.0]

"""Rotary embedding is recognised by what a graph computes: against complex numbers, however it is written; or refused.

Every graph is built here: [batch, seq, heads, dim] is transposed, rotated by ``position_ids``, and returned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from QEfficient.transforms.onnx.probe import positional_values
from QEfficient.transforms.onnx.rotary import Rotation, before_rotation, find_rotation

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
#: 2048 positions times 128 pairs of float32 is the most a part may read from the weights.
LARGE = np.zeros((2048, 129), np.float32)


@dataclass
class Writer:
    """Writes a graph node by node."""

    nodes: list[ir.Node] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)

    def op(self, kind: str, *inputs: Any, **attributes: Any) -> ir.Value:
        """The output of a node; arrays become initializers."""
        node = ir.node(kind, [v if isinstance(v, ir.Value) else self.constant(v) for v in inputs], attributes)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: Any) -> ir.Value:
        tensor = ir.tensor(np.asarray(array), name=f"c{len(self.constants)}")
        self.constants.append(
            ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
        return self.constants[-1]

    def cut(self, x: ir.Value, start: int, end: int, step: int = 1) -> ir.Value:
        """Part of the last axis."""
        return self.op("Slice", x, np.array([start]), np.array([end]), np.array([-1]), np.array([step]))


def like(name: str, shape: list[Any], dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


@dataclass
class Case:
    """What a graph rotates, and how it says so."""

    frequencies: np.ndarray
    heads: int = 2
    #: Dimensions behind the pairs, which pass unchanged.
    rest: int = 0
    interleaved: bool = False
    scaling: float = 1.0
    #: "whole": x * cos + turned(x) * sin, with tables as wide as x; "halves": four products of half the width.
    style: str = "halves"
    #: Whether query, key and value are transposed as one and split then: the first third is rotated.
    together: bool = False

    @property
    def dim(self) -> int:
        return 2 * len(self.frequencies) + self.rest

    def model(self, change: Callable[[Writer, dict[str, ir.Value]], None] = lambda w, parts: None) -> ir.Model:
        """The graph; ``change`` may replace parts by others before they are used.

        Parts: ``positions`` int64 [batch, seq]; ``cos1``, ``sin1`` (of the first half of the result) and ``cos2``,
        ``sin2`` [batch, 1, seq, pairs]; ``first``, ``second`` the halves of the result.
        """
        w = Writer()
        x = like("x", ["batch", "seq", self.heads, self.dim * (3 if self.together else 1)], FLOAT)
        positions = like("position_ids", ["batch", "seq"], INT64)
        parts = {"positions": positions}
        before = w.op("Transpose", x, perm=[0, 2, 1, 3])
        before.shape, before.type = ir.Shape(["batch", self.heads, "seq", x.shape[3]]), ir.TensorType(FLOAT)
        if self.together:
            before = w.cut(before, 0, self.dim)
            before.shape, before.type = ir.Shape(["batch", self.heads, "seq", self.dim]), ir.TensorType(FLOAT)
        parts["before"] = before
        change(w, parts)
        for half in ("1", "2"):
            own = parts.get(f"positions{half}", parts["positions"])
            steps = own if own.dtype == FLOAT else w.op("Cast", own, to=FLOAT.value)
            angles = w.op("Mul", w.op("Unsqueeze", steps, np.array([1, 3])), self.frequencies.astype(np.float32))
            for name, kind in (("cos", "Cos"), ("sin", "Sin")):
                table = w.op(kind, angles)
                parts[name + half] = w.op("Mul", table, np.float32(self.scaling)) if self.scaling != 1 else table
        change(w, parts)
        pairs = len(self.frequencies)
        step = 2 if self.interleaved else 1
        a = w.cut(before, 0, 2 * pairs if self.interleaved else pairs, step)
        b = w.cut(before, 1 if self.interleaved else pairs, 2 * pairs, step)
        if self.style == "whole":
            rotated = w.op(
                "Add",
                w.op("Mul", self._joined(w, a, b), self._joined(w, parts["cos1"], parts["cos2"], wide=False)),
                w.op("Mul", self._joined(w, w.op("Neg", b), a), self._joined(w, parts["sin1"], parts["sin2"], False)),
            )
        else:
            parts["first"] = w.op("Sub", w.op("Mul", a, parts["cos1"]), w.op("Mul", b, parts["sin1"]))
            parts["second"] = w.op("Add", w.op("Mul", b, parts["cos2"]), w.op("Mul", a, parts["sin2"]))
            change(w, parts)
            rotated = self._joined(w, parts["first"], parts["second"])
        if self.rest:
            rotated = w.op("Concat", rotated, w.cut(before, 2 * pairs, self.dim), axis=-1)
        out = w.op("Identity", rotated)
        out.name, out.shape, out.type = "out", before.shape, before.type
        graph = ir.Graph(
            [x, positions, *(v for name, v in parts.items() if name.startswith("input"))], [out], nodes=w.nodes,
            initializers=w.constants, opset_imports={"": 23}, name="rotation",
        )  # fmt: skip
        return ir.Model(graph, ir_version=10)

    def _joined(self, w: Writer, a: ir.Value, b: ir.Value, wide: bool = True) -> ir.Value:
        """Two halves one after the other, or element by element when interleaved."""
        if not self.interleaved:
            return w.op("Concat", a, b, axis=-1)
        both = w.op("Concat", w.op("Unsqueeze", a, np.array([-1])), w.op("Unsqueeze", b, np.array([-1])), axis=-1)
        return w.op("Reshape", both, np.array([0, 0, 0, 2 * len(self.frequencies)]))

    def find(self, model: ir.Model, positions: int) -> Rotation | None:
        before = next(node.outputs[0] for node in model.graph if node.op_type == "Transpose")
        return find_rotation(model, before, model.graph.outputs[0], (self.heads, self.dim), positions)

    def turned(self, x: np.ndarray, start: int) -> np.ndarray:
        """x [batch, heads, seq, dim] from ``start`` on, by complex numbers: z_p e^(i p f) s."""
        pairs = len(self.frequencies)
        halves = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        first, second = halves if self.interleaved else (slice(0, pairs), slice(pairs, 2 * pairs))
        # Angles in float32, as every implementation computes them.
        angles = np.arange(start, start + x.shape[2], dtype=np.float32)[:, None] * self.frequencies.astype(np.float32)
        turns = self.scaling * np.exp(1j * angles.astype(np.float64))
        z = (x[..., first].astype(np.float64) + 1j * x[..., second]) * turns
        out = x.astype(np.float64)
        out[..., first], out[..., second] = z.real, z.imag
        return out


def frequencies(pairs: int, base: float = 100.0) -> np.ndarray:
    return base ** -(np.arange(pairs) / pairs)


# ---------------------------------------------------------------------------------- what is one


@settings(max_examples=60, deadline=None)
@given(
    logs=st.lists(st.floats(-6.0, 0.5), min_size=1, max_size=9), rest=st.integers(0, 5), heads=st.integers(1, 3),
    interleaved=st.booleans(), style=st.sampled_from(["halves", "whole"]), scaling=st.sampled_from([1.0, 0.25, 1.37]),
    positions=st.integers(2, 150), seed=st.integers(0, 2**16), data=st.data(),
)  # fmt: skip
def test_a_rotation_is_found_and_applied(
    logs: list[float], rest: int, heads: int, interleaved: bool, style: str, scaling: float, positions: int,
    seed: int, data: st.DataObject,
) -> None:  # fmt: skip
    case = Case(np.exp(logs), heads, rest, interleaved, scaling, style)
    found = case.find(case.model(), positions)
    assert found is not None
    assert found.cos.shape == found.sin.shape == (positions, len(logs))
    assert found.cos.dtype == found.sin.dtype == np.float32
    if len(logs) > 1:  # one pair is the same either way
        assert found.interleaved == interleaved
    start = data.draw(st.integers(0, positions - 1))
    width = data.draw(st.integers(1, positions - start))
    x = np.random.default_rng(seed).standard_normal((2, heads, width, case.dim)).astype(np.float32)
    before = x.copy()
    np.testing.assert_allclose(found.apply(x, start), case.turned(x, start), rtol=0, atol=2e-5 * max(1, scaling))
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("interleaved", [False, True])
def test_more_positions_than_are_evaluated_at_a_time(interleaved: bool) -> None:
    case = Case(frequencies(4), rest=2, interleaved=interleaved)
    found = case.find(case.model(), 2500)
    assert found is not None
    assert found.cos.shape == (2500, 4)
    x = np.random.default_rng(0).standard_normal((1, 2, 2500, 10)).astype(np.float32)
    np.testing.assert_allclose(found.apply(x, 0), case.turned(x, 0), rtol=0, atol=2e-5)


def backwards(w: Writer, parts: dict[str, ir.Value]) -> None:
    if "cos1" in parts and "first" not in parts:
        parts["sin1"], parts["sin2"] = w.op("Neg", parts["sin1"]), w.op("Neg", parts["sin2"])


def exchanged(w: Writer, parts: dict[str, ir.Value]) -> None:
    if "cos1" in parts and "first" not in parts:
        for half in "12":
            parts[f"cos{half}"], parts[f"sin{half}"] = parts[f"sin{half}"], parts[f"cos{half}"]


def test_a_rotation_backwards_and_one_by_another_angle_are_rotations() -> None:
    """sin of the other sign, and cos and sin exchanged in both halves: the tables hold what the graph computes."""
    case = Case(frequencies(4))
    x = np.random.default_rng(1).standard_normal((1, 2, 20, 8)).astype(np.float32)
    angles = np.arange(20)[:, None] * case.frequencies
    for change, turn in ((backwards, np.exp(-1j * angles)), (exchanged, np.exp(1j * (np.pi / 2 - angles)))):
        found = case.find(case.model(change), 20)
        assert found is not None
        z = (x[..., :4] + 1j * x[..., 4:]) * turn
        np.testing.assert_allclose(found.apply(x, 0), np.concatenate([z.real, z.imag], -1), rtol=0, atol=2e-5)


def test_same_is_equality_of_all_factors() -> None:
    case = Case(frequencies(4))
    one = case.find(case.model(), 30)
    again = Case(frequencies(4), heads=5, style="whole").find(Case(frequencies(4), heads=5, style="whole").model(), 30)
    assert one is not None
    assert again is not None
    assert one.same(again)
    for other in (
        Case(frequencies(4, 101.0)), Case(frequencies(4), scaling=1.0001), Case(frequencies(4), interleaved=True),
        Case(frequencies(5)[:4]), Case(frequencies(3)),
    ):  # fmt: skip
        found = other.find(other.model(), 30)
        assert found is not None
        assert not one.same(found)
        assert not found.same(one)
    turned_back = case.find(case.model(backwards), 30)
    assert turned_back is not None
    np.testing.assert_array_equal(turned_back.cos, one.cos)
    assert not turned_back.same(one)


# ---------------------------------------------------------------------------------- what is none


def at(stage: str) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Changes a graph when the part ``stage`` has just been made."""

    def wrap(function: Callable[[Writer, dict[str, ir.Value]], None]) -> Callable[[Writer, dict[str, ir.Value]], None]:
        later = {"positions": "cos1", "cos1": "first", "first": "-"}[stage]

        @functools.wraps(function)
        def change(w: Writer, parts: dict[str, ir.Value]) -> None:
            if stage in parts and later not in parts:
                function(w, parts)

        return change

    return wrap


@at("first")
def reflection(w: Writer, parts: dict[str, ir.Value]) -> None:
    parts["first"] = w.op("Neg", parts["first"])


@at("cos1")
def sign_of_one_half(w: Writer, parts: dict[str, ir.Value]) -> None:
    parts["sin1"] = w.op("Neg", parts["sin1"])


@at("cos1")
def exchanged_in_one_half(w: Writer, parts: dict[str, ir.Value]) -> None:
    parts["cos2"], parts["sin2"] = parts["sin2"], parts["cos2"]


@at("positions")
def tanh_of_positions_in_one_half(w: Writer, parts: dict[str, ir.Value]) -> None:
    parts["positions2"] = w.op("Tanh", w.op("Cast", parts["positions"], to=FLOAT.value))


@at("positions")
def one_half_a_position_later(w: Writer, parts: dict[str, ir.Value]) -> None:
    parts["positions1"] = w.op("Add", parts["positions"], np.array(1))


@at("first")
def tanh_of_the_result(w: Writer, parts: dict[str, ir.Value]) -> None:
    parts["second"] = w.op("Tanh", parts["second"])


@at("first")
def something_added(w: Writer, parts: dict[str, ir.Value]) -> None:
    parts["first"] = w.op("Add", parts["first"], np.float32(0.001))


@at("first")
def one_half_larger(w: Writer, parts: dict[str, ir.Value]) -> None:
    parts["second"] = w.op("Mul", parts["second"], np.float32(1.001))


@at("cos1")
def angles_of_each_head(w: Writer, parts: dict[str, ir.Value]) -> None:
    for name in ("cos1", "sin1", "cos2", "sin2"):
        factors = np.array([1, -1], np.float32).reshape(1, 2, 1, 1)
        parts[name] = w.op("Mul", parts[name], factors)


@at("cos1")
def another_input_enters(w: Writer, parts: dict[str, ir.Value]) -> None:
    parts["input"] = like("input", ["batch", 1, "seq", 1], FLOAT)
    parts["cos1"] = w.op("Mul", parts["cos1"], parts["input"])


@at("cos1")
def large_weights(w: Writer, parts: dict[str, ir.Value]) -> None:
    zero = w.op("ReduceSum", w.constant(LARGE), keepdims=0)
    parts["cos1"] = w.op("Add", parts["cos1"], zero)


@pytest.mark.parametrize(
    "change",
    [
        reflection, sign_of_one_half, exchanged_in_one_half, tanh_of_positions_in_one_half, one_half_a_position_later,
        tanh_of_the_result, something_added, one_half_larger, angles_of_each_head, another_input_enters, large_weights,
    ],
)  # fmt: skip
@pytest.mark.parametrize("interleaved", [False, True])
def test_near_misses_are_refused(change: Callable[..., None], interleaved: bool) -> None:
    case = Case(frequencies(4), interleaved=interleaved, rest=2)
    assert case.find(case.model(), 48) is not None
    assert case.find(case.model(change), 48) is None


def test_nothing_and_half_a_pair_are_no_rotation() -> None:
    case = Case(frequencies(4))

    @at("first")
    def scaled(w: Writer, parts: dict[str, ir.Value]) -> None:
        """Changes three dimensions of eight."""
        parts["first"] = w.op("Mul", w.cut(parts["before"], 0, 4), np.array([2, 2, 2, 1], np.float32))
        parts["second"] = w.cut(parts["before"], 4, 8)

    assert case.find(case.model(scaled), 30) is None
    assert case.find(case.model(), 1) is None, "position 0 turns nothing"


def test_every_position_counts() -> None:
    """The sign of one half changes between positions 200 and 300 of 1000."""

    @at("cos1")
    def change(w: Writer, parts: dict[str, ir.Value]) -> None:
        steps = w.op("Cast", w.op("Unsqueeze", parts["positions"], np.array([1, 3])), to=FLOAT.value)
        inside = w.op("And", w.op("Greater", steps, np.float32(200)), w.op("Less", steps, np.float32(300)))
        parts["sin1"] = w.op("Mul", parts["sin1"], w.op("Where", inside, np.float32(-1), np.float32(1)))

    case = Case(frequencies(4))
    assert case.find(case.model(change), 1000) is None


@at("cos1")
def another_token_moves_it(w: Writer, parts: dict[str, ir.Value]) -> None:
    """Each token gets the factors of the last one of the call."""
    for name in ("cos1", "sin1", "cos2", "sin2"):
        parts[name] = w.op("Slice", parts[name], np.array([-1]), np.array([1 << 30]), np.array([2]))


@at("positions")
def longrope(w: Writer, parts: dict[str, ir.Value]) -> None:
    """Phi-3 and Phi-4: other frequencies as soon as a call goes beyond the original length, here 16."""
    most = w.op("ReduceMax", parts["positions"], keepdims=0)
    factor = w.op("Where", w.op("Less", most, np.array(16)), np.float32(1), np.float32(0.5))
    for name in ("positions1", "positions2"):
        parts[name] = w.op("Mul", w.op("Cast", parts["positions"], to=FLOAT.value), factor)
        parts[name].type = ir.TensorType(FLOAT)


@pytest.mark.parametrize(("change", "positions"), [(another_token_moves_it, 32), (longrope, 32), (longrope, 100)])
def test_factors_that_depend_on_other_tokens_of_the_call_are_refused(
    change: Callable[..., None], positions: int
) -> None:
    case = Case(frequencies(4))
    assert case.find(case.model(change), positions) is None


def test_a_value_of_another_width_is_refused() -> None:
    """GPT-NeoX transposes query, key and value together and splits them then: what is rotated is a third of it."""
    case = Case(frequencies(4), together=True)
    assert case.find(case.model(), 30) is None


# ---------------------------------------------------------------------------------- where it starts


def started(model: ir.Model) -> ir.Value | None:
    order = {node: place for place, node in enumerate(model.graph)}
    return before_rotation(model.graph.outputs[0], positional_values(model.graph), order)


@pytest.mark.parametrize("style", ["halves", "whole"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_value_before_is_the_transposition(style: str, interleaved: bool) -> None:
    model = Case(frequencies(4), rest=2, interleaved=interleaved, style=style).model()
    before = started(model)
    assert before is not None
    producer = before.producer()
    assert producer is not None
    assert producer.op_type == "Transpose"


def test_another_value_that_enters_hides_it() -> None:
    """A norm's output multiplied with something computed from another input: no rotation of one value."""

    @at("first")
    def change(w: Writer, parts: dict[str, ir.Value]) -> None:
        parts["input"] = like("input", ["batch", 1, "seq", 1], FLOAT)
        parts["first"] = w.op("Mul", parts["first"], w.op("Exp", parts["input"]))

    assert started(Case(frequencies(4)).model(change)) is None


def test_a_long_way_back_is_not_followed() -> None:
    @at("first")
    def change(w: Writer, parts: dict[str, ir.Value]) -> None:
        for _ in range(50):
            parts["first"] = w.op("Identity", parts["first"])

    assert started(Case(frequencies(4)).model(change)) is None

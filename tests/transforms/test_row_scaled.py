"""RowScaledProducts: int8 products with a scale per row of activations, against float products of the stored weights.

What 4 and 8 bits stand for is computed here from the format's definition, value by value.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_rotary import FLOAT, Writer, like

from QEfficient.onnx_io import FileTensor, save_model
from QEfficient.transforms.onnx import quantizing
from QEfficient.transforms.onnx.base import TransformResult
from QEfficient.transforms.onnx.merge_products import MergeProducts
from QEfficient.transforms.onnx.quantize_weights import QuantizeWeights
from QEfficient.transforms.onnx.row_scaled import RowScaledProducts

#: Of the norm of a row: activations and weights rounded to 8 bits.
ERROR = 0.02
CHANNEL = QuantizeWeights(8, "channel")


@dataclass
class Product:
    """x [..., inputs] times one or several weights, quantized and then made int8."""

    directory: Path
    weights: list[np.ndarray]
    quantize: QuantizeWeights = CHANNEL
    #: Rank of x.
    rank: int = 2
    before: dict[str, np.ndarray] = field(init=False)
    result: TransformResult = field(init=False)

    def __post_init__(self) -> None:
        w = Writer()
        axes: list[Any] = [f"axis{n}" for n in range(self.rank - 1)]
        x = like("x", [*axes, self.weights[0].shape[0]], FLOAT)
        outputs = []
        for n, weight in enumerate(self.weights):
            constant = w.constant(weight)
            constant.name = constant.const_value.name = f"w{n}"
            y = w.op("MatMul", x, constant)
            y.name, y.shape, y.type = f"y{n}", ir.Shape([*axes, weight.shape[1]]), ir.TensorType(FLOAT)
            outputs.append(y)
        graph = ir.Graph([x], outputs, nodes=w.nodes, initializers=w.constants, opset_imports={"": 23}, name="product")
        self.model = ir.Model(graph, ir_version=10)
        assert run(self.model, self.quantize, self.directory).facts["weights"] == len(self.weights)
        self.before = parts(self.model)
        self.result = run(self.model, RowScaledProducts(), self.directory)
        self.after = parts(self.model)

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        path = self.directory / "model.onnx"
        save_model(self.model, path)
        return list(ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x}))

    def dequantized(self, n: int = 0) -> np.ndarray:
        """float64 [inputs, outputs]: what the stored blocks mean."""
        data, scale, zeros = (self.before.get(f"w{n}.{kind}") for kind in ("quantized", "scale", "zero_point"))
        assert data is not None
        assert scale is not None
        bits = self.quantize.bits
        values = unpacked(data, bits).astype(np.float64)
        zero = 2.0 ** (bits - 1) if zeros is None else unpacked(zeros, bits)[:, : scale.shape[1], None]
        inputs = self.weights[n].shape[0]
        return ((values - zero) * scale[..., None].astype(np.float64)).reshape(len(data), -1)[:, :inputs].T

    def assert_close(self, x: np.ndarray) -> None:
        """Each row by itself: a small one beside a large one is no worse for it.

        An error is measured by the size that a row of products has on average, ||x|| ||W|| / sqrt(inputs), and not by
        the one it happens to have: terms that cancel leave their rounding errors behind.
        """
        found = self(x)
        assert len(found) == len(self.weights)
        for n, y in enumerate(found):
            weights = self.dequantized(n)
            expected = x.astype(np.float64) @ weights
            assert y.shape == expected.shape
            assert np.isfinite(y).all()
            errors = np.linalg.norm(y - expected, axis=-1)
            sizes = np.linalg.norm(x.astype(np.float64), axis=-1) * np.linalg.norm(weights) / len(weights) ** 0.5
            assert (errors <= ERROR * sizes).all(), (errors / np.maximum(sizes, 1e-300)).max()


def run(model: ir.Model, transform: Any, directory: Path) -> TransformResult:
    """Applies a transform; what it wrote is moved to where the model will be saved."""
    workspace = directory / transform.name
    workspace.mkdir()
    result = transform.apply(model, workspace)
    for path in workspace.iterdir():
        path.rename(directory / path.name)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, FileTensor) and value.const_value.file.parent == workspace:
            value.const_value.file = directory / value.const_value.file.name
    workspace.rmdir()
    return result


def parts(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: np.array(v.const_value.numpy()) for name, v in model.graph.initializers.items()}


def unpacked(x: np.ndarray, bits: int) -> np.ndarray:
    """Two 4-bit values in a byte, the low one first."""
    return x if bits == 8 else np.stack([x & 15, x >> 4], axis=-1).reshape(*x.shape[:-1], -1)


def weight(inputs: int, outputs: int, seed: int = 0) -> np.ndarray:
    """Columns of very different size."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((inputs, outputs)) * np.exp(rng.uniform(-3, 3, outputs))).astype(np.float32)


def activations(rows: int, inputs: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, inputs)).astype(np.float32)


# ---------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize(("inputs", "outputs"), [(128, 64), (96, 48), (200, 33), (130, 600)])
def test_integers_with_a_scale_per_channel_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int
) -> None:
    """Whatever whole blocks of 128 filled up, and over more channels than are converted at a time."""
    monkeypatch.setattr(quantizing, "_CHUNK", 20_000)
    case = Product(tmp_path, [weight(inputs, outputs)])
    assert case.result.facts == {"products": 1}
    assert case.result.modified
    stored, scale = case.after["w0.int8"], case.after["w0.int8_scale"]
    assert stored.dtype == np.int8
    assert stored.shape == (inputs, outputs)
    old = case.before["w0.quantized"].reshape(outputs, -1)[:, :inputs]
    np.testing.assert_array_equal(stored.astype(np.int16), old.T.astype(np.int16) - 128)
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, case.before["w0.scale"][:, 0])
    # Every channel reaches an end of the range: none was rounded twice.
    assert (np.abs(stored.astype(np.int16)).max(axis=0) >= 127).all()
    np.testing.assert_array_equal(stored * scale, case.dequantized().astype(np.float32))
    assert not {"w0.quantized", "w0.scale"} & case.after.keys()


@pytest.mark.parametrize(
    "quantize",
    [
        QuantizeWeights(4, 16), QuantizeWeights(4, 32, symmetric=False), QuantizeWeights(4, 128),
        QuantizeWeights(8, 32), QuantizeWeights(8, 64, symmetric=False),
    ],
    ids=lambda q: f"{q.bits}-{q.group_size}-{q.symmetric}",
)  # fmt: skip
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 64), (100, 48), (160, 520)])
def test_blocks_are_rounded_once_more_by_half_a_step(
    tmp_path: Path, quantize: QuantizeWeights, inputs: int, outputs: int
) -> None:
    case = Product(tmp_path, [weight(inputs, outputs)], quantize)
    stored, scale = case.after["w0.int8"].astype(np.float64), case.after["w0.int8_scale"].astype(np.float64)
    wanted = case.dequantized()
    assert (np.abs(stored * scale - wanted) <= 0.5 * np.abs(scale) * (1 + 1e-5)).all()
    # The step is as fine as 8 bits allow: the largest of each channel is at an end of the range.
    np.testing.assert_allclose(np.abs(scale) * 127, np.abs(wanted).max(axis=0), rtol=1e-5)
    case.assert_close(activations(5, inputs))


def test_a_channel_of_zeros(tmp_path: Path) -> None:
    for number, quantize in enumerate((CHANNEL, QuantizeWeights(4, 32), QuantizeWeights(4, 32, symmetric=False))):
        (place := tmp_path / str(number)).mkdir()
        w = weight(128, 64)
        w[:, 7] = 0
        case = Product(place, [w], quantize)
        assert not case.after["w0.int8"][:, 7].any()
        x = activations(3, 128)
        (y,) = case(x)
        assert (y[:, 7] == 0).all()
        case.assert_close(x)


# ---------------------------------------------------------------------------------- what is computed


FORMATS = [CHANNEL, QuantizeWeights(4, 32), QuantizeWeights(4, 16, symmetric=False), QuantizeWeights(8, 32)]


@pytest.mark.parametrize("quantize", FORMATS, ids=lambda q: f"{q.bits}-{q.group_size}-{q.symmetric}")
def test_rows_of_any_size_beside_each_other(tmp_path: Path, quantize: QuantizeWeights) -> None:
    """A million times larger, a thousandth, only negative, one element, nothing at all."""
    case = Product(tmp_path, [weight(128, 64)], quantize)
    x = activations(9, 128)
    x *= np.array([1, 1e6, 1e-6, 1e3, 1e-3, 1, 1, 1e20, 1e-20], np.float32)[:, None]
    x[5] = -np.abs(x[5])
    x[6] = 0
    x[6, 17] = 3.0
    case.assert_close(x)
    # In any order, and each alone.
    case.assert_close(x[::-1].copy())
    for row in x:
        case.assert_close(row[None])


@pytest.mark.parametrize("quantize", FORMATS[:2], ids=lambda q: f"{q.bits}-{q.group_size}")
def test_a_row_of_zeros_gives_zeros(tmp_path: Path, quantize: QuantizeWeights) -> None:
    case = Product(tmp_path, [weight(128, 64)], quantize)
    x = activations(4, 128)
    x[2] = 0
    (y,) = case(x)
    assert np.isfinite(y).all()
    assert (y[2] == 0).all()
    assert np.abs(y[[0, 1, 3]]).max() > 0.1
    case.assert_close(x)
    for rows in (1, 3):
        (y,) = case(np.zeros((rows, 128), np.float32))
        assert (y == 0).all()


def test_rows_do_not_see_each_other(tmp_path: Path) -> None:
    """A row's result is that of the row alone, whatever is beside it: its rounding may differ, by a step at most."""
    case = Product(tmp_path, [weight(128, 64)])
    x = activations(1, 128)
    (alone,) = case(x)
    for other in (1e6, 1e-6, -1.0, 0.0):
        (y,) = case(np.concatenate([np.full((3, 128), other, np.float32), x]))
        assert np.linalg.norm(y[3] - alone[0]) <= ERROR * np.linalg.norm(alone)


@settings(max_examples=25, deadline=None)
@example(
    rows=2, inputs=69, outputs=88, seed=5885, quantize=QuantizeWeights(8, 32), exponents=[0] * 6, zero=None, rank=2
)
@given(
    rows=st.integers(1, 6), inputs=st.integers(64, 150), outputs=st.integers(64, 90), seed=st.integers(0, 2**16),
    quantize=st.sampled_from(FORMATS), exponents=st.lists(st.integers(-8, 8), min_size=6, max_size=6),
    zero=st.none() | st.integers(0, 5), rank=st.sampled_from([2, 3]),
)  # fmt: skip
def test_products_of_any_shape(
    rows: int, inputs: int, outputs: int, seed: int, quantize: QuantizeWeights, exponents: list[int],
    zero: int | None, rank: int,
) -> None:  # fmt: skip
    x = activations(rows, inputs, seed) * 10.0 ** np.array(exponents[:rows])[:, None].astype(np.float32)
    if zero is not None and zero < rows:
        x[zero] = 0
    with tempfile.TemporaryDirectory() as directory:
        case = Product(Path(directory), [weight(inputs, outputs, seed)], quantize, rank)
        assert case.result.facts == {"products": 1}
        case.assert_close(x.astype(np.float32) if rank == 2 else x.astype(np.float32)[None])


# ---------------------------------------------------------------------------------- the graph


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_products_of_one_input_scale_it_once(tmp_path: Path) -> None:
    case = Product(tmp_path, [weight(128, n, n) for n in (64, 96, 128)], rank=3)
    assert case.result.facts == {"products": 3}
    assert kinds(case.model).count("MatMulIntegerToFloat") == 3
    assert kinds(case.model).count("Div") == kinds(case.model).count("QuantizeLinear") == 1
    assert "MatMulNBits" not in kinds(case.model)
    assert [str(value.name) for value in case.model.graph.outputs] == ["y0", "y1", "y2"]
    x = np.stack([activations(5, 128, n) * 10.0**n for n in range(4)]).astype(np.float32)
    case.assert_close(x)


def test_results_of_an_activation_use_their_whole_range(tmp_path: Path) -> None:
    """All above 0: a range of -1 to 1 would leave half of the 8 bits unused, and the error would be twice as large."""
    w = Writer()
    x = like("x", ["rows", 256], FLOAT)
    constant = w.constant(weight(256, 64))
    constant.name = constant.const_value.name = "w0"
    y = w.op("MatMul", w.op("Relu", x), constant)
    graph = ir.Graph([x], [y], nodes=w.nodes, initializers=w.constants, opset_imports={"": 23}, name="product")
    model = ir.Model(graph, ir_version=10)
    run(model, CHANNEL, tmp_path)
    stored = parts(model)
    run(model, RowScaledProducts(), tmp_path)
    assert "DynamicQuantizeMatMul" in kinds(model)
    save_model(model, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    rows = np.abs(activations(64, 256)) * np.exp(np.arange(64)[:, None] / 8).astype(np.float32)
    (found,) = session.run(None, {"x": rows})
    whole = (stored["w0.quantized"].reshape(64, -1).astype(np.float64) - 128) * stored["w0.scale"][:, :1]
    # A value is off by up to half a step of 1/255 of its row's largest, evenly: 1/sqrt(12) of a step on average.
    peak = rows.max(axis=1, keepdims=True)
    expected = peak / 255 / np.sqrt(12) * np.linalg.norm(whole, axis=1)
    error = np.sqrt(np.mean(((found - rows @ whole.T) / expected) ** 2))
    assert 0.8 < error < 1.2, "one of 1/127 would be twice as much"


def test_what_cannot_is_left(tmp_path: Path) -> None:
    """A joined product with a bias of its own, and weights that were never quantized."""
    w = Writer()
    x = like("x", ["rows", 128], FLOAT)
    floats = [w.constant(weight(128, size, size)) for size in (64, 96, 8)]
    for n, value in enumerate(floats):
        value.name = value.const_value.name = f"w{n}"
    products = [w.op("MatMul", x, value) for value in floats]
    biased = [w.op("Add", value, activations(1, size)[0]) for value, size in zip(products, (64, 96), strict=False)]
    outputs = [w.op("Tanh", value) for value in (*biased, products[2])]
    graph = ir.Graph([x], outputs, nodes=w.nodes, initializers=w.constants, opset_imports={"": 23}, name="product")
    model = ir.Model(graph, ir_version=10)
    run(model, CHANNEL, tmp_path)
    run(model, MergeProducts(), tmp_path)
    assert kinds(model).count("MatMulNBits") == 1
    result = run(model, RowScaledProducts(), tmp_path)
    assert not result.modified
    assert result.facts == {"products": 0}
    assert sorted(kind for kind in kinds(model) if "MatMul" in kind) == ["MatMul", "MatMulNBits"]

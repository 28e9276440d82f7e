"""MergeProducts: the same numbers from fewer products; what is stored are the parts, one after the other.

Weights are quantized by QuantizeWeights, which has tests of its own; the graph before the merge is the reference, and
numpy with the stored integers, unpacked here from the format's definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from test_rotary import FLOAT, Writer, like

from QEfficient.onnx_io import FileTensor, save_model
from QEfficient.transforms.onnx.base import TransformResult
from QEfficient.transforms.onnx.merge_products import MergeProducts
from QEfficient.transforms.onnx.quantize_weights import QuantizeWeights

INPUTS = 96
#: Outputs of query, key and value: all large enough to be quantized.
SIZES = (128, 64, 48)
RNG = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture(autouse=True)
def numbers() -> None:
    """The same for a test whatever ran before it."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


@dataclass
class Products:
    """x [rows, INPUTS] times weights ``w0``, ``w1``, … as a graph, quantized, then merged."""

    directory: Path
    sizes: tuple[int, ...] = SIZES
    #: Per product: a constant, and what reads the product and it.
    biases: tuple[str, ...] = ("none", "none", "none")
    quantize: QuantizeWeights = field(default_factory=lambda: QuantizeWeights(4, 32, accuracy_level=1))
    #: Adds to the graph: (writer, x, products) -> outputs.
    more: Callable[[Writer, ir.Value, list[ir.Value]], list[ir.Value]] = lambda w, x, products: products
    #: Whether x and the products are [1, rows, …].
    batch: bool = False
    #: Whether products may be outputs of the graph themselves; otherwise something reads them.
    bare: bool = False

    def __post_init__(self) -> None:
        self.floats: dict[str, np.ndarray] = {}
        w = Writer()
        lead: list[Any] = [1] if self.batch else []
        x = like("x", [*lead, "rows", INPUTS], FLOAT)
        products = []
        for n, (size, bias) in enumerate(zip(self.sizes, self.biases, strict=True)):
            weight = w.constant(draw(INPUTS, size) / INPUTS**0.5)
            weight.name = weight.const_value.name = f"w{n}"
            product = w.op("MatMul", x, weight)
            if bias != "none":
                product = self._with_bias(w, product, bias, size, n)
            product.shape, product.type = ir.Shape([*lead, "rows", size]), ir.TensorType(FLOAT)
            products.append(product)
        outputs = self.more(w, x, products)
        if not self.bare:
            outputs = [w.op("Identity", value) for value in outputs]
        for n, value in enumerate(outputs):
            value.name = f"y{n}"
            value.type = value.type or ir.TensorType(FLOAT)
        graph = ir.Graph([x], outputs, nodes=w.nodes, initializers=w.constants, opset_imports={"": 23}, name="products")
        self.model = ir.Model(graph, ir_version=10)
        self._run(self.quantize)
        self.before = self.parts()
        self.reference = self.session("before")

    @staticmethod
    def _with_bias(w: Writer, product: ir.Value, kind: str, size: int, n: int) -> ir.Value:
        bias = draw(size)
        if kind in ("half", "bfloat"):
            constant = w.constant(bias.astype(np.float16 if kind == "half" else ml_dtypes.bfloat16))
            bias_value = w.op("Cast", constant, to=FLOAT.value)
        else:
            constant = bias_value = w.constant(bias)
        constant.name = constant.const_value.name = f"b{n}"
        return w.op("Add", bias_value, product) if kind == "first" else w.op("Add", product, bias_value)

    def _run(self, transform: Any) -> TransformResult:
        workspace = self.directory / transform.name
        workspace.mkdir()
        result = transform.apply(self.model, workspace)
        # Where ONNX Runtime looks for what the model names: beside it.
        for path in workspace.iterdir():
            path.rename(self.directory / path.name)
        for value in self.model.graph.initializers.values():
            if isinstance(value.const_value, FileTensor) and value.const_value.file.parent == workspace:
                value.const_value.file = self.directory / value.const_value.file.name
        workspace.rmdir()
        return result

    def merge(self) -> TransformResult:
        return self._run(MergeProducts())

    def nodes(self, kind: str = "MatMulNBits") -> list[ir.Node]:
        return [node for node in self.model.graph if node.op_type == kind]

    def parts(self) -> dict[str, np.ndarray]:
        """Every initializer's values."""
        return {name: np.array(v.const_value.numpy()) for name, v in self.model.graph.initializers.items()}

    def session(self, name: str) -> ort.InferenceSession:
        path = self.directory / f"{name}.onnx"
        save_model(self.model, path)
        return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def assert_same(self) -> list[np.ndarray]:
        """Outputs before and after, for one row and for several; returns the latter."""
        merged = self.session("after")
        for rows in (1, 7):
            given = {"x": draw(1, rows, INPUTS) if self.batch else draw(rows, INPUTS)}
            before, after = self.reference.run(None, given), merged.run(None, given)
            assert len(before) == len(after)
            for a, b in zip(before, after, strict=True):
                assert np.abs(a).max() > 0.1
                np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * max(1, np.abs(a).max()))
            if rows == 7:
                self.given = given["x"]
        return after


FORMATS = [
    QuantizeWeights(4, 32, accuracy_level=1), QuantizeWeights(4, 32, symmetric=False), QuantizeWeights(4, 64),
    QuantizeWeights(8, 16), QuantizeWeights(8, 32, symmetric=False, accuracy_level=0), QuantizeWeights(8, "channel"),
]  # fmt: skip
BIASES = [("none",) * 3, ("plain",) * 3, ("first", "half", "bfloat"), ("plain", "none", "plain")]


def label(value: Any) -> str | None:
    if isinstance(value, QuantizeWeights):
        return f"{value.bits} bits, {value.group_size}, {'symmetric' if value.symmetric else 'zero points'}"
    return None


@pytest.mark.parametrize("biases", BIASES, ids="-".join)
@pytest.mark.parametrize("quantize", FORMATS, ids=label)
def test_one_product_gives_what_three_gave(
    tmp_path: Path, quantize: QuantizeWeights, biases: tuple[str, str, str]
) -> None:
    case = Products(tmp_path, biases=biases, quantize=quantize)
    result = case.merge()
    assert result.modified
    assert result.facts == {"products": 3, "merged": 1, "packed_attention": 0}
    (node,) = case.nodes()
    assert node.attributes["N"].as_int() == sum(SIZES)
    joined = all(bias != "none" for bias in biases)
    assert len(node.inputs) == (6 if joined else 3 + (not quantize.symmetric))
    assert len(case.nodes("Add")) == (0 if joined else sum(bias != "none" for bias in biases))

    found = case.assert_same()
    # The stored parts follow each other, and nothing of what they were is read any more.
    after = {str(v.name).rpartition(".")[2]: v.const_value.numpy() for v in node.inputs[1:] if v is not None}
    kinds = {"quantized", "scale"} | ({"zero_point"} if not quantize.symmetric else set())
    assert after.keys() == kinds | ({"bias"} if joined else set())
    for kind in kinds:
        assert after[kind].dtype == case.before[f"w0.{kind}"].dtype
        np.testing.assert_array_equal(after[kind], np.concatenate([case.before[f"w{n}.{kind}"] for n in range(3)]))
    if joined:
        expected = np.concatenate([case.before[f"b{n}"].astype(np.float32) for n in range(3)])
        assert after["bias"].dtype == np.float32
        np.testing.assert_array_equal(after["bias"], expected)
    # What is left of before: biases that did not join.
    assert {name for name in case.parts() if name in case.before and name[0] in "wb"} == {
        f"b{n}" for n in range(3) if biases[n] != "none" and not joined
    }

    # The numbers themselves, from the integers.
    tolerance = 0.03 if quantize.accuracy_level == 4 else 1e-5
    for n in range(3):
        wanted = case.given @ dequantized(case.before, n, quantize).T
        if biases[n] != "none":
            wanted = wanted + case.before[f"b{n}"].astype(np.float32)
        assert np.linalg.norm(found[n] - wanted) <= tolerance * np.linalg.norm(wanted)


def dequantized(parts: dict[str, np.ndarray], n: int, quantize: QuantizeWeights) -> np.ndarray:
    """float32 [outputs, inputs]: blocks of a row follow each other; two 4-bit values in a byte, the low one first."""
    data, scale, zeros = (parts.get(f"w{n}.{kind}") for kind in ("quantized", "scale", "zero_point"))
    assert data is not None
    assert scale is not None

    def unpacked(x: np.ndarray) -> np.ndarray:
        return x if quantize.bits == 8 else np.stack([x & 15, x >> 4], axis=-1).reshape(*x.shape[:-1], -1)

    values = unpacked(data).astype(np.float32)
    zero = (
        2.0 ** (quantize.bits - 1) if zeros is None else unpacked(zeros)[:, : scale.shape[1], None].astype(np.float32)
    )
    return ((values - zero) * scale[..., None]).reshape(len(data), -1)[:, :INPUTS]


# ---------------------------------------------------------------------------------- what stays apart


def test_a_weight_that_something_else_reads_is_left(tmp_path: Path) -> None:
    """A table read by a Gather and a product (tied weights), and a weight of two products."""

    def more(w: Writer, x: ir.Value, products: list[ir.Value]) -> list[ir.Value]:
        weight = next(value for value in w.constants if value.name == "w1")
        return [*products, w.op("MatMul", w.op("Tanh", x), weight)]

    case = Products(tmp_path, more=more)
    result = case.merge()
    assert result.facts == {"products": 2, "merged": 1, "packed_attention": 0}
    assert sorted(node.attributes["N"].as_int() for node in case.nodes()) == [64, 64, 128 + 48]
    for kind in ("quantized", "scale"):
        np.testing.assert_array_equal(case.parts()[f"w1.{kind}"], case.before[f"w1.{kind}"])
    case.assert_same()


def test_products_of_one_weight_are_left(tmp_path: Path) -> None:
    def more(w: Writer, x: ir.Value, products: list[ir.Value]) -> list[ir.Value]:
        return [w.op("MatMul", x, next(value for value in w.constants if value.name == "w0")), *products]

    case = Products(tmp_path, sizes=(64,), biases=("none",), more=more)
    result = case.merge()
    assert not result.modified
    assert result.facts == {"products": 0, "merged": 0, "packed_attention": 0}
    assert len(case.nodes()) == 2
    case.assert_same()


def test_products_of_other_inputs_and_other_formats_are_left(tmp_path: Path) -> None:
    """Two inputs make two groups; a single product is none."""

    def more(w: Writer, x: ir.Value, products: list[ir.Value]) -> list[ir.Value]:
        made = [w.constant(draw(INPUTS, 64)) for _ in range(3)]
        for n, value in enumerate(made):
            value.name = value.const_value.name = f"w{n + 3}"
        squashed, grown = w.op("Tanh", x), w.op("Mul", x, np.float32(2))
        return [*products, *(w.op("MatMul", squashed, value) for value in made[:2]), w.op("MatMul", grown, made[2])]

    case = Products(tmp_path, more=more)
    node = next(node for node in case.nodes() if str(node.inputs[1].name) == "w2.quantized")
    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 4)
    case.reference = case.session("before")
    result = case.merge()
    assert result.facts == {"products": 4, "merged": 2, "packed_attention": 0}
    assert sorted(node.attributes["N"].as_int() for node in case.nodes()) == [48, 64, 128, 192]
    case.assert_same()


def test_a_product_that_is_an_output_is_left(tmp_path: Path) -> None:
    """Its name is the graph's."""

    def more(w: Writer, x: ir.Value, products: list[ir.Value]) -> list[ir.Value]:
        return [products[0], w.op("Tanh", products[1]), w.op("Tanh", products[2])]

    case = Products(tmp_path, more=more, bare=True)
    result = case.merge()
    assert result.facts == {"products": 2, "merged": 1, "packed_attention": 0}
    assert [str(value.name) for value in case.model.graph.outputs] == ["y0", "y1", "y2"]
    case.assert_same()


def test_weights_that_are_not_quantized_are_left(tmp_path: Path) -> None:
    case = Products(tmp_path, sizes=(32, 32, 16))  # fewer than 4096 elements each
    result = case.merge()
    assert not result.modified
    assert len(case.nodes("MatMul")) == 3
    case.assert_same()


@pytest.mark.parametrize("how", ["a second reader", "a matrix", "one number", "another product", "a product"])
def test_what_is_no_bias_does_not_join(tmp_path: Path, how: str) -> None:
    """Beside two biases, something that is added to the product between them in another way."""

    def more(w: Writer, x: ir.Value, products: list[ir.Value]) -> list[ir.Value]:
        first, middle, last = products
        also = []
        if how == "a second reader":
            middle = w.op("Add", middle, draw(64))
            also = [w.op("Tanh", products[1])]
        elif how == "a matrix":
            middle = w.op("Add", middle, draw(1, 64))
        elif how == "one number":
            middle = w.op("Add", middle, draw(1))
        elif how == "another product":
            middle = w.op("Add", middle, w.op("Mul", middle, draw(64)))
        else:
            middle = w.op("Mul", middle, draw(64))
        return [w.op("Add", first, draw(128)), middle, w.op("Add", last, draw(48)), *also]

    case = Products(tmp_path, more=more)
    result = case.merge()
    assert result.facts == {"products": 3, "merged": 1, "packed_attention": 0}
    (node,) = case.nodes()
    assert len(node.inputs) == 3
    assert len(case.nodes("Add")) == (2 if how == "a product" else 3)
    case.assert_same()


# ---------------------------------------------------------------------------------- straight into attention

HEADS, KV_HEADS, DIM, CTX = 4, 2, 32, 8
SIZE = {"q": HEADS * DIM, "k": KV_HEADS * DIM, "v": KV_HEADS * DIM}


def in_attention(directory: Path, order: str = "qkv", also: str = "", turned: str = "", **options: Any) -> Products:
    """Products into a GroupQueryAttention over empty state.

    ``order`` is theirs in the graph; ``also`` is read by something else as well; ``turned`` goes through another node.
    """

    def more(w: Writer, x: ir.Value, products: list[ir.Value]) -> list[ir.Value]:
        named = dict(zip(order, products, strict=True))
        inputs = {name: w.op("Neg", value) if name == turned else value for name, value in named.items()}
        state = [w.constant(np.zeros((1, KV_HEADS, CTX, DIM), np.float32)) for _ in range(2)]
        count = w.op("Cast", w.op("Shape", x, start=1, end=2), to=ir.DataType.INT32.value)
        lengths = [w.op("Sub", count, np.array([1], np.int32)), w.op("Squeeze", count)]
        node = ir.node(
            "GroupQueryAttention", [*(inputs[name] for name in "qkv"), *state, *lengths],
            {"num_heads": HEADS, "kv_num_heads": KV_HEADS}, domain="com.microsoft", num_outputs=3,
        )  # fmt: skip
        for n, value in enumerate(node.outputs):
            value.name = f"a{n}"
        w.nodes.append(node)
        return [*node.outputs, *([w.op("Tanh", named[also])] if also else [])]

    return Products(directory, sizes=tuple(SIZE[name] for name in order), batch=True, more=more, **options)


@pytest.mark.parametrize("biases", [("none",) * 3, ("plain", "half", "first")], ids="-".join)
@pytest.mark.parametrize("quantize", FORMATS[:2], ids=label)
def test_query_key_and_value_go_to_attention_as_one(
    tmp_path: Path, quantize: QuantizeWeights, biases: tuple[str, str, str]
) -> None:
    case = in_attention(tmp_path, biases=biases, quantize=quantize)
    result = case.merge()
    assert result.facts == {"products": 3, "merged": 1, "packed_attention": 1}
    (node,), (product,) = case.nodes("GroupQueryAttention"), case.nodes()
    assert list(node.inputs[:3]) == [product.outputs[0], None, None]
    assert not case.nodes("Split")
    names = [f"w{n}.scale" for n in range(3)]
    np.testing.assert_array_equal(
        product.inputs[2].const_value.numpy(), np.concatenate([case.before[name] for name in names])
    )
    case.assert_same()


@pytest.mark.parametrize(
    "how",
    [{"order": "kqv"}, {"order": "qvk"}, {"order": "vkq"}, {"also": "v"}, {"also": "q"}, {"turned": "k"}],
    ids=str,
)
def test_what_attention_does_not_read_as_one_is_split(tmp_path: Path, how: dict[str, str]) -> None:
    """Products in another order, one that something else reads too, one that is changed on its way."""
    case = in_attention(tmp_path, biases=("plain",) * 3, **how)
    result = case.merge()
    assert result.facts == {"products": 3, "merged": 1, "packed_attention": 0}
    (node,) = case.nodes("GroupQueryAttention")
    assert all(value is not None for value in node.inputs[:3])
    assert len(case.nodes("Split")) == 1
    case.assert_same()

"""QuantizeBase: gradients are those of the dequantised model, weights shrink, ONNX Runtime keeps them small."""

import math

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from training_steps import feeds, memory, mlp_step, run, worst

from QEfficient.errors import OptionError, TransformError
from QEfficient.onnx_io import FileTensor, load_model, save_model, weight_files
from QEfficient.transforms.onnx.quantize_base import QuantizeBase, quantize_blocks, quantize_rows
from QEfficient.transforms.onnx.queue import resolve
from QEfficient.transforms.onnx.recompute import Recompute
from QEfficient.transforms.onnx.split_weights import SplitWeights


def frozen_step(layers: int, width: int) -> ir.Model:
    """The hand-written step as if its gradients were those of other tensors."""
    model = mlp_step(layers, width)
    for number, value in enumerate(list(model.graph.outputs)[1:]):
        value.name = f"grad/adapter.{number}"
    return model


def arrays(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def dequantized(stored: dict[str, np.ndarray], name: str, shape: tuple[int, ...], block: int, channel_axis: int):
    """What the stored parts stand for, by the definition of DequantizeLinear."""
    values, scale = stored[f"{name}.quantized"].astype(np.float32), stored[f"{name}.scale"]
    if scale.ndim == 1:
        return values * (scale[:, None] if channel_axis == 0 else scale[None, :])
    zero = stored[f"{name}.zero_point"].astype(np.float32)
    result = np.empty(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            place = (i, j // block) if channel_axis == 0 else (i // block, j)
            result[i, j] = (values[i, j] - zero[place]) * scale[place]
    return result


def reference(plain: ir.Model, model: ir.Model, block: int, channel_axis: int) -> int:
    """Puts the dequantised weights into ``plain``; returns how many."""
    stored, count = arrays(model), 0
    for name, value in plain.graph.initializers.items():
        old = value.const_value.numpy()
        if f"{name}.quantized" in stored:
            # Tables and the head have a scale per row whatever the layout of the layers.
            axis = channel_axis if ".layers." in name or ".layer." in name or ".h." in name else 0
            new = dequantized(stored, name, old.shape, block, axis)
        elif f"{name}.0.quantized" in stored:
            parts = [dequantized(stored, f"{name}.{e}", old.shape[1:], block, 0) for e in range(old.shape[0])]
            new = np.stack(parts)
        else:
            continue
        assert np.abs(new - old).max() < 0.1 * np.abs(old).max()
        value.const_value = ir.tensor(new, name=name)
        count += 1
    return count


@pytest.mark.parametrize(("bits", "block"), [(8, 32), (4, 32), (4, 20), (4, 500)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "bert"])
def test_gradients_are_those_of_the_dequantised_model(captured, family, bits, block, tmp_path):
    plain, model = captured(family), captured(family)
    facts = QuantizeBase(bits, block).apply(model, tmp_path).facts
    changed = reference(plain, model, block, channel_axis=1 if family == "gpt2" else 0)  # gpt2 stores [in, out]
    assert changed >= 10
    assert facts["bytes_after"] < (0.3 if bits == 8 else 0.42) * facts["bytes_before"]
    assert (facts["experts"] > 0) == (family == "qwen3_moe")
    assert all(reason == "it is trained" for reason in facts["left"].values())
    inputs = feeds(plain)
    assert worst(run(model, inputs, basic=True), run(plain, inputs, basic=True)) < 1e-5


def test_with_recomputation(captured, tmp_path):
    plain, model = captured("llama"), captured("llama")
    QuantizeBase(4).apply(model, tmp_path)
    reference(plain, model, 32, 0)
    assert Recompute().apply(model, tmp_path).facts["recomputed_layers"] == 2
    inputs = feeds(plain)
    assert worst(run(model, inputs, tmp_path / "run.onnx", basic=True), run(plain, inputs, basic=True)) < 1e-5
    # Forward, backward and recomputed products each dequantise for themselves.
    counted = [n.op_type for n in onnx.load(tmp_path / "run.onnx").graph.node].count("DequantizeLinear")
    assert counted > 2 * len([n for n in arrays(model) if n.endswith(".quantized") and ".layers." in n])


@pytest.mark.parametrize("width", [33, 47, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_odd_sizes_and_zero_blocks(bits, width, tmp_path):
    plain, model = frozen_step(2, width), frozen_step(2, width)
    for each in (plain, model):
        weight = each.graph.initializers["model.layers.0.weight"]
        array = weight.const_value.numpy().copy()
        array[:32, :] = 0  # whole blocks
        array[:, 3] = 0  # a whole output channel
        weight.const_value = ir.tensor(array, name=weight.name)
    QuantizeBase(bits, 32).apply(model, tmp_path)
    assert reference(plain, model, 32, channel_axis=1) == 2
    zeros = plain.graph.initializers["model.layers.0.weight"].const_value.numpy()
    assert not zeros[:32].any()
    assert not zeros[:, 3].any()
    inputs = {name: np.random.default_rng(3).random((6, width)).astype(np.float32) for name in ("x", "row_weights")}
    assert worst(run(model, inputs, basic=True), run(plain, inputs, basic=True)) < 1e-5


def test_rounding_is_to_the_nearest_value():
    x = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32)
    values, scale = quantize_rows(x)
    assert np.all(np.abs(values * scale[:, None] - x) <= scale[:, None] * 0.5001)
    values, scale, zero = quantize_blocks(x, 32)
    assert values.max() <= 15
    wide = lambda part: np.repeat(part, 32, axis=1)[:, :50].astype(np.float32)
    # The zero point is rounded, too: half a step from each.
    assert np.all(np.abs((values - wide(zero)) * wide(scale) - x) <= wide(scale) * 1.001)
    assert np.abs((values - wide(zero)) * wide(scale) - x).mean() < 0.3 * scale.mean()


def test_weights_stored_in_bfloat16(tmp_path):
    plain, model = frozen_step(1, 40), frozen_step(1, 40)
    weight = model.graph.initializers["model.layers.0.weight"]
    stored = weight.const_value.numpy().astype(ml_dtypes.bfloat16)
    half = ir.Value(
        name="model.layers.0.stored",
        shape=weight.shape,
        type=ir.TensorType(ir.DataType.BFLOAT16),
        const_value=ir.tensor(stored, name="model.layers.0.stored"),
    )
    cast = ir.node("Cast", [half], {"to": 1})
    cast.outputs[0].type, cast.outputs[0].shape = weight.type, weight.shape
    weight.replace_all_uses_with(cast.outputs[0])
    model.graph.initializers.pop("model.layers.0.weight")
    model.graph.register_initializer(half)
    model.graph.insert_before(model.graph[0], cast)
    QuantizeBase(8).apply(model, tmp_path)
    expected = dequantized(arrays(model), "model.layers.0.stored", (40, 40), 0, 1)
    assert np.abs(expected - stored.astype(np.float32)).max() <= np.abs(stored.astype(np.float32)).max() / 254 * 1.001
    plain.graph.initializers["model.layers.0.weight"].const_value = ir.tensor(expected, name="model.layers.0.weight")
    assert "Cast" not in [node.op_type for node in model.graph]
    inputs = {name: np.random.default_rng(3).random((6, 40)).astype(np.float32) for name in ("x", "row_weights")}
    assert worst(run(model, inputs, basic=True), run(plain, inputs, basic=True)) < 1e-5


@pytest.mark.parametrize("stored", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16])
def test_rows_of_a_table_of_16_bits_are_not_rounded_to_16_bits(stored, tmp_path):
    """One reader computes in float32, as models do, and one in the table's own precision."""
    table = np.random.default_rng(0).normal(size=(64, 24)).astype(stored.numpy())
    weight = ir.Value(
        name="embed.weight", shape=ir.Shape(table.shape), type=ir.TensorType(stored),
        const_value=ir.tensor(table, name="embed.weight"),
    )  # fmt: skip
    ids = ir.Value(name="ids", shape=ir.Shape([5]), type=ir.TensorType(ir.DataType.INT64))
    rows = ir.node("Gather", [weight, ids])
    rows.outputs[0].dtype, rows.outputs[0].shape = stored, ir.Shape([5, 24])
    wide = ir.node("Cast", [rows.outputs[0]], {"to": 1})
    own = ir.node("Identity", [rows.outputs[0]])
    back = ir.node("Cast", [own.outputs[0]], {"to": 1})
    for node, dtype in ((wide, ir.DataType.FLOAT), (own, stored), (back, ir.DataType.FLOAT)):
        node.outputs[0].dtype, node.outputs[0].shape = dtype, ir.Shape([5, 24])
    doubled = ir.node("Add", [wide.outputs[0], wide.outputs[0]])
    for node, name in ((doubled, "doubled"), (back, "own")):
        node.outputs[0].name = name
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([5, 24])
    graph = ir.Graph(
        [ids], [doubled.outputs[0], back.outputs[0]], nodes=[rows, wide, own, back, doubled], initializers=[weight],
        opset_imports={"": 23}, name="table",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    assert QuantizeBase(4).apply(model, tmp_path).facts["tables"] == 1
    at = np.array([3, 0, 63, 3, 17])
    found = run(model, {"ids": at}, tmp_path / "run.onnx")
    kept = arrays(model)
    exact = kept["embed.weight.quantized"][at].astype(np.float32) * kept["embed.weight.scale"][at, None]
    np.testing.assert_array_equal(found["doubled"], exact + exact)
    np.testing.assert_array_equal(found["own"], exact.astype(stored.numpy()).astype(np.float32))


@pytest.mark.parametrize("bits", [8, 4])
def test_onnx_runtime_does_not_undo_it(captured, bits, tmp_path):
    model = captured("llama")
    QuantizeBase(bits).apply(model, tmp_path)
    run(model, feeds(model), tmp_path / "run.onnx")
    graph = onnx.load(tmp_path / "run.onnx").graph
    large = [i for i in graph.initializer if math.prod(i.dims) >= 1024]
    assert {i.data_type for i in large} <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT4}
    # One for the forward and one for the backward product: nothing was merged either.
    assert sum(node.op_type == "DequantizeLinear" for node in graph.node) >= 2 * 13


def test_files_round_trip(captured, tmp_path):
    model = captured("llama")
    (tmp_path / "work").mkdir()
    (tmp_path / "shards").mkdir()
    QuantizeBase(4, 20).apply(model, tmp_path / "work")
    inputs = feeds(model)
    before, wanted = arrays(model), run(model, inputs)
    name = "model.layers.0.mlp.down_proj.weight.quantized"
    assert isinstance(model.graph.initializers[name].const_value, FileTensor)
    SplitWeights("50KB").apply(model, tmp_path / "shards")
    assert len(weight_files(model)) > 1
    save_model(model, tmp_path / "shards" / "model.onnx")
    again = load_model(tmp_path / "shards" / "model.onnx")
    after = arrays(again)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[n], after[n]) for n in before)
    assert again.graph.initializers[name].const_value.nbytes == before[name].size // 2
    assert worst(run(again, inputs), wanted) == 0


def test_memory_falls(tmp_path):
    layers, width = 8, 1024
    model = mlp_step(layers, width)
    for value in list(model.graph.outputs)[2:]:  # all but one layer are frozen
        model.graph.outputs.remove(value)
    inputs = {name: np.random.default_rng(1).random((8, width)).astype(np.float32) for name in ("x", "row_weights")}
    plain = sum(memory(model, inputs, tmp_path))
    facts = QuantizeBase(8).apply(model, tmp_path).facts
    assert facts["weights"] == layers - 1
    saved = plain - sum(memory(model, inputs, tmp_path))
    assert saved > 0.6 * (facts["bytes_before"] - facts["bytes_after"])


def test_refuses_weights_that_are_not_numbers(tmp_path):
    model = frozen_step(1, 40)
    weight = model.graph.initializers["model.layers.0.weight"]
    array = weight.const_value.numpy().copy()
    array[1, 2] = np.nan
    weight.const_value = ir.tensor(array, name=weight.name)
    with pytest.raises(TransformError, match=r"model\.layers\.0\.weight"):
        QuantizeBase().apply(model, tmp_path)


@pytest.mark.parametrize("bad", ["QuantizeBase:bits=3", "QuantizeBase:block_size=1", "QuantizeBase:block=32"])
def test_refuses_bad_parameters(bad):
    with pytest.raises(OptionError):
        resolve([bad])


def test_by_name():
    assert resolve(["QuantizeBase:bits=4,block_size=64"])[0] == QuantizeBase(4, 64)

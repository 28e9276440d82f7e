"""The simulated peak against sums by hand and against a process, and an order that was spoilt on purpose."""

import random

import numpy as np
import onnx_ir as ir
import pytest
from training_steps import feeds, memory, mlp_step, run, worst

from QEfficient.errors import OptionError
from QEfficient.transforms.onnx.queue import resolve
from QEfficient.transforms.onnx.recompute import Recompute
from QEfficient.transforms.onnx.schedule import Schedule, peak_bytes
from QEfficient.transforms.onnx.sizes import Sizes


def model_of(text: str) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> {text}')


def shuffle(model: ir.Model, seed: int) -> None:
    """Another order in which every node still comes after what it reads."""
    nodes, chosen = list(model.graph), random.Random(seed)
    makers = {n: {v.producer() for v in n.inputs if v is not None} - {None} for n in nodes}
    order: list[ir.Node] = []
    done: set[ir.Node | None] = set()
    waiting = list(nodes)
    while waiting:
        node = chosen.choice([n for n in waiting if makers[n] <= done])
        waiting.remove(node)
        order.append(node)
        done.add(node)
    model.graph.remove(nodes)
    model.graph.extend(order)


def test_a_chain_holds_two_values():
    model = model_of("""g (float[n, 10] x) => (float[1] y) <float[n, 10] a, float[n, 10] b, float[n, 10] c> {
        a = Neg(x)  b = Exp(a)  c = Tanh(b)  y = ReduceSum<keepdims=0>(c) }""")
    assert peak_bytes(model, {"n": 7}) == 2 * 7 * 10 * 4


def test_views_and_outputs():
    model = model_of("""g (float[n, 10] x) => (float[n, 10] a, float[1] y) <float[m] b, float[m] c, int64[1] s = {-1}> {
        a = Neg(x)  b = Reshape(a, s)  c = Exp(b)  y = ReduceSum<keepdims=0>(c) }""")
    # a is an output and stays; b is a's memory; c beside it, then y beside both.
    assert peak_bytes(model, {"n": 7, "m": 70}) == 2 * 280 + 4


def test_where_needs_room_to_work():
    model = model_of("""g (bool[n] k, float[n] x) => (float[n] y) <float[n] a> { a = Neg(x)  y = Where(k, a, x) }""")
    assert peak_bytes(model, {"n": 100}) == 4 * 400


def test_an_unknown_dimension_is_named():
    model = model_of("g (float[rows] x) => (float[rows] y) { y = Neg(x) }")
    with pytest.raises(OptionError, match="'rows'"):
        peak_bytes(model, {"row": 3})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sizes_are_those_of_a_run(captured, family):
    """Also where the graph notes no shape: every value is made an output once and measured."""
    model = captured(family)
    inputs = feeds(model, batch=3, seq=11, rows=5)
    sizes = Sizes({"batch_size": 3, "seq_len": 11, "rows": 5})
    values = [v for node in model.graph for v in node.outputs]
    wanted = {str(v.name): (sizes.shape(v), sizes.dtype(v)) for v in values}
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = ir.TensorType(sizes.dtype(value))
                value.shape = ir.Shape([None] * len(sizes.shape(value)))
                model.graph.outputs.append(value)
    for name, array in run(model, inputs).items():
        assert wanted[name] == (array.shape, ir.DataType.from_numpy(array.dtype)), name


def test_the_simulation_agrees_with_a_process(tmp_path):
    rows, width, layers = 4096, 256, 10
    inputs = {name: np.random.default_rng(1).random((rows, width)).astype(np.float32) for name in ("x", "row_weights")}
    for model in (mlp_step(layers, width), mlp_step(layers, width)):
        simulated = peak_bytes(model, {"rows": rows})
        _, measured = memory(model, inputs, tmp_path)
        # What a first run touches besides: code, small buffers, an arena's rounding.
        assert simulated * 0.95 < measured < simulated * 1.2 + 24 * 2**20
        Recompute().apply(model, tmp_path)
        assert peak_bytes(model, {"rows": rows}) < 0.6 * simulated


@pytest.mark.parametrize("seed", [0, 1])
def test_repairs_a_bad_order(captured, seed, tmp_path):
    plain, model = captured("llama"), captured("llama")
    shuffle(model, seed)
    sizes = {"batch_size": 4, "seq_len": 64, "rows": 256}
    before = peak_bytes(model, sizes)
    result = Schedule(4, 64).apply(model, tmp_path)
    assert result.facts["peak_bytes_before"] == before
    assert result.facts["peak_bytes_after"] == peak_bytes(model, sizes) < 0.95 * before
    inputs = feeds(plain)
    assert worst(run(model, inputs), run(plain, inputs)) < 1e-6


def test_leaves_a_good_order_alone(captured, tmp_path):
    model = captured("llama")
    order = list(model.graph)
    result = Schedule(4, 64).apply(model, tmp_path)
    assert result.facts["peak_bytes_after"] <= result.facts["peak_bytes_before"]
    assert result.modified == (order != list(model.graph))


def test_parameters():
    assert resolve(["Schedule:batch_size=2,seq_len=128"])[0] == Schedule(2, 128)
    with pytest.raises(OptionError, match="seq_len"):
        Schedule(seq_len=0)

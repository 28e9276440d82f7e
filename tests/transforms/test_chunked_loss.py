"""ChunkedLoss: the same loss and gradients, and no matrix of all rows and the vocabulary."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_models import VOCAB_SIZE
from training_steps import feeds, memory, mlp_step, run, worst

from QEfficient.errors import OptionError, TransformError
from QEfficient.transforms.onnx.chunked_loss import ChunkedLoss
from QEfficient.transforms.onnx.quantize_base import QuantizeBase
from QEfficient.transforms.onnx.queue import resolve
from QEfficient.transforms.onnx.recompute import Recompute


def widths(model: ir.Model) -> set[tuple[str, int]]:
    """(first dimension, last dimension) of every matrix the graph makes."""
    shapes = [v.shape for node in model.graph for v in node.outputs if v.shape is not None and len(v.shape) == 2]
    return {(str(s[0]), s[1]) for s in shapes if isinstance(s[1], int)}


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "llama-full", "llama-teacher"])
def test_every_family(captured, family, chunks, tmp_path):
    plain, model = captured(family), captured(family)
    assert ("rows", VOCAB_SIZE) in widths(plain)
    ChunkedLoss(chunks).apply(model, tmp_path)
    assert (("rows", VOCAB_SIZE) in widths(model)) == (chunks == 1)
    for rows in (20, 3, 1):  # uneven parts, empty parts
        inputs = feeds(plain, rows=rows)
        assert worst(run(model, inputs), run(plain, inputs)) < 3e-6


def test_removes_work_that_is_done_twice(captured, tmp_path):
    plain, model = captured("llama"), captured("llama")
    assert ChunkedLoss(1).apply(model, tmp_path).facts["removed_passes"] == 4
    made = lambda m: sum(v.shape == ir.Shape(["rows", VOCAB_SIZE]) for node in m.graph for v in node.outputs)
    assert made(plain) - made(model) == 4


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_sums_over_rows_by_hand(rows, tmp_path):
    """In the hand-written step everything depends on rows: loss and weight gradients are sums over chunks."""
    plain, model = mlp_step(3, 8), mlp_step(3, 8)
    facts = ChunkedLoss(4).apply(model, tmp_path).facts
    assert facts["copied_nodes"] > 3 * len(plain.graph)
    inputs = {name: np.random.default_rng(4).random((rows, 8)).astype(np.float32) for name in ("x", "row_weights")}
    wanted = run(plain, inputs)
    assert worst(run(model, inputs), wanted) < 1e-6
    x = inputs["x"].astype(np.float64)
    for n in range(3):
        x = x + np.tanh(np.tanh(x @ plain.graph.initializers[f"model.layers.{n}.weight"].const_value.numpy()))
    assert run(model, inputs)["loss"] == pytest.approx(((x * 0.5) ** 2 * inputs["row_weights"]).sum(), rel=1e-5)


@pytest.mark.parametrize("order", [0, 1])
def test_with_the_other_levers(captured, order, tmp_path):
    plain, model = captured("llama"), captured("llama")
    for number, each in enumerate((plain, model)):
        (tmp_path / str(number)).mkdir()
        QuantizeBase(8).apply(each, tmp_path / str(number))
    for transform in (ChunkedLoss(3), Recompute())[:: -1 if order else 1]:
        transform.apply(model, tmp_path)
    inputs = feeds(plain)
    assert worst(run(model, inputs, basic=True), run(plain, inputs, basic=True)) < 3e-6
    # All chunks share one float copy of the head's weight, also after ONNX Runtime has had its way.
    run(model, inputs, tmp_path / "run.onnx", basic=True)
    nodes = onnx.load(tmp_path / "run.onnx").graph.node
    assert sum("lm_head.weight.quantized" in node.input for node in nodes) == 1


def test_memory_falls_with_a_wide_vocabulary(captured, tmp_path):
    model = captured("llama-wide")
    inputs = feeds(model, batch=4, seq=96, rows=300)
    _, plain = memory(model, inputs, tmp_path)
    ChunkedLoss(8).apply(model, tmp_path)
    _, less = memory(model, inputs, tmp_path)
    # Two matrices of 300 x 32,000 floats (73 MiB) become two of an eighth.
    assert plain - less > 0.6 * 2 * 300 * 32000 * 4, f"{less / 2**20:.0f} MiB against {plain / 2**20:.0f} MiB"


def test_refuses_a_step_without_rows(captured, tmp_path):
    with pytest.raises(TransformError, match="'rows'"):
        ChunkedLoss().apply(captured("bert"), tmp_path)


def test_refuses_a_head_that_mixes_rows(tmp_path):
    model = mlp_step(1, 4)
    add = next(node for node in model.graph if node.op_type == "Add")
    axis = ir.Value(name="axis", const_value=ir.tensor(np.array(0), name="axis"))
    model.graph.register_initializer(axis)
    mixed = ir.node("CumSum", [add.outputs[0], axis], name="mixer")
    mixed.outputs[0].type, mixed.outputs[0].shape = add.outputs[0].type, add.outputs[0].shape
    add.outputs[0].replace_all_uses_with(mixed.outputs[0])
    mixed.replace_input_with(0, add.outputs[0])
    model.graph.insert_after(add, mixed)
    with pytest.raises(TransformError, match="mixer"):
        ChunkedLoss(2).apply(model, tmp_path)


@pytest.mark.parametrize("bad", [0, 65, 2.5, "four"])
def test_refuses_bad_counts(bad):
    with pytest.raises(OptionError, match="chunks"):
        ChunkedLoss(bad)


def test_by_name():
    assert resolve(["ChunkedLoss:chunks=8"])[0] == ChunkedLoss(8)

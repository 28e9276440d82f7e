"""Recompute: the same gradients to the bit, also infinite ones, from less memory."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from training_steps import FAMILIES, feeds, memory, mlp_step, run, worst

from QEfficient.errors import TransformError
from QEfficient.transforms.onnx.graph import ancestors
from QEfficient.transforms.onnx.queue import resolve
from QEfficient.transforms.onnx.recompute import Recompute


def recomputed(model: ir.Model, tmp_path) -> dict:
    result = Recompute().apply(model, tmp_path)
    assert result.modified
    return result.facts


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family(captured, family, tmp_path):
    plain, model = captured(family), captured(family)
    facts = recomputed(model, tmp_path)
    assert facts["recomputed_layers"] == facts["layers"] == 2
    for batch, seq, rows in ((3, 17, 20), (1, 9, 1)):
        inputs = feeds(plain, batch, seq, rows)
        wanted = run(plain, inputs, basic=True)
        assert worst(run(model, inputs, tmp_path / "run.onnx", basic=True), wanted) < 1e-6
    kept = [node for node in onnx.load(tmp_path / "run.onnx").graph.node if "/again" in node.name]
    assert len(kept) > 0.9 * facts["copied_nodes"], "ONNX Runtime merged copies with their originals"


@pytest.mark.parametrize("family", FAMILIES)
def test_products_stay_but_attention_scores_do_not(captured, family, tmp_path):
    plain, model = captured(family), captured(family)
    Recompute(keep="products").apply(model, tmp_path)
    forward = set(ancestors(v for v in model.graph.outputs if not str(v.name).startswith("grad/")))
    handed = {
        v
        for node in set(model.graph) - forward
        for v in node.inputs
        if v is not None and v.producer() in forward and node.op_type != "Shape"
    }
    dims = {str(v.name): [str(d) for d in v.shape] for v in handed if v.shape is not None}
    assert any(sum("seq_len" in d for d in shape) == 1 for shape in dims.values()), "no product is kept"
    # Masks [batch, 1, seq, seq] are the same for all layers.
    assert not [n for n, shape in dims.items() if sum("seq_len" in d for d in shape) > 1 and shape[1:2] != ["1"]]
    again = [node for node in model.graph if "/again" in str(node.name) and node.op_type in ("MatMul", "Gemm")]
    assert not [n.name for n in again if any(v.is_initializer() for v in n.inputs)], "computed twice"
    inputs = feeds(plain, 3, 17, 20)
    assert worst(run(model, inputs, basic=True), run(plain, inputs, basic=True)) < 1e-6


@pytest.mark.parametrize("poison", [np.inf, -np.inf, np.nan])
def test_infinite_gradients_stay_what_they_are(poison, tmp_path):
    plain, model = mlp_step(3, 8), mlp_step(3, 8)
    recomputed(model, tmp_path)
    inputs = {name: np.random.default_rng(1).random((4, 8)).astype(np.float32) for name in ("x", "row_weights")}
    inputs["row_weights"][0, 0] = poison
    wanted, got = run(plain, inputs), run(model, inputs, tmp_path / "run.onnx")
    assert sum(n.op_type == "Tanh" for n in onnx.load(tmp_path / "run.onnx").graph.node) == 12
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name])
    assert not np.isfinite(wanted["grad/model.layers.0.weight"]).all()
    if np.isinf(poison):  # a poisoned activation would be NaN
        assert not any(np.isnan(value).any() for value in got.values())


def test_a_tanh_network_matches_its_analytic_gradient(tmp_path):
    """An independent reference: central differences of the loss in float64."""
    model = mlp_step(2, 4)
    recomputed(model, tmp_path)
    rng = np.random.default_rng(2)
    inputs = {name: rng.random((5, 4)).astype(np.float32) for name in ("x", "row_weights")}
    weights = [model.graph.initializers[f"model.layers.{n}.weight"].const_value.numpy().astype(float) for n in (0, 1)]

    def loss(w):
        x = inputs["x"].astype(float)
        for matrix in w:
            x = x + np.tanh(np.tanh(x @ matrix))
        return ((x * 0.5) ** 2 * inputs["row_weights"]).sum()

    got = run(model, inputs)
    for n in (0, 1):
        for place in ((0, 0), (2, 3)):
            up, down = [w.copy() for w in weights], [w.copy() for w in weights]
            up[n][place] += 1e-6
            down[n][place] -= 1e-6
            assert got[f"grad/model.layers.{n}.weight"][place] == pytest.approx(
                (loss(up) - loss(down)) / 2e-6, rel=1e-4
            )


def test_memory_falls(tmp_path):
    rows, width, layers = 4096, 256, 12
    inputs = {name: np.random.default_rng(1).random((rows, width)).astype(np.float32) for name in ("x", "row_weights")}
    model = mlp_step(layers, width)
    _, plain = memory(model, inputs, tmp_path)
    recomputed(model, tmp_path)
    _, less = memory(model, inputs, tmp_path)
    # Three activations per layer against one, and a few for the layer at work.
    assert less < 0.6 * plain, f"{less / 2**20:.0f} MiB against {plain / 2**20:.0f} MiB"


def test_a_frozen_first_layer_is_not_recomputed(tmp_path):
    """Nothing reads its activations in the backward pass."""
    model = mlp_step(3, 8)
    outputs = model.graph.outputs
    gone = next(v for v in outputs if v.name == "grad/model.layers.0.weight")
    outputs.remove(gone)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    facts = recomputed(model, tmp_path)
    assert (facts["layers"], facts["recomputed_layers"]) == (3, 2)


def test_refuses_what_is_no_training_step(tmp_path):
    model = mlp_step(1, 4)
    for value in list(model.graph.outputs)[1:]:
        model.graph.outputs.remove(value)
    with pytest.raises(TransformError, match="training steps"):
        Recompute().apply(model, tmp_path)


def test_refuses_a_graph_without_numbered_layers(tmp_path):
    model = mlp_step(1, 4)
    weight = model.graph.initializers.pop("model.layers.0.weight")
    weight.name = "weight"
    model.graph.initializers.add(weight)
    with pytest.raises(TransformError, match="numbers in weight names"):
        Recompute().apply(model, tmp_path)


def test_by_name():
    assert isinstance(resolve(["Recompute"])[0], Recompute)

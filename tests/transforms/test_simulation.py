"""The transforms that let the host compute as a card would, each against numpy or Hugging Face with rounded numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from mx_definition import by_definition
from tiny_models import sample_prompt, save_tiny, tiny_causal_lm, tiny_encoder

from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM
from QEfficient.engine.package import open_package
from QEfficient.errors import OptionError, TransformError, UnsupportedModelError
from QEfficient.evaluate.steps import SessionSteps, forced
from QEfficient.transforms.onnx.mxint8_state import MXINT8State
from QEfficient.transforms.onnx.queue import resolve
from QEfficient.transforms.onnx.round_to_float16 import RoundToFloat16

SIZES = {"ctx_len": 32, "prefill_seq_len": 8}


def half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).astype(np.float16).astype(np.float32)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def blockwise(rows: np.ndarray) -> np.ndarray:
    """float16 of what MXINT8 keeps of each vector along the last axis."""
    flat = rows.reshape(-1, rows.shape[-1])
    return half(np.array([by_definition(row, "int8") for row in flat]).reshape(rows.shape))


# ------------------------------------------------------------------ float16

GRAPH = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x, int64[N] n) => (float[N, 4] y, float[N, 4] z, int64[N] m)
<float[4, 4] w = {1, 0.3, 0, 0, 0, 1, 0, 0, 0.0001, 0, 1, 0, 0, 0, 0, 1.0005}> {
    third = Constant <value = float {0.333333333}> ()
    a = MatMul (x, w)
    b = Mul (a, third)
    square = Mul (b, b)
    y = Transpose <perm = [0, 1]> (b)
    z = Add (square, third)
    m = Add (n, n)
}"""


def test_every_float_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((200, 4)) * 10.0 ** rng.integers(-7, 5, (200, 4))).astype(np.float32)
    n = np.arange(200) + 2**40
    model = ir.from_onnx_text(GRAPH)
    w = model.graph.initializers["w"].const_value.numpy()
    RoundToFloat16().apply(model, Path())
    y, z, m = run(model, {"x": x, "n": n})
    third = half(np.float32(0.333333333))
    b = half(half(half(x) @ half(w)) * third)
    with np.errstate(over="ignore"):
        expected = half(half(b * b) + third)
    np.testing.assert_array_equal(y, b)
    np.testing.assert_array_equal(z, expected)
    assert np.isinf(z).any()
    np.testing.assert_array_equal(m, 2 * n)


NORM = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y) {
    two = Constant <value = float {2.0}> ()
    small = Constant <value = float {0.00390625}> ()
    square = Pow (x, two)
    mean = ReduceMean <axes = [-1], keepdims = 1> (square)
    safe = Add (mean, small)
    root = Sqrt (safe)
    inverse = Reciprocal (root)
    y = Mul (x, inverse)
}"""


@pytest.mark.parametrize("keep", [False, True])
def test_norms_can_be_kept_in_float32(keep: bool) -> None:
    """300 squared is beyond float16: a normalisation in 16 bits loses the row, one in float32 does not."""
    x = np.array([[300, 1, 2, 3], [1, 2, 3, 4]], np.float32)
    model = ir.from_onnx_text(NORM)
    RoundToFloat16(keep_norms=keep).apply(model, Path())
    (y,) = run(model, {"x": x})
    exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + 2.0**-8)
    if keep:
        np.testing.assert_array_equal(y, half(exact))
    else:
        assert (y[0] == 0).all()
        np.testing.assert_allclose(y[1], exact[1], rtol=2e-3)


def test_state_is_not_rounded_again() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2] past_key, float[2] x) => (float[2] past_key_RetainedState) {
        past_key_RetainedState = Max (past_key, x)
    }"""
    model = ir.from_onnx_text(text)
    RoundToFloat16().apply(model, Path())
    (new,) = run(model, {"past_key": np.float32([1.0001, -1]), "x": np.float32([0, 0.1])})
    np.testing.assert_array_equal(new, [np.float32(1.0001), np.float32(np.float16(0.1))])


# ------------------------------------------------------------------ MXINT8

STATE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[1, 2, 8, WIDTH] past_key.0, int64[1, 2, 3, 3] where, float[1, 2, 3, WIDTH] x) => (
    float[1, 2, 8, WIDTH] past_key.0_RetainedState) {
    past_key.0_RetainedState = ScatterND (past_key.0, where, x)
}"""


def indices(slots: list[int]) -> np.ndarray:
    return np.array([[[[0, head, slot] for slot in slots] for head in range(2)]])


@pytest.mark.parametrize("width", [32, 40, 64, 5])
def test_state_holds_what_mxint8_keeps(width: int) -> None:
    rng = np.random.default_rng(width)
    x = half(rng.standard_normal((1, 2, 3, width)) * 10.0 ** rng.integers(-7, 4, (1, 2, 3, 1)))
    x[0, 0, 0] = 0
    x[0, 0, 1, 0] = 2.0**-24  # the smallest number of float16
    x[0, 1, 0] = np.ldexp(1, rng.integers(-24, 16, width))  # powers of two, where a logarithm errs
    x[0, 1, 1, 1] = 65504
    old = rng.standard_normal((1, 2, 8, width)).astype(np.float32)
    graph = onnx.parser.parse_model(STATE.replace("WIDTH", str(width)).replace("past_key.0", "past_key_0"))
    model = ir.from_proto(graph)
    facts = MXINT8State().apply(model, Path()).facts
    (new,) = run(model, {"past_key_0": old, "where": indices([0, 5, 2]), "x": x})
    assert facts == {"states": 1}
    np.testing.assert_array_equal(new[:, :, [0, 5, 2]], blockwise(x))
    np.testing.assert_array_equal(new[:, :, [1, 3, 4, 6, 7]], old[:, :, [1, 3, 4, 6, 7]])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_block_with_an_overflow_is_nan(bad: float) -> None:
    x = np.ones((1, 2, 3, 40), np.float32)
    x[0, 0, 1, 3] = bad
    model = ir.from_proto(onnx.parser.parse_model(STATE.replace("WIDTH", "40").replace("past_key.0", "past_key_0")))
    MXINT8State().apply(model, Path())
    old = np.zeros((1, 2, 8, 40), np.float32)
    (new,) = run(model, {"past_key_0": old, "where": indices([0, 1, 2]), "x": x})
    np.testing.assert_array_equal(new[:, :, :3], blockwise(x))
    assert np.isnan(new).sum() == 32


def test_without_keys_and_values_there_is_nothing_to_store() -> None:
    with pytest.raises(TransformError, match="keeps no keys and values"):
        MXINT8State().apply(ir.from_onnx_text(NORM), Path())


# ------------------------------------------------------------------ MXFP6


def decoded(weight: torch.Tensor, name: str) -> torch.Tensor:
    """A linear layer's weight [outputs, inputs] after MXFP6, blocks along the inputs."""
    rows = [by_definition(row, name) for row in weight.detach().numpy()]
    return torch.tensor(half(np.array(rows)))


@pytest.mark.parametrize(
    ("family", "layers", "element"),
    [("llama_tied", {"num_hidden_layers": 1}, "e2m3"), ("gpt2", {"n_layer": 1}, "e3m2")],
)
def test_products_read_what_mxfp6_keeps(family: str, layers: dict[str, int], element: str) -> None:
    """Logits are those of Hugging Face with every linear layer's weight rounded; a tied table stays exact."""
    torch_model = tiny_causal_lm(family, **layers)
    model = QEFFAutoModelForCausalLM(torch_model)
    package = model.compile(transforms=[f"MXFP6Weights:element={element}"], fuse=False, **SIZES)
    reference = copy.deepcopy(torch_model)
    reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())
    modules = {n: m for n, m in reference.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    errors = {}
    for name, module in modules.items():
        turned = type(module).__name__ == "Conv1D"
        weight = module.weight.detach().T if turned else module.weight.detach()
        new = decoded(weight, element)
        errors[name] = float((new - weight).norm() / weight.norm())
        module.weight.data = (new.T if turned else new).contiguous()
    ids = torch.tensor([sample_prompt(9)])
    with torch.no_grad():
        expected = reference(input_ids=ids).logits[0, -1].numpy()
        before = torch_model(input_ids=ids).logits[0, -1].numpy()
    with open_package(package) as opened:
        found = forced(SessionSteps(opened.session), ids[0].numpy(), np.array([0]), 32)[0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(before - expected).max() > 1e-2 * np.abs(expected).max()
    facts = json.loads((package / "manifest.json").read_text())["transforms"][0]["facts"]
    assert facts["weights"] == len(modules)
    assert sorted(facts["relative_error"].values()) == pytest.approx(sorted(errors.values()), rel=1e-4)


def test_unknown_element_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="'e2m3'"):
        resolve(["MXFP6Weights:element=e2m4"])


# ------------------------------------------------------------------ compile(simulate="qaic")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_causal_lm("qwen3", num_hidden_layers=1), tmp_path_factory.mktemp("simulation") / "model")


def test_a_simulated_package_has_rounded_state_and_logits(llama: Path) -> None:
    model = QEFFAutoModelForCausalLM.from_pretrained(llama)
    prompt = np.arange(4, 15)
    states, logits = {}, {}
    for name, options in {
        "fp32": {},
        "fp16": {"simulate": "qaic"},
        "both": {"simulate": "qaic", "mxfp6_matmul": True, "mxint8_kv_cache": True},
    }.items():
        package = model.compile(**SIZES, **options)
        with open_package(package) as opened:
            assert opened.manifest.options.get("simulate") == options.get("simulate")
            logits[name] = forced(SessionSteps(opened.session), prompt, np.array([7, 8]), 32)
            states[name] = opened.session.state("past_value.0").copy()
    written = {name: state[:, :, :12] for name, state in states.items()}
    np.testing.assert_array_equal(written["fp16"], half(written["fp16"]))
    np.testing.assert_array_equal(written["both"], blockwise(written["both"]))
    assert not np.array_equal(written["fp16"], blockwise(written["fp16"]))
    np.testing.assert_array_equal(logits["both"], half(logits["both"]))
    scale = np.abs(logits["fp32"]).max()
    far = {name: np.abs(logits[name] - logits["fp32"]).max() / scale for name in ("fp16", "both")}
    assert 0 < far["fp16"] < 5e-3 < far["both"] < 0.2


def test_continuous_batching_is_simulated_too(llama: Path) -> None:
    single = QEFFAutoModelForCausalLM.from_pretrained(llama)
    slots = QEFFAutoModelForCausalLM.from_pretrained(llama, continuous_batching=True)
    asked = {"simulate": "qaic", "mxint8_kv_cache": True, **SIZES}
    texts = []
    for model, more in ((single, {}), (slots, {"full_batch_size": 2})):
        with open_package(model.compile(**asked, **more)) as opened:
            texts.append(np.asarray(opened.generate(input_ids=np.arange(4, 13)[None], max_new_tokens=6)).tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"simulate": "qiac"}, "Did you mean 'qaic'"),
        ({"simulate": True}, "simulate must be 'qaic'"),
        ({"simulate": "qaic", "target": "qaic"}, "target='host'"),
        ({"simulate": "qaic", "weights": "int4"}, "weights='int4' exclude each other"),
        ({"simulate": "qaic", "node_precision_info": {"FP32NodeInstanceNames": ["a"]}}, "'norms' only"),
        ({"simulat": "qaic"}, "'simulate'"),
    ],
)
def test_contradictions_are_one_sentence(llama: Path, options: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        QEFFAutoModelForCausalLM.from_pretrained(llama).compile(**options)


def test_an_encoder_has_no_kv_state() -> None:
    with pytest.raises(OptionError, match="an encoder keeps none"):
        QEFFAutoModel(tiny_encoder("bert")).compile(simulate="qaic", mxint8_kv_cache=True)


def test_what_the_card_cannot_take_is_not_simulated() -> None:
    """More experts than are unrolled: the shapes of their products depend on the tokens."""
    model = QEFFAutoModelForCausalLM(tiny_causal_lm("qwen3_moe", num_experts=20))
    with pytest.raises(UnsupportedModelError, match="depend on data"):
        model.compile(simulate="qaic", **SIZES)

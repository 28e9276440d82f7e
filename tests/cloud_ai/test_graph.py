"""The graph for the card computes what the exported graph computes: run side by side in ONNX Runtime."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from tiny_models import save_tiny, tiny_causal_lm

from QEfficient import QEFFAutoModelForCausalLM
from QEfficient.errors import OptionError, TransformError
from QEfficient.onnx_io import load_model
from QEfficient.targets.cloud_check import check_graph, data_dependent
from QEfficient.targets.given_file import read_given
from QEfficient.targets.manifest import Manifest
from QEfficient.transforms.onnx.name_layers import layer_number
from QEfficient.transforms.onnx.queue import resolve, run_queue

ROWS, SLOTS = 3, 32
#: Logits of random weights are about 1; only the order of additions differs.
CLOSE = 2e-5


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options)


def feeds_for(program: ort.InferenceSession, positions: list[list[int]], rng: np.random.Generator) -> dict:
    """Random tokens and state for these positions; continuous batching uses rows 2, 0, …"""
    steps = np.array(positions)
    batch = len(steps)
    slots = any(value.name == "batch_index" for value in program.get_inputs())
    sizes = {"batch_size": batch, "full_batch_size": ROWS, "ctx_len": SLOTS, "seq_len": steps.shape[1]}
    feeds = {}
    for value in program.get_inputs():
        shape = [sizes[d] if isinstance(d, str) else d for d in value.shape]
        feeds[value.name] = rng.standard_normal(shape).astype(np.float32) if "float" in value.type else None
    feeds["input_ids"], feeds["position_ids"] = rng.integers(0, 100, steps.shape), steps
    if slots:
        feeds["batch_index"] = np.array([[2], [0]])[:batch]
    return feeds


def assert_same(model: QEFFAutoModelForCausalLM, positions: list[list[int]], **options) -> Path:
    package = model.compile(target="qaic", ctx_len=SLOTS, prefill_seq_len=8, dry_run=True, **options)
    exported, card = session(model.onnx_path), session(package / "model.onnx")
    feeds = feeds_for(exported, positions, np.random.default_rng(0))
    expected = exported.run(None, feeds)
    found = card.run([value.name for value in exported.get_outputs()], feeds)
    idle = np.flatnonzero(feeds["position_ids"].max(1) < 0)
    for value, a, b in zip(exported.get_outputs(), expected, found, strict=True):
        assert np.isfinite(b).all(), value.name
        if value.name == "logits":
            a, b = np.delete(a, idle, 0), np.delete(b, idle, 0)
        elif len(idle):  # what an idle row leaves in the last slot is never seen: whoever reads it writes it first
            a, b = a[:, :, :-1], b[:, :, :-1]
        np.testing.assert_allclose(b, a, atol=CLOSE, rtol=CLOSE, err_msg=value.name)
    return package


#: Padding, an idle row, the last slot, a single token.
STEPS = [[[4, 5, 6, -1], [0, 1, -1, -1]], [[28, 29, 30, 31], [-1, -1, -1, -1]], [[31], [0]]]


@pytest.mark.parametrize("positions", STEPS)
@pytest.mark.parametrize("slots", [False, True])
def test_the_same_logits_and_state(models, positions, slots):
    package = assert_same(models["causal"], positions, **({"full_batch_size": ROWS} if slots else {}))
    model = onnx.load(package / "model.onnx", load_external_data=False)
    assert ([o.version for o in model.opset_import if o.domain == ""], model.ir_version) == ([17], 8)
    end = "CB" if slots else ""
    assert {f.name for f in model.functions} == {f"CtxScatter{end}", f"CtxGather{end}"}
    assert {f.domain for f in model.functions} == {"com.qualcomm.cloud"}
    assert not {"Sin", "Cos", "Attention", "ScatterND"} & {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_families_with_more_than_plain_attention(family, tmp_path):
    """Soft caps and windows; scores with a bias, which no Attention operator computes."""
    torch.manual_seed(0)
    model = QEFFAutoModelForCausalLM(tiny_causal_lm(family), cache_home_dir=tmp_path)
    assert_same(model, STEPS[0])
    if family == "bloom":
        with pytest.raises(TransformError) as error:
            model.compile(target="qaic", ctx_len=SLOTS, prefill_seq_len=8, dry_run=True, comp_ctx_lengths_prefill=[16])
        assert "leave out ccl_enabled" in str(error.value)


def test_device_memory_nobody_wrote_reaches_no_result(models):
    """Slots above a row's position may hold anything, even NaN: their values read as 0 and their scores are masked."""
    package = models["causal"].compile(target="qaic", ctx_len=SLOTS, prefill_seq_len=8, dry_run=True)
    card = session(package / "model.onnx")
    feeds = feeds_for(card, [[3, 4]], np.random.default_rng(1))
    (clean,) = card.run(["logits"], feeds)
    for name in feeds:
        if name.startswith("past_"):
            feeds[name][:, :, 5:] = np.nan
    (dirty,) = card.run(["logits"], feeds)
    np.testing.assert_array_equal(dirty, clean)


def test_kept_logits_are_those_of_one_token_at_a_time(models):
    package = models["causal"].compile(
        target="qaic", ctx_len=SLOTS, prefill_seq_len=8, dry_run=True, num_speculative_tokens=3
    )
    exported, card = session(models["causal"].onnx_path), session(package / "model.onnx")
    feeds = feeds_for(exported, [[6, 7, 8, 9], [-1, -1, 2, 3]], np.random.default_rng(2))
    (found,) = card.run(["logits"], {**feeds, "num_logits_to_keep": np.zeros((4, 1), np.int64)})
    assert found.shape == (2, 4, 128)
    state = {name: value for name, value in feeds.items() if name.startswith("past_")}
    names = [value.name for value in exported.get_outputs()]
    for column in range(4):
        one = {
            "input_ids": feeds["input_ids"][:, [column]],
            "position_ids": feeds["position_ids"][:, [column]],
            **state,
        }
        outputs = dict(zip(names, exported.run(None, one), strict=True))
        state = {name: outputs[f"{name}_RetainedState"] for name in state}
        for row in range(2):
            if feeds["position_ids"][row, column] >= 0:
                np.testing.assert_allclose(found[row, column], outputs["logits"][row, 0], atol=CLOSE, rtol=CLOSE)
    manifest = Manifest.load(package)
    assert {spec.name: spec.shape for spec in manifest.inputs}["num_logits_to_keep"] == ("num_logits_to_keep", 1)
    assert manifest.outputs[0].shape == ("batch_size", "num_logits_to_keep", 128)


@pytest.mark.parametrize("slots", [False, True])
def test_a_shorter_context_gives_the_same_answer(models, slots):
    """Only the length of ``comp_ctx_lengths`` counts; the window ends right after the largest position."""
    options = {"full_batch_size": ROWS} if slots else {}
    package = models["causal"].compile(
        target="qaic", ctx_len=SLOTS, prefill_seq_len=8, dry_run=True, comp_ctx_lengths_prefill=[16], **options
    )
    card = session(package / "model.onnx")
    exported = session(models["causal"].onnx_path)
    feeds = feeds_for(exported, [[8, 9, 10], [0, 1, -1]], np.random.default_rng(3))
    expected = exported.run(None, feeds)
    for length in (11, 16, SLOTS):
        values = np.random.default_rng(4).integers(-9, 9, length)
        found = card.run([v.name for v in exported.get_outputs()], {**feeds, "comp_ctx_lengths": values})
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(b, a, atol=CLOSE, rtol=CLOSE)


def test_every_node_of_a_pipeline_has_a_stage_after_those_it_needs(models):
    package = models["causal"].compile(
        target="qaic", ctx_len=SLOTS, prefill_seq_len=8, dry_run=True, num_devices=2, mdp_num_partitions=2
    )
    stages = json.loads((package / "mdp_disagg_2d_2p.json").read_text())["partitions"]
    lists = [stage["nodeList"] for stage in stages]
    assert [{layer_number(name) for name in names} - {None} for names in lists] == [{0}, {1}]
    nodes = onnx.load(package / "model.onnx", load_external_data=False).graph.node
    assert len({node.name for node in nodes}) == len(nodes)
    # The stand-in checks order and completeness: see test_stand_in.py.
    with pytest.raises(OptionError, match="2 layers"):
        models["causal"].compile(target="qaic", ctx_len=SLOTS, dry_run=True, num_devices=3, mdp_num_partitions=3)


def test_every_layer_has_its_own_nodes(tmp_path):
    """Whichever layer's state tells the context length, and with casts of all stored weights before anything else."""
    reference = tiny_causal_lm("llama", num_hidden_layers=4).to(torch.bfloat16)
    model = QEFFAutoModelForCausalLM.from_pretrained(save_tiny(reference, tmp_path / "model"))
    package = model.compile(
        target="qaic", ctx_len=SLOTS, prefill_seq_len=8, dry_run=True, num_devices=4, mdp_num_partitions=4
    )
    nodes = onnx.load(package / "model.onnx", load_external_data=False).graph.node
    products = Counter(layer_number(node.name) for node in nodes if node.op_type == "MatMul")
    assert [products[layer] for layer in range(4)] == [9] * 4  # seven of the weights, two of attention
    for node in nodes:
        for value in node.input:
            layer = re.match(r"model\.layers\.(\d+)\.", value)
            assert layer is None or layer_number(node.name) == int(layer[1]), (node.name, value)
    stages = json.loads((package / "mdp_disagg_4d_4p.json").read_text())["partitions"]
    assert [{layer_number(name) for name in stage["nodeList"]} - {None} for stage in stages] == [{0}, {1}, {2}, {3}]
    counts = [len(stage["nodeList"]) for stage in stages]
    assert counts[1] == counts[2]


def test_bfloat16_weights_become_float16(tmp_path):
    values = np.array([1.5, -3.0, 1e-9, 3e5], np.float32)
    stored = ir.tensor(values.astype(ir.DataType.BFLOAT16.numpy()), name="w")
    weight = ir.Value(name="w", type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape([4]), const_value=stored)
    cast = ir.node("Cast", [weight], {"to": 1})
    cast.outputs[0].name, cast.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph([], [cast.outputs[0]], nodes=[cast], initializers=[weight], opset_imports={"": 17}, name="g")
    model = ir.Model(graph, ir_version=8)
    (record,) = run_queue(model, resolve(["NoBfloat16"]), tmp_path, lambda *_: None)
    assert record["facts"] == {"weights": 1, "clipped": 1, "became_zero": 1}
    assert graph.initializers["w"].const_value.dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(graph.initializers["w"].const_value.numpy(), np.float16([1.5, -3.0, 0, 65504]))


def test_tables_are_left_where_a_token_depends_on_others(tmp_path):
    """A rotation that changes with the largest position in the call cannot be a table."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (int64[B, S] position_ids) => (float[B, S, D] y)
    <float[1, 1, 2] freq = {1.0, 0.5}, int64[1] last = {2}> {
        f = Cast <to = 1> (position_ids)
        top = ReduceMax <keepdims = 1> (f)
        ratio = Div (f, top)
        wide = Unsqueeze (ratio, last)
        angle = Mul (wide, freq)
        y = Cos (angle)
    }"""
    model = ir.from_onnx_text(text)
    (record,) = run_queue(model, resolve(["RotaryTables:ctx_len=8"]), tmp_path, lambda *_: None)
    assert record["facts"]["tables"] == 0
    assert "beside it" in next(iter(record["facts"]["left"].values()))
    assert [node.op_type for node in model.graph][-1] == "Cos"


# ------------------------------------------------------------------ memory, checks, files


def test_memory_follows_the_formulas_of_the_contract(models):
    """f: Σ elements × (6.25/8 for constant product weights with mxfp6, else 2) + 2 × layers × rows × heads × …"""
    options = {"target": "qaic", "ctx_len": SLOTS, "prefill_seq_len": 8, "dry_run": True, "full_batch_size": 4}
    plain = Manifest.load(models["causal"].compile(**options)).runtime["memory"]
    elements = 2 * 2 * 4 * 2 * SLOTS * 16
    assert plain["kv_bytes"] == elements * 2
    small = Manifest.load(
        models["causal"].compile(**options, mxint8_kv_cache=True, mxfp6_matmul=True, num_devices=2)
    ).runtime["memory"]
    assert small["kv_bytes"] == elements * 8.25 / 8 / 2
    config = models["causal"].config
    width, heads, inner = config.hidden_size, config.num_attention_heads * 16, config.intermediate_size
    products = 2 * (2 * width * heads + 2 * width * 2 * 16 + 3 * width * inner) + config.vocab_size * width
    saved = plain["weights_bytes"] - 2 * small["weights_bytes"]
    assert saved == pytest.approx(products * (2 - 6.25 / 8), abs=2)


def test_check_finds_what_the_contract_names(models, tmp_path):
    package = models["causal"].compile(target="qaic", ctx_len=SLOTS, prefill_seq_len=8, dry_run=True)
    manifest = Manifest.load(package)
    good = load_model(package / "model.onnx")
    assert check_graph(good, manifest, package / "model.onnx") == []
    exported = load_model(models["causal"].onnx_path)
    found = check_graph(exported, manifest, models["causal"].onnx_path)
    assert [f.what.split(" ")[0] for f in found if f.certain] == ["opset", "IR"]
    assert {f.what.split(" ")[0] for f in found if not f.certain} == {"Attention", "Cos", "Sin", "GreaterOrEqual"}
    text = """
    <ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
    g (int32[batch_size, seq_len] input_ids, float[batch_size, 2, other, 4] past) => (float[A] y, int64[K, N] nz)
    <int64[1] far = {2147483647}, float[1] big = {1e30}> {
        rows = Gather (past, far)
        scaled = Mul (rows, big)
        y = mine.Strange (scaled)
        nz = NonZero (input_ids)
    }"""
    bad = onnx.parser.parse_model(text)
    bad.graph.input[1].name = bad.graph.node[0].input[0] = "past_key.0"  # the text form has no dots in names
    path = tmp_path / "bad.onnx"
    path.write_bytes(bad.SerializeToString())
    words = [f.what for f in check_graph(load_model(path), manifest, path)]
    for part in (
        "2147483647",
        "1e+30",
        "mine::Strange",
        "NonZero",
        "int32",
        "past_key.0_RetainedState",
        "dimension other",
    ):
        assert any(part in what for what in words), part


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FP32NodeInstanceNames: [a, b]\n", {"FP32NodeInstanceNames": ["a", "b"]}),
        ("FP16NodeInstanceNames: [a,\n  b]  # two\n", {"FP16NodeInstanceNames": ["a", "b"]}),
        ("FP32NodeInstanceNames:\n  - a\n  - 'b'\n", {"FP32NodeInstanceNames": ["a", "b"]}),
    ],
)
def test_node_precision_files_as_people_write_them(tmp_path, text, expected):
    path = tmp_path / "precision.yaml"
    path.write_text(text)
    assert read_given("node_precision_info", path) == expected
    path.write_text("FP32NodeInstanceNames: [a\n")
    with pytest.raises(OptionError, match="never closes"):
        read_given("node_precision_info", path)


def test_a_shape_that_depends_on_data_is_refused():
    """The rows of an expert, as many as tokens were routed to it; the same slice by a size of the input is exact."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[B, 4] x, int64[1] count) => (float[N, 4] y)
    <int64[1] zero = {0}> {
        exact = Shape <start = 0, end = 1> (x)
        whole = Slice (x, zero, exact)
        y = Slice (whole, zero, count)
    }"""
    model = ir.from_onnx_text(text)
    found = data_dependent(model)
    assert found is not None
    assert found.inputs[2].name == "count"


def test_unknown_nodes_of_a_precision_file_are_named(models):
    with pytest.raises(OptionError) as error:
        models["causal"].compile(
            target="qaic", ctx_len=SLOTS, dry_run=True, node_precision_info={"FP32NodeInstanceNames": ["pow_11"]}
        )
    assert "'pow_11'" in str(error.value)
    assert "'pow_1'" in str(error.value)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"converter_args_extensions": ""}, "'converter_args_extension'"),
        ({"converter_args_extension": "--float_bitwidth 32"}, "--float_bitwidth"),
        ({"context_binary_generator_args_extension": "--data_format_config=x"}, "--data_format_config"),
        ({"qnn_compilation_backend": {"compiler_stats_level": 1}}, "'compiler_stat_level'"),
        ({"SKIP_QNN_CONVERTER_STEP": True}, "share no files"),
    ],
)
def test_qnn_configurations_that_are_refused(models, config, word):
    with pytest.raises(OptionError) as error:
        models["causal"].compile(target="qnn", ctx_len=SLOTS, prefill_seq_len=8, dry_run=True, qnn_config=config)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_qnn_takes_two_graphs_at_most(models):
    with pytest.raises(OptionError, match="at most 2 graphs"):
        models["causal"].compile(
            target="qnn", ctx_len=SLOTS, prefill_seq_len=8, dry_run=True, num_speculative_tokens=[0, 3]
        )

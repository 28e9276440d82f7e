"""What the Cloud AI toolchains get equals, byte for byte, what was written by hand from their contract."""

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from QEfficient.targets.cloud_shapes import file_symbols
from QEfficient.targets.manifest import DimRange, Manifest, Specialization, StateSpec, TensorSpec
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.qaic import QaicTarget
from QEfficient.targets.qaic_command import Inputs, inference_command
from QEfficient.targets.qaic_files import custom_io_entries, custom_io_text, specializations_text
from QEfficient.targets.qaic_partition import contract_json, layers_per_stage, node_stages, pipeline
from QEfficient.targets.qaic_sdk import CURRENT

GOLDEN = Path(__file__).parent / "golden"
COMPILED = sorted(path.parent.name for path in GOLDEN.glob("*/scenario.json"))
#: Files of a package that no compiler reads, or whose content is the model's.
OURS = {"manifest.json", "entry.json", "model.onnx", "command.json", "config.json", "generation_config.json"}


def compiled_files(package: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in package.iterdir() if p.is_file() and p.name not in OURS}


@pytest.fixture(autouse=True)
def no_sdk(monkeypatch):
    """A machine with an SDK would name its own paths."""
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    if QaicTarget().check().can_compile:
        pytest.skip("a Cloud AI SDK is installed here")


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(models, name):
    scenario = json.loads((GOLDEN / name / "scenario.json").read_text())
    options = {"target": "qaic", **scenario["options"], "dry_run": True}
    if "enable_qnn" in options:
        del options["target"]
    package = models[scenario["model"]].compile(**options)
    written = compiled_files(package)
    expected = {p.name: p.read_bytes() for p in (GOLDEN / name).iterdir() if p.name != "scenario.json"}
    for file in scenario.get("not_compared", ()):
        written.pop(file)
    assert sorted(written) == sorted(expected)
    for file, content in expected.items():
        assert written[file].decode() == content.decode(), file


# ------------------------------------------------------------------ the layer that writes files


def manifest_of(inputs, states, specializations) -> Manifest:
    return Manifest(
        target="qaic", task="", model={}, program="", inputs=inputs, outputs=(), states=states,
        specializations=specializations, options={}, transforms=[], libraries={},
    )  # fmt: skip


def exactly(name: str, **sizes: int) -> Specialization:
    return Specialization(name, {symbol: DimRange.exactly(size) for symbol, size in sizes.items()})


SHARED = {"batch_size": 1, "seq_len": 1}
TWO_STEPS = {
    "whisper": [
        exactly("Encoder", **SHARED, decoder_ctx_len=150, encoder_ctx_len=1500, feature_len=3000),
        exactly("Decode", **SHARED, decoder_ctx_len=150, encoder_ctx_len=1500, feature_len=1),
    ],
    "seq2seq": [
        exactly("Encoder", **SHARED, decoder_ctx_len=64, encoder_ctx_len=48, encoder_len=48),
        exactly("Decode", **SHARED, decoder_ctx_len=64, encoder_ctx_len=48, encoder_len=1),
    ],
}


@pytest.mark.parametrize("name", TWO_STEPS)
def test_files_of_an_encoder_with_a_decoder(name):
    inputs = [TensorSpec("input_ids", "int64", ("batch_size", "seq_len"))]
    if name == "whisper":
        inputs.insert(0, TensorSpec("input_features", "float32", ("batch_size", 80, "feature_len")))
    states = [
        StateSpec(f"past_{kind}_{side}.0", f"past_{kind}_{side}.0_RetainedState", "float32", (1, 2, length, 8), "kv")
        for side, length in (("self", "decoder_ctx_len"), ("cross", "encoder_ctx_len"))
        for kind in ("key", "value")
    ]
    manifest = manifest_of(tuple(inputs), tuple(states), tuple(TWO_STEPS[name]))
    io_text = custom_io_text(custom_io_entries(manifest, fp16=True, mxint8_kv=False))
    assert io_text == (GOLDEN / name / "custom_io.yaml").read_text()
    options = QaicTarget().normalise(CompileOptions(target="qaic"))
    text = specializations_text([(s.name, file_symbols(s, options)) for s in TWO_STEPS[name]], named=True)
    assert text == (GOLDEN / name / "specializations.json").read_text()
    given = Inputs("model.onnx", retained=True, custom_io=True)
    command = inference_command("/opt/qti-aic/exec/qaic-compile", CURRENT, options, given, fp16=True)
    assert " ".join(command) + "\n" == (GOLDEN / name / "command.txt").read_text()


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("context_lengths_automatic", {"ctx_len": 16384}),
        ("context_lengths_automatic_slots", {"ctx_len": 8192, "full_batch_size": 2}),
    ],
)
def test_automatic_context_lengths(name, asked):
    target = QaicTarget()
    options = target.normalise(CompileOptions(target="qaic", prefill_seq_len=128, ccl_enabled=True, **asked))
    found = target.specializations(options, "text-generation")
    text = specializations_text([(s.name, file_symbols(s, options)) for s in found], named=True)
    assert text == (GOLDEN / name / "specializations.json").read_text()


PIPELINE = """
<ir_version: 8, opset_import: ["" : 17, "com.qualcomm.cloud" : 1, "com.qti.aisw.onnx" : 1]>
three_layers (float[4] x, float[4] w) => (float[4] y)
<float[4] scale = {1, 1, 1, 1}, float[4] shift = {0, 0, 0, 0}> {
    a = Abs (x)
    folded = Add (scale, shift)
    b = Mul (a, w)
    c = Add (b, folded)
    d = Mul (c, w)
    e = com.qualcomm.cloud.Pair (d)
    f = Mul (e, w)
    g = com.qti.aisw.onnx.CustomRMSNorm (f)
    same = Identity (scale)
    h = Add (g, same)
    y = Abs (h)
}
<domain: "com.qualcomm.cloud", opset_import: ["" : 17]>
Pair (x) => (y) { t = Abs (x) y = Neg (t) }
<domain: "com.qti.aisw.onnx", opset_import: ["" : 17]>
CustomRMSNorm (x) => (y) { y = Neg (x) }
"""
NAMES = [
    "/embed", "/model/layers.0/constant", "/model/layers.0/proj", "/model/layers.0/add", "/model/layers.1/proj",
    "/model/layers.1/pair", "/model/layers.2/proj", "/model/layers.2/norm", "/model/layers.2/keep", "", "/head",
]  # fmt: skip


def test_partition_file_of_a_pipeline():
    model = ir.from_onnx_text(PIPELINE)
    for node, name in zip(model.graph, NAMES, strict=True):
        node.name = name
    inner = model.functions["com.qualcomm.cloud", "Pair", ""]
    for node, name in zip(inner, ("inner_a", "inner_b"), strict=True):
        node.name = name
    text = contract_json(pipeline(4, 16, node_stages(model, 2)))
    assert text == (GOLDEN / "pipeline_nodes" / "mdp_disagg_4d_2p.json").read_text()


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [(10, 4, [2, 3, 3, 2]), (7, 3, [2, 3, 2]), (5, 2, [3, 2]), (11, 4, [3, 3, 3, 2]), (4, 4, [1, 1, 1, 1])],
)
def test_layers_of_stages(layers, stages, expected):
    """The examples of the contract (c.3), and an even one."""
    assert layers_per_stage(layers, stages) == expected

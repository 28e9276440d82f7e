"""Cloud AI 100 without its SDK: a dry run writes what the compiler takes, byte for byte, and pretends nothing."""

import dataclasses
import json
import stat
from pathlib import Path

import onnx
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_causal_lm

import QEfficient
from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM
from QEfficient.errors import OptionError, PackageError, QEfficientError, TargetUnavailableError, TransformError
from QEfficient.finetune import QAICCompiler, QAICLoader
from QEfficient.finetune.step_model import from_module
from QEfficient.finetune.step_package import StepOptions, build_step, export_step
from QEfficient.finetune.step_session import StepSession
from QEfficient.models.packaging import compile_export
from QEfficient.progress import silent
from QEfficient.store.store import ArtifactStore
from QEfficient.targets.base import CompileRequest
from QEfficient.targets.manifest import Manifest, Specialization
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.qaic import QaicTarget
from QEfficient.targets.qaic_sdk import find_sdk
from QEfficient.targets.registry import get_target
from QEfficient.transforms.onnx.queue import resolve

LAYER = "base_model.model.model.layers.{}.self_attn.{}.{}.weight"
TRAINED = [
    LAYER.format(layer, module, half)
    for layer in (0, 1)
    for module in ("q_proj", "v_proj")
    for half in ("lora_A", "lora_B")
]
EXEC = "/opt/qti-aic/exec"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def step(store) -> Path:
    """The exported training step of a tiny llama with LoRA, before any target saw it."""
    torch.manual_seed(0)
    tuned = get_peft_model(tiny_causal_lm("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    return export_step(from_module(tuned), store)[1]


@pytest.fixture(scope="module")
def dry(step, store) -> Path:
    options = CompileOptions(target="qaic", batch_size=2, seq_len=(8,), num_cores=14, dry_run=True)
    return compile_export(store, step, "step", options, [], silent)


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> QEFFAutoModelForCausalLM:
    return QEFFAutoModelForCausalLM(tiny_causal_lm("llama"), cache_home_dir=tmp_path_factory.mktemp("causal"))


def command(package: Path) -> list[str]:
    return json.loads((package / "command.json").read_text())["arguments"]


def sizes(package: Path) -> list:
    return json.loads((package / "specializations.json").read_text())["specializations"]


def io_list(package: Path) -> list[tuple[str, str]]:
    return [(e["IOName"], e["Precision"]) for e in yaml.safe_load((package / "custom_io.yaml").read_text())]


def one_sentence(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# ------------------------------------------------------------------ a training step


def test_training_command_line(dry):
    expected = [
        f"{EXEC}/qaic-exec",
        "-aic-hw",
        "-aic-hw-version=2.0",
        "-onnx-define-symbol=batch_size,2",
        "-onnx-define-symbol=seq_len,8",
        "-onnx-define-symbol=rows,14",
        "-aic-num-cores=14",
        "-compile-only",
        "-retained-state",
        "-convert-to-fp16",
        "-m=model.onnx",
        "-custom-IO-list-file=custom_io.yaml",
        "-aic-binary-dir=qpc",
    ]
    record = json.loads((dry / "command.json").read_text())
    assert record == {"profile": "legacy", "sdk": "not installed", "dry_run": True, "arguments": expected}
    assert (dry / "command.txt").read_text() == " ".join(expected) + "\n"


def test_training_io_list_names_every_trained_tensor_its_twin_and_its_gradient(dry):
    held = [*TRAINED, "lora_scaling"]
    names = [*held, *(f"{n}_RetainedState" for n in held), *(f"grad/{n}" for n in TRAINED)]
    assert io_list(dry) == [(name, "float16") for name in names]
    graph = onnx.load(dry / "model.onnx", load_external_data=False).graph
    assert set(names) <= {v.name for v in (*graph.input, *graph.output)}


def test_training_graph_gives_every_parameter_back_as_it_came(dry, step):
    graph = onnx.load(dry / "model.onnx", load_external_data=False).graph
    inputs = {v.name: v.type for v in graph.input}
    outputs = {v.name: v.type for v in graph.output}
    made_by = {node.output[0]: node for node in graph.node}
    for name in (*TRAINED, "lora_scaling"):
        node = made_by[f"{name}_RetainedState"]
        assert (node.op_type, list(node.input)) == ("Identity", [name])
        assert outputs[f"{name}_RetainedState"] == inputs[name]
    exported = onnx.load(step / "model.onnx", load_external_data=False).graph
    assert list(graph.input) == list(exported.input)
    assert [v.name for v in graph.output][: len(exported.output)] == [v.name for v in exported.output]


def test_every_symbol_of_the_training_graph_has_a_size(dry):
    assert sizes(dry) == [{"batch_size": "2", "rows": "14", "seq_len": "8"}]
    graph = onnx.load(dry / "model.onnx", load_external_data=False).graph
    dims = {d.dim_param for v in graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}
    assert dims == set(sizes(dry)[0])


def test_specializations_file_bytes(dry):
    assert (dry / "specializations.json").read_bytes() == (
        b'{\n    "specializations":[\n        {\n            "batch_size":"2",\n            "rows":"14",\n'
        b'            "seq_len":"8"\n        }\n    ]\n}'
    )


def test_weights_are_placed_and_not_copied(dry, step):
    (placed,) = (dry / "weights").iterdir()
    sources = {(p.stat().st_dev, p.stat().st_ino) for p in step.glob("*.safetensors")}
    assert (placed.stat().st_dev, placed.stat().st_ino) in sources


def test_dry_run_is_marked_complete_and_refused(dry):
    manifest = Manifest.load(dry)
    assert (manifest.runtime["dry_run"], manifest.runtime["fp16"]) == (True, True)
    assert manifest.options["dry_run"] is True
    assert manifest.program == "model.onnx"
    assert not (dry / "qpc").exists()
    written = {"model.onnx", "specializations.json", "custom_io.yaml", "command.json", "command.txt"}
    assert written <= set(manifest.files)
    for attempt in (lambda: StepSession(dry), QAICLoader(dry, [0]).get_session, QAICLoader(dry).load_model):
        with pytest.raises(TargetUnavailableError) as error:
            attempt()
        one_sentence(error, "dry run", "SDK")


def test_a_dry_run_that_was_touched_is_refused_before_that(dry, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in dry.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(dry)).parent.mkdir(exist_ok=True)
            (copy / path.relative_to(dry)).write_bytes(path.read_bytes())
    text = (copy / "command.txt").read_text()
    (copy / "command.txt").write_text(text.replace("14", "15"))
    with pytest.raises(PackageError, match="changed"):
        StepSession(copy)


def test_mxfp6_is_one_flag_more_and_another_package(step, store, dry):
    asked = CompileOptions(
        target="qaic", batch_size=2, seq_len=(8,), num_cores=14, mxfp6_matmul=True, mos=-1, dry_run=True
    )
    package = compile_export(store, step, "step", asked, [], silent)
    assert package != dry
    flags = command(dry)
    at = flags.index("-convert-to-fp16") + 1
    assert command(package) == [*flags[:at], "-mxfp6-matmul", *flags[at:]]


def test_a_row_of_one_token_still_has_a_place(step, store):
    asked = CompileOptions(target="qaic", seq_len=(1,), dry_run=True)
    assert sizes(compile_export(store, step, "step", asked, [], silent)) == [
        {"batch_size": "1", "rows": "1", "seq_len": "1"}
    ]


def test_a_transform_that_breaks_the_graph_is_caught_in_a_dry_run(step, store, tmp_path):

    source = tmp_path / "broken.py"
    source.write_text(
        "def broken(model):\n"
        "    for node in model.graph:\n"
        "        if node.op_type == 'MatMul':\n"
        "            node.op_type = 'NoSuchOperator'\n"
    )
    asked = CompileOptions(target="qaic", seq_len=(8,), dry_run=True)
    with pytest.raises(TransformError) as error:
        compile_export(store, step, "step", asked, resolve([f"{source}:broken"]), silent)
    one_sentence(error, "not valid", "NoSuchOperator")


# ------------------------------------------------------------------ a causal model


def test_causal_package(causal):
    package = causal.compile(target="qaic", ctx_len=32, prefill_seq_len=8, dry_run=True, mxfp6_matmul=True, mos=2)
    assert command(package) == [
        f"{EXEC}/qaic-compile",
        "-aic-hw",
        "-aic-hw-version=ai100",
        "-m=model.onnx",
        "-retained-state",
        "-convert-to-fp16",
        "-mxfp6-matmul",
        "-aic-num-cores=16",
        "-mos=2",
        "-network-specialization-config=specializations.json",
        "-custom-IO-list-file=custom_io.yaml",
        "-aic-binary-dir=qpc",
    ]
    shared = {"batch_size": "1", "ctx_len": "32"}
    assert sizes(package) == [
        {"name": "Prefill", "symbols": {**shared, "seq_len": "8"}},
        {"name": "Decode", "symbols": {**shared, "seq_len": "1"}},
    ]
    states = [
        f"past_{kind}.{layer}{end}" for layer in (0, 1) for kind in ("key", "value") for end in ("", "_RetainedState")
    ]
    text = "".join(f" - IOName: {name}\n   Precision: float16\n\n" for name in states)
    assert (package / "custom_io.yaml").read_bytes() == text.encode()
    graph = onnx.load(package / "model.onnx", load_external_data=False).graph
    assert set(states) <= {v.name for v in (*graph.input, *graph.output)}
    with pytest.raises(TargetUnavailableError) as error:
        QEfficient.load(package)
    one_sentence(error, "dry run")


def test_causal_variants(causal):
    package = causal.compile(target="qaic", ctx_len=32, prefill_seq_len=1, dry_run=True, mxint8_kv_cache=True)
    assert [entry["name"] for entry in sizes(package)] == ["Prefill"]
    assert {precision for _, precision in io_list(package)} == {"mxint8"}


def test_continuous_batching_sizes():
    target = QaicTarget()
    asked = CompileOptions(target="qaic", ctx_len=32, prefill_seq_len=8, full_batch_size=4, kv_cache_batch_size=6)
    prefill, decode = target.specializations(target.normalise(asked), "text-generation")
    exact = {s.name: {k: v.exact for k, v in s.symbols.items()} for s in (prefill, decode)}
    shared = {"ctx_len": 32, "full_batch_size": 6}
    assert exact == {
        "Prefill": {"batch_size": 1, "seq_len": 8, **shared},
        "Decode": {"batch_size": 4, "seq_len": 1, **shared},
    }


def test_encoder_package(bert, shared_home):
    model = QEFFAutoModel.from_pretrained(bert.checkpoint, pooling="mean", cache_home_dir=shared_home)
    package = model.compile(target="qaic", seq_len=[16, 32], batch_size=2, dry_run=True)
    assert sizes(package) == [
        {"name": f"Embedding_{i}", "symbols": {"batch_size": "2", "seq_len": str(n)}} for i, n in enumerate((16, 32))
    ]
    assert command(package) == [
        f"{EXEC}/qaic-compile",
        "-aic-hw",
        "-aic-hw-version=ai100",
        "-m=model.onnx",
        "-convert-to-fp16",
        "-aic-num-cores=16",
        "-network-specialization-config=specializations.json",
        "-aic-binary-dir=qpc",
    ]
    assert not (package / "custom_io.yaml").exists()


# ------------------------------------------------------------------ without and with an SDK


def test_without_an_sdk_nothing_is_compiled(causal, step, store, tmp_path):
    if find_sdk() is not None:
        pytest.fail("this test is for machines without the Cloud AI SDK")
    here = get_target("qaic").check()
    assert (here.can_compile, here.can_run) == (False, False)
    assert "Apps SDK" in here.missing[0]
    assert "dry_run=True" in here.missing[0]
    before = causal.onnx_path
    attempts = [
        lambda: causal.compile(target="qaic", ctx_len=24),
        lambda: QEfficient.compile(step / "model.onnx", target="qaic", seq_len=8, cache_home_dir=store.home),
        lambda: QAICCompiler().compile(step / "model.onnx", tmp_path / "qpc", seq_len=8),
        lambda: build_step(None, StepOptions(target="qaic", seq_len=8), store),
    ]
    for attempt in attempts:
        with pytest.raises(TargetUnavailableError) as error:
            attempt()
        one_sentence(error, "Apps SDK", "dry_run=True")
    assert causal.onnx_path == before
    assert not (tmp_path / "qpc").exists()


def fake_sdk(root: Path, script: str, *, name: str = "qaic-compile", version: str | None = None) -> Path:
    (root / "exec").mkdir(parents=True)
    compiler = root / "exec" / name
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    if version is not None:
        (root / "versions").mkdir()
        (root / "versions" / "apps.xml").write_text(f"<v><base_version>{version}</base_version></v>")
    return root


@pytest.mark.parametrize(
    ("name", "version", "profile"),
    [
        ("qaic-exec", None, "legacy"),
        ("qaic-exec", "1.21.0.1", "legacy"),
        ("qaic-compile", None, "current"),
        ("qaic-compile", "no number", "current"),
        ("qaic-compile", "1.20.0.100", "legacy"),
        ("qaic-compile", "1.21.6", "1.21"),
        ("qaic-compile", "1.22.0", "current"),
        ("qaic-compile", "2.0.1", "current"),
    ],
)
def test_sdk_release_decides_the_forms(tmp_path, name, version, profile):
    sdk = find_sdk(fake_sdk(tmp_path / "sdk", "", name=name, version=version))
    assert sdk is not None
    assert (sdk.compiler.name, sdk.profile.name) == (name, profile)


def no_variant(program, names):
    raise AssertionError("this target makes one program")


def request_for(dry: Path, step: Path, place: Path) -> CompileRequest:
    """What packaging asks a target for, from the manifest of the dry run."""
    place.mkdir()
    options = QaicTarget().normalise(CompileOptions(target="qaic", batch_size=2, seq_len=(8,)))
    return CompileRequest(step / "model.onnx", place, Manifest.load(dry), options, silent, no_variant, frozenset())


def test_with_an_sdk_the_command_runs_in_the_package(dry, step, tmp_path):
    script = 'printf "%s\\n" "$@" > seen.txt\ntest -f model.onnx && mkdir qpc && echo binary > qpc/programqpc.bin'
    target = QaicTarget(fake_sdk(tmp_path / "sdk", script, version="1.23.0"))
    assert target.check().can_compile
    assert target.toolchain() == {"qaic": "qaic-compile 1.23.0"}
    place = tmp_path / "package"
    manifest = target.compile(request_for(dry, step, place))
    assert (manifest.program, manifest.runtime["dry_run"]) == ("qpc/programqpc.bin", False)
    assert (place / "seen.txt").read_text().splitlines() == command(place)[1:]
    assert command(place)[:3] == [str(tmp_path / "sdk/exec/qaic-compile"), "-aic-hw", "-aic-hw-version=ai100"]
    assert "-compile-only" not in command(place)
    with pytest.raises(TargetUnavailableError, match="Platform SDK"):
        target.load(place, manifest)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo first; echo type must be string >&2; exit 255", ("255", "type must be string")),
        ("exit 3", ("code 3",)),
        ("exit 0", ("programqpc.bin",)),
    ],
)
def test_a_compiler_that_fails(dry, step, tmp_path, script, words):
    target = QaicTarget(fake_sdk(tmp_path / "sdk", script))
    with pytest.raises(QEfficientError) as error:
        target.compile(request_for(dry, step, tmp_path / "package"))
    one_sentence(error, *words)


# ------------------------------------------------------------------ QAICCompiler, QAICLoader


def test_compiler_writes_a_package_of_its_own(step, tmp_path):
    place = tmp_path / "a" / "qpc"
    made = QAICCompiler(num_cores=4, fp16=False, mxfp6_matmul=True).compile(
        step / "model.onnx", place, dry_run=True, batch_size=3, seq_len=5
    )
    assert made == place
    assert list(place.parent.iterdir()) == [place]
    assert "-aic-num-cores=4" in command(place)
    assert "-mxfp6-matmul" in command(place)
    assert "-convert-to-fp16" not in command(place)
    assert "-onnx-define-symbol=rows,12" in command(place)
    assert {precision for _, precision in io_list(place)} == {"float"}
    assert all(path.stat().st_nlink == 1 for path in place.rglob("*") if path.is_file())
    with pytest.raises(TargetUnavailableError):
        QAICLoader(place).get_session()
    with pytest.raises(OptionError, match="not empty"):
        QAICCompiler().compile(step / "model.onnx", place, dry_run=True, seq_len=5)


def test_compiler_takes_the_users_io_list(step, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(f" - IOName: {TRAINED[0]}\n   Precision: float16\n\n")
    place = QAICCompiler().compile(step / "model.onnx", tmp_path / "qpc", mine, dry_run=True, seq_len=8)
    assert (place / "custom_io.yaml").read_text() == mine.read_text()
    for text, word in ((" - IOName: lora_scalin\n", "lora_scaling"), ("nothing", "lists no IOName")):
        mine.write_text(text)
        with pytest.raises(OptionError) as error:
            QAICCompiler().compile(step / "model.onnx", tmp_path / "other", mine, dry_run=True, seq_len=8)
        one_sentence(error, word)
    with pytest.raises(OptionError, match="cannot be read"):
        QAICCompiler().compile(
            step / "model.onnx", tmp_path / "other", tmp_path / "nothing.yaml", dry_run=True, seq_len=8
        )
    assert not (tmp_path / "other").exists()


def test_loader_runs_a_host_package(step, store):
    package = compile_export(store, step, "step", CompileOptions(batch_size=2, seq_len=(8,)), [], silent)
    loader = QAICLoader(package)
    session = loader.get_session()
    assert isinstance(session, StepSession)
    assert loader.get_session() is session
    session.close()
    with pytest.raises(OptionError, match="device_ids"):
        QAICLoader(package, [0]).load_model()
    with pytest.raises(PackageError):
        QAICLoader(package / "weights").load_model()


# ------------------------------------------------------------------ options


def test_a_package_that_is_not_a_dry_run_does_not_know_the_word():
    assert "dry_run" not in CompileOptions().to_json()
    assert CompileOptions(dry_run=True).to_json()["dry_run"] is True


TWO_DEVICES = {
    "connections": [{"devices": [0, 1], "type": "p2p"}],
    "partitions": [{"name": "all", "devices": [{"deviceId": n, "numCores": 14} for n in range(2)]}],
}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "host", "dry_run": True}, ("host", "dry_run")),
        ({"target": "qaic", "dry_run": 1}, ("dry_run", "True or False")),
        ({"target": "qaci", "dry_run": True}, ("qaci", "'qaic'")),
        ({"target": "qaic", "dryrun": True}, ("dryrun", "'dry_run'")),
        ({"target": "qaic", "num_cores": 17}, ("num_cores=17", "16")),
        ({"target": "qaic", "num_devices": 17}, ("17 devices", "16")),
        ({"target": "qaic", "device_group": [0, 1, 1]}, ("[0, 1, 1]", "twice")),
        ({"target": "qaic", "num_devices": 4, "mdp_num_partitions": 3}, ("4 devices", "mdp_num_partitions=3")),
        ({"target": "qaic", "mos": 3}, ("mos=3", "power of two")),
        ({"target": "qaic", "olss": 2}, ("olss", "'ols'")),
        ({"target": "qaic", "ols": 3}, ("ols", "1, 2, 4, 8")),
        ({"target": "qaic", "aic_depth_first_mem": 33}, ("aic_depth_first_mem", "8 to 32")),
        ({"target": "qaic", "ddr_stats": 2}, ("ddr_stats", "True or False")),
        ({"target": "qaic", "mxfp6": True}, ("mxfp6", "'mxfp6_matmul'")),
        ({"target": "qaic", "aic_hw_version": "ai300"}, ("aic_hw_version", "ai100")),
        ({"target": "qaic", "aic_hw_version": "ai200", "sdk_profile": "legacy"}, ("ai200", "legacy")),
        ({"target": "qaic", "sdk_profile": "curent"}, ("sdk_profile", "'current'")),
        ({"target": "qaic", "node_precision_info": {"FP8": ["a"]}}, ("FP8", "FP16NodeInstanceNames")),
        ({"target": "qaic", "mdp_load_partition_config": {"stages": []}}, ("partitions",)),
        ({"target": "qaic", "mdp_load_partition_config": {"partitions": []}}, ("no partitions",)),
        ({"target": "qaic", "mdp_load_partition_config": TWO_DEVICES, "num_devices": 4}, ("2 devices", "4 are asked")),
        ({"target": "qaic", "mdp_load_partition_config": TWO_DEVICES, "num_cores": 12}, ("numCores=14", "12")),
        (
            {"target": "qaic", "mdp_load_partition_config": {**TWO_DEVICES, "connections": [{"devices": [0, 9]}]}},
            ("device 9", "no partition"),
        ),
        ({"target": "qaic", "device_group": 5.0}, ("device_group",)),
        ({"target": "qaic", "device_group": [-1]}, ("device_group", "-1")),
        ({"target": "qaic", "device_group": [True]}, ("device_group", "True")),
        ({"target": "qaic", "device_group": [0, "1"]}, ("device_group", "'1'")),
        ({"enable_qnn": "yes"}, ("enable_qnn", "qnn_config")),
        ({"target": "qaic", "mdp_load_partition_config": "nowhere.json"}, ("nowhere.json", "cannot be read")),
        ({"target": "qaic", "qnn_config": {}}, ("qnn_config", "target='qnn'")),
        ({"target": "qaic", "num_speculative_tokens": [0, 3], "ccl_enabled": True}, ("num_speculative_tokens",)),
        ({"target": "qaic", "num_speculative_tokens": -1}, ("num_speculative_tokens", "at least 0")),
        ({"target": "qaic", "prefill_only": "yes"}, ("prefill_only",)),
        ({"target": "host", "enable_qnn": True}, ("enable_qnn", "target='host'")),
        ({"target": "qaic", "allow_mxint8_mdp_io": True}, ("allow_mxint8_mdp_io",)),
        ({"target": "qaic", "mos": 0}, ("mos=0",)),
        ({"target": "qaic", "num_cores": 4, "mos": 8}, ("mos=8", "4 cores")),
    ],
)
def test_bad_options_are_refused_before_the_export(causal, options, words, monkeypatch):
    monkeypatch.setattr(causal, "_export", lambda *_: pytest.fail("exported first"))
    with pytest.raises(OptionError) as error:
        causal.compile(**options)
    one_sentence(error, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_len": (8, 16)}, ("single seq_len",)),
        ({"seq_len": (8,), "mxint8_kv_cache": True}, ("mxint8_kv_cache", "causal")),
        ({"ctx_len": 32}, ("ctx_len",)),
        ({"seq_len": (4096,)}, ("4096", "128 positions")),
    ],
)
def test_options_a_training_step_cannot_have(step, store, options, words):
    with pytest.raises(OptionError) as error:
        compile_export(store, step, "step", CompileOptions(target="qaic", dry_run=True, **options), [], silent)
    one_sentence(error, *words)


def test_a_dimension_without_a_size_is_named(dry, step, tmp_path):
    asked = request_for(dry, step, tmp_path / "package")
    (spec,) = asked.manifest.specializations
    loose = Specialization(spec.name, {k: v for k, v in spec.symbols.items() if k != "rows"})
    manifest = asked.manifest.replace(specializations=(loose,))
    options = asked.options.replace(dry_run=True)
    with pytest.raises(OptionError) as error:
        QaicTarget().compile(dataclasses.replace(asked, manifest=manifest, options=options))
    one_sentence(error, "'rows'")
    assert not list(asked.directory.iterdir())


def test_profile_by_hand(dry, step, tmp_path):
    asked = request_for(dry, step, tmp_path / "package")
    options = asked.options.replace(dry_run=True)
    request = dataclasses.replace(asked, options=options)
    QaicTarget(profile="current").compile(request)
    assert command(asked.directory)[0] == f"{EXEC}/qaic-compile"
    assert sizes(asked.directory)[0]["name"] == "Train"
    with pytest.raises(OptionError, match="legacy"):
        QaicTarget(profile="legcy")


def test_target_lists_what_a_training_graph_needs():
    assert [t.name for t in resolve(get_target("qaic").transforms("training", CompileOptions()))] == [
        "FixTrainingOps",
        "LowerOpset",
        "FP16Clip",
    ]
    queue = ("FixTrainingOps:profile=qaic", "LowerOpset:opset=17", "FP16Clip")
    assert get_target("qaic").transforms("training", CompileOptions()) == queue
    assert "LowerOpset:opset=17" in get_target("qaic").transforms("text-generation", CompileOptions(ctx_len=8))
    assert get_target("host").transforms("training", CompileOptions()) == ()

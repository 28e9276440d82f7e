"""The whole compile path against a strict stand-in of the vendor's tools, which refuses what they would refuse."""

import contextlib
import json
import random
import shutil
from pathlib import Path

import onnx
import pytest
import yaml
from stand_in import compiler, install, qnn_tools
from stand_in.errors import Refused

import QEfficient
from QEfficient.errors import QEfficientError, TargetUnavailableError
from QEfficient.store.digest import file_digest
from QEfficient.targets.manifest import Manifest

LENGTHS = {"prefill_seq_len": 8, "ctx_len": 32}


@pytest.fixture
def qnn_sdk(tmp_path, monkeypatch):
    root = install.install_qnn(tmp_path / "qnn", twice=True)
    monkeypatch.setenv("QNN_SDK_ROOT", str(root))
    return root


def checked(package: Path, tmp_path: Path, version=(1, 23), executable="qaic-compile") -> None:
    """Runs the stand-in in this process on a dry run's files; its refusal is the failure."""
    place = tmp_path / "checked"
    if place.exists():
        shutil.rmtree(place)
    shutil.copytree(package, place)
    arguments = json.loads((package / "command.json").read_text())["arguments"]
    assert Path(arguments[0]).name == executable
    binary = compiler.compile(executable, arguments[1:], place, version)
    assert binary.read_bytes().startswith(b"QEFFICIENT-STAND-IN")


def test_a_package_of_the_stand_in_says_what_it_is(models, sdk, capsys):
    package = models["causal"].compile(target="qaic", num_devices=4, mdp_num_partitions=2, **LENGTHS)
    manifest = Manifest.load(package)
    assert (manifest.stand_in, manifest.program, manifest.runtime["dry_run"]) == (True, "qpc/programqpc.bin", False)
    assert manifest.libraries["qaic"] == "qaic-compile 1.23.0"
    assert "nothing was compiled" in (package / "compiler.log").read_text()
    with pytest.raises(TargetUnavailableError, match="stand-in"):
        QEfficient.load(package)
    from QEfficient.cli.compile import summarize

    summarize(package)
    assert "stand-in" in capsys.readouterr().err


SCENARIOS = [
    ("causal", {}),
    ("causal", {"full_batch_size": 4, "kv_cache_batch_size": 6, "mxint8_kv_cache": True}),
    ("causal", {"full_batch_size": 2, "num_speculative_tokens": [0, 3]}),
    ("causal", {"ctx_len": 32, "comp_ctx_lengths_prefill": [16], "comp_ctx_lengths_decode": [24]}),
    ("causal", {"full_batch_size": 2, "comp_ctx_lengths_prefill": [16], "num_speculative_tokens": 2}),
    ("causal", {"num_devices": 4, "num_cores": 14, "allow_mxint8_mdp_io": True, "mxfp6_matmul": True}),
    ("causal", {"num_devices": 4, "mdp_num_partitions": 2, "full_batch_size": 2}),
    ("causal", {"node_precision_info": "norms", "aic_hw_version": "ai200"}),
    ("causal", {"prefill_only": False, "mos": 4, "ols": 2, "aic_enable_depth_first": True}),
    ("causal", {"sdk_profile": "1.21"}),
    ("adapters", {}),
]


@pytest.mark.parametrize(("model", "options"), SCENARIOS)
def test_the_stand_in_takes_every_scenario(models, tmp_path, model, options):
    package = models[model].compile(target="qaic", dry_run=True, **{**LENGTHS, **options})
    checked(package, tmp_path, version=(1, 21) if "sdk_profile" in options else (1, 23))


def test_older_compilers_and_encoders(models, tmp_path):
    checked(models["embedding"].compile(target="qaic", seq_len=[8, 16], dry_run=True), tmp_path)
    package = models["causal"].compile(target="qaic", dry_run=True, sdk_profile="legacy", **LENGTHS)
    checked(package, tmp_path, version=(1, 20), executable="qaic-exec")
    named = models["causal"].compile(target="qaic", dry_run=True, **LENGTHS)
    with pytest.raises(Refused, match="type must be string, but is object") as error:
        checked(named, tmp_path, version=(1, 21))
    assert error.value.code == 255


# ------------------------------------------------------------------ one export, three targets


def test_one_exported_graph_feeds_every_target(models, sdk, qnn_sdk, tmp_path):
    model = models["causal"]
    host = model.compile(**LENGTHS)
    before, at = file_digest(model.onnx_path), model.onnx_path
    card = model.compile(target="qaic", **LENGTHS)
    assert (model.onnx_path, file_digest(model.onnx_path)) == (at, before)
    qnn = model.compile(target="qnn", **LENGTHS)
    assert (model.onnx_path, file_digest(model.onnx_path)) == (at, before)
    manifests = [Manifest.load(package) for package in (host, card, qnn)]
    assert [m.target for m in manifests] == ["host", "qaic", "qnn"]
    assert [m.stand_in for m in manifests] == [False, True, True]
    # The weights exist once, whatever reads them.
    weights = {file_digest(next((p / "weights").glob("weights*"))) for p in (card, qnn)}
    assert len(weights) == 1
    assert file_digest(card / "model.onnx") == file_digest(qnn / "model.onnx")


def test_qnn_with_one_graph_and_files_of_its_own(models, qnn_sdk):
    options = {"target": "qnn", "mxint8_kv_cache": True, "num_devices": 2, "ctx_len": 32}
    one = models["causal"].compile(prefill_seq_len=1, **options)
    two = models["causal"].compile(prefill_seq_len=8, **options)
    assert Manifest.load(one).stand_in
    assert one != two
    graphs = [json.loads((p / "qnn_compile_backend.json").read_text())["graph_names"] for p in (one, two)]
    assert graphs == [["model"], ["model_configuration_1", "model_configuration_2"]]
    assert str(qnn_sdk) in (one / "qnn_compiler_config.json").read_text()
    assert not list(one.rglob("*.bin.bin"))


# ------------------------------------------------------------------ failures


def packages_in(models) -> set[Path]:
    return set(Path(models.home).glob("packages/*"))


@pytest.mark.parametrize(
    ("script", "limit", "words"),
    [
        ("echo parsing; echo cannot allocate >&2; mkdir qpc; exit 1", None, ("exit code 1", "cannot allocate", ".log")),
        ("mkdir qpc; echo half > qpc/programqpc.bin; kill -9 $$", None, ("SIGKILL", ".log")),
        ("mkdir qpc; sleep 30", 1, ("1 seconds", "compile_timeout", ".log")),
        ("echo '[json.exception.type_error.302] type must be string, but is object' >&2; exit 255", None,
         ("255", "sdk_profile='1.21'")),
        ("exit 0", None, ("wrote no qpc/programqpc.bin",)),
        ("mkdir qpc; : > qpc/programqpc.bin", None, ("empty",)),
    ],
)  # fmt: skip
def test_a_compiler_that_fails_leaves_its_log_and_nothing_else(models, sdk, script, limit, words):
    (sdk / "exec" / "qaic-compile").write_text(f"#!/bin/sh\n{script}\n")
    before = packages_in(models)
    with pytest.raises(QEfficientError) as error:
        models["causal"].compile(target="qaic", compile_timeout=limit, mos=16, **LENGTHS)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert packages_in(models) == before
    if ".log" in message:
        log = Path(message.rsplit(" ", 1)[1].rstrip("."))
        assert "$ " in log.read_text()
        log.unlink()


def test_a_compiler_that_is_too_old(models, sdk):
    install.install_qaic(sdk, version="1.11.0")
    with pytest.raises(TargetUnavailableError, match=r"1\.11\.0 is older"):
        models["causal"].compile(target="qaic", **LENGTHS)


def test_qnn_that_is_not_whole(models, qnn_sdk, monkeypatch):
    (qnn_sdk / "bin/x86_64-linux-clang/qairt-converter").unlink()
    with pytest.raises(TargetUnavailableError, match="lacks qairt-converter"):
        models["causal"].compile(target="qnn", **LENGTHS)
    monkeypatch.delenv("QNN_SDK_ROOT")
    with pytest.raises(TargetUnavailableError, match="QNN_SDK_ROOT"):
        models["causal"].compile(target="qnn", **LENGTHS)


def test_the_time_limit_makes_no_other_package(models, sdk):
    first = models["causal"].compile(target="qaic", **LENGTHS)
    assert models["causal"].compile(target="qaic", compile_timeout=100, **LENGTHS) == first


# ------------------------------------------------------------------ what the stand-in refuses


@pytest.fixture(scope="module")
def rich(models) -> Path:
    """A dry run with every kind of file."""
    return models["causal"].compile(
        target="qaic", dry_run=True, full_batch_size=4, num_devices=4, mdp_num_partitions=2, mos=2, ols=2,
        node_precision_info="norms", **LENGTHS,
    )  # fmt: skip


def mutate_command(draw: random.Random, words: list[str], place: Path) -> None:
    at = draw.randrange(len(words))
    flag, equals, value = words[at].partition("=")
    kind = draw.choice(["letter", "drop_needed", "twice", "value", "no_value", "unknown", "missing_file"])
    if kind == "letter":
        words[at] = flag[:-1] + ("z" if flag[-1] != "z" else "y") + equals + value
    elif kind == "drop_needed":
        needed = ("-aic-hw", "-m=", "-retained-state", "-aic-binary-dir", "-network-spec", "-aic-num-cores")
        words.remove(draw.choice([word for word in words if word.startswith(needed)]))
    elif kind == "twice":
        words.insert(at, words[at])
    elif kind == "value":
        bad = {"-aic-num-cores": "17", "-mos": "3.5", "-ols": "3", "-aic-hw-version": "ai99", "-aic-binary-dir": ""}
        name = draw.choice(sorted(bad))
        words[:] = [f"{name}={bad[name]}" if word.startswith(name + "=") else word for word in words]
    elif kind == "no_value":
        name = draw.choice(["-m", "-mos", "-aic-num-cores", "-aic-binary-dir", "-node-precision-info"])
        words[:] = [name if word.startswith(name + "=") else word for word in words]
    elif kind == "unknown":
        words.insert(
            at, draw.choice(["-mxfp6", "-split-model-io", "--mos=2", "-num-cores=4", "stray", "-aic-num-core=4"])
        )
    else:
        files = [word for word in words if word.endswith((".json", ".yaml", ".onnx"))]
        (place / draw.choice(files).split("=")[1]).unlink()


def mutate_json(draw: random.Random, path: Path) -> None:
    body = json.loads(path.read_text())
    if path.name == "specializations.json":
        entry = draw.choice(body["specializations"])
        sizes, symbol = entry["symbols"], draw.choice(["batch_size", "ctx_len", "full_batch_size", "seq_len"])
        change = draw.choice(["number", "drop", "zero", "extra", "word", "rename", "key", "flat"])
        if change == "rename":
            sizes["sequence_length"] = sizes.pop(symbol)
        elif change == "key":
            entry["Name"] = entry.pop("name")
        elif change == "flat":
            body["specializations"][0] = sizes
        elif change == "drop":
            del sizes[symbol]
        else:
            new = {"number": int(sizes[symbol]), "zero": "0", "extra": "8", "word": "eight"}[change]
            sizes["vocab" if change == "extra" else symbol] = new
    else:
        part = draw.choice(body["partitions"])
        change = draw.choice(["node", "repeat", "lost", "id", "cores", "link", "kind", "key", "swap"])
        if change == "node":
            part["nodeList"][draw.randrange(len(part["nodeList"]))] += "x"
        elif change == "repeat":
            part["nodeList"].append(part["nodeList"][0])
        elif change == "lost":
            part["nodeList"].pop(draw.randrange(len(part["nodeList"])))
        elif change == "id":
            part["devices"][0]["deviceId"] = 7
        elif change == "cores":
            part["devices"][0]["numCores"] = draw.choice([0, 17, "16"])
        elif change == "link":
            body["connections"][0]["devices"] = [0, 9]
        elif change == "kind":
            body["connections"][0]["type"] = "pcie"
        elif change == "key":
            part["nodes"] = part.pop("nodeList")
        else:
            first, last = body["partitions"]
            first["nodeList"], last["nodeList"] = last["nodeList"], first["nodeList"]
    path.write_text(json.dumps(body))


def mutate_yaml(draw: random.Random, path: Path) -> None:
    body = yaml.safe_load(path.read_text())
    if path.name == "custom_io.yaml":
        entry = draw.choice(body)
        change = draw.choice(["name", "kind", "key", "one_side", "twice", "whole"])
        if change == "name":
            entry["IOName"] += "x"
        elif change == "kind":
            entry["Precision"] = draw.choice(["fp16", "int4", 16])
        elif change == "key":
            entry["precision"] = entry.pop("Precision")
        elif change == "one_side":
            entry["Precision"] = "mxint8"
        elif change == "twice":
            body.append(dict(entry))
        else:
            entry["IOName"] = "input_ids"
    else:
        (key,) = body
        if draw.random() < 0.5:
            body["FP8NodeInstanceNames"] = body.pop(key)
        else:
            body[key][0] += "x"
    path.write_text(yaml.safe_dump(body))


def mutate_graph(draw: random.Random, path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    change = draw.choice(["opset", "ir", "pair", "shape", "type", "operator", "external", "cut"])
    state = next(v for v in model.graph.output if v.name == "past_key.1_RetainedState")
    if change == "opset":
        next(o for o in model.opset_import if o.domain == "").version = 23
    elif change == "ir":
        model.ir_version = 11
    elif change == "pair":
        state.name = "past_key.9_RetainedState"
    elif change == "shape":
        state.type.tensor_type.shape.dim[1].dim_value = 3
    elif change == "type":
        state.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    elif change == "operator":
        next(n for n in model.graph.node if n.op_type == "MatMul").domain = "my.own"
    elif change == "external":
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == "location").value = "weights/none.bin"
    if change == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.write_bytes(model.SerializeToString())


MUTATIONS = ["command"] * 40 + ["json"] * 30 + ["yaml"] * 16 + ["graph"] * 14


def test_the_stand_in_refuses_a_hundred_mutations(rich, tmp_path):
    """Whatever is changed in a command or a file, the stand-in says so; the unchanged ones it takes (first line)."""
    checked(rich, tmp_path)
    arguments = json.loads((rich / "command.json").read_text())["arguments"][1:]
    mutated = ["specializations.json", "mdp_disagg_4d_2p.json", "custom_io.yaml", "node_precision.yaml", "model.onnx"]
    taken = []
    for seed, kind in enumerate(MUTATIONS):
        draw, place = random.Random(seed), tmp_path / f"m{seed}"
        place.mkdir()
        (place / "weights").symlink_to(rich / "weights")
        for name in mutated:
            shutil.copyfile(rich / name, place / name)
        words = list(arguments)
        if kind == "command":
            mutate_command(draw, words, place)
        elif kind == "json":
            mutate_json(draw, place / draw.choice(mutated[:2]))
        elif kind == "yaml":
            mutate_yaml(draw, place / draw.choice(mutated[2:4]))
        else:
            mutate_graph(draw, place / "model.onnx")
        with contextlib.suppress(Refused):
            compiler.compile("qaic-compile", words, place, (1, 23))
            taken.append((seed, kind))
        assert taken or not (place / "qpc").exists()
        shutil.rmtree(place)
    assert taken == []


def test_the_qnn_stand_in_refuses(models, tmp_path, qnn_sdk):
    package = models["causal"].compile(target="qnn", dry_run=True, mxint8_kv_cache=True, **LENGTHS)
    first, second = json.loads((package / "command.json").read_text())["commands"]

    def attempt(words: list[str], edit=None, tool=qnn_tools.convert) -> None:
        place = tmp_path / "place"
        if place.exists():
            shutil.rmtree(place)
        shutil.copytree(package, place)
        if tool is qnn_tools.generate:
            qnn_tools.convert(first[1:], place)
        if edit is not None:
            file, old, new = edit
            text = (place / file).read_text()
            assert old in text
            (place / file).write_text(text.replace(old, new, 1))
        tool(words, place)

    attempt(first[1:])
    attempt(second[1:], tool=qnn_tools.generate)
    config = "custom_io_config.yaml"
    for edit in (
        (config, "DataType: int64", "DataType: float32"),
        (config, "DataType: uint8", "DataType: mxint8"),
        (config, "Name: past_key.0", "Name: past_key.9"),
        (config, "(1, 8), (1, 1)", "(1, 8), (1, 1), (2, 1)"),
        (config, "(1, 2, 32, 16)", "(1, 2, 32)"),
        (config, "Output Tensor", "Outputs Tensor"),
    ):
        with pytest.raises(Refused):
            attempt(first[1:], edit)
    for words in ([*first[1:], "--float"], [w for w in first[1:] if w != "AIC"], [*first[1:], "--config", "again"]):
        with pytest.raises(Refused):
            attempt(words)
    backend = "qnn_compile_backend.json"
    for edit in (
        (backend, '"model_configuration_2"', '"model_configuration_3"'),
        (backend, '"compiler_num_of_cores":16', '"compiler_num_of_cores":"16"'),
        (backend, "compiler_stat_level", "compiler_stats_level"),
        ("qnn_compiler_config.json", "libQnnAicNetRun", "libQnnNetRun"),
        ("qnn_data_format_config.json", "past_value.1", "past_value.7"),
        ("model.dlc", "QEFFICIENT", "SOMETHING"),
    ):
        with pytest.raises(Refused):
            attempt(second[1:], edit, qnn_tools.generate)

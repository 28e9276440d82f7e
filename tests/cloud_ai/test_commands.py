"""``qefficient compile --target qaic --dry-run`` and ``qefficient check``, on an exported graph."""

import json

import pytest
from typer.testing import CliRunner

from QEfficient.cli.main import app

FLAGS = ["--target", "qaic", "--prefill-seq-len", "32", "--ctx-len", "128"]


def run(*words) -> object:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def graph(models):
    return models["causal"].export()


def test_a_dry_run_writes_every_file_and_prints_the_command(graph, models, tmp_path):
    place = tmp_path / "out"
    result = run(
        "compile", graph, *FLAGS, "--dry-run", "--output", place, "--num-cores", 14, "--num-devices", 4,
        "--mxfp6-matmul", "--mxint8-kv-cache", "--compiler-flag", "ols=2", "--compiler-flag", "ddr-stats",
        "--decode-only", "--explain", "--cache-dir", models.home,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = {path.name for path in place.iterdir()}
    assert {"model.onnx", "specializations.json", "custom_io.yaml", "mdp_ts_4.json", "command.txt"} <= written
    command, path = result.stdout.splitlines()[-2:]
    assert path == str(place)
    assert command == (
        "/opt/qti-aic/exec/qaic-compile -aic-hw -aic-hw-version=ai100 -m=model.onnx -retained-state -convert-to-fp16 "
        "-mxfp6-matmul -aic-num-cores=14 -ols=2 -ddr-stats -mdp-load-partition-config=mdp_ts_4.json "
        "-network-specialization-config=specializations.json -custom-IO-list-file=custom_io.yaml -aic-binary-dir=qpc"
    )
    assert "nothing was compiled" in result.stderr
    assert "Device memory (estimate)" in result.stderr
    (entry,) = json.loads((place / "specializations.json").read_text())["specializations"]
    assert entry["name"] == "Decode"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--compiler-flag", "olss=2"], ("olss", "'ols'")),
        (["--compiler-flag", "=2"], ("has no name",)),
        (["--compiler-flag", "ols=3"], ("1, 2, 4, 8",)),
        (["--num-devices", "4", "--mdp-num-partitions", "3"], ("4 devices", "3 stages")),
        (["--node-precision-info", "nowhere.yaml"], ("nowhere.yaml", "cannot be read")),
    ],
)
def test_a_wrong_flag_is_one_sentence(graph, flags, words):
    result = run("compile", graph, *FLAGS, "--dry-run", *flags)
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words), result.stderr


def test_check_says_whether_it_would_compile(graph, models):
    good = run("check", graph, *FLAGS, "--cache-dir", models.home)
    assert good.exit_code == 0, good.output
    assert "No documented rule is broken" in good.stdout
    raw = run("check", graph, *FLAGS, "--raw", "--cache-dir", models.home)
    assert raw.exit_code == 1
    assert "opset 23 is above 18" in raw.stdout
    assert "LowerOpset" in raw.stdout
    assert run("check", graph, "--ctx-len", 128).exit_code == 2


def test_doctor_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(run("doctor").stdout.split())
    assert "QNN_SDK_ROOT" in text
    assert "qaicrt" in text

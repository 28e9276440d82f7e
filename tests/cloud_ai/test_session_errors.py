"""What goes wrong on a card, or before there is one: one sentence each, and the session usable or clearly not."""

import logging
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from stand_in import install
from stand_in.runtime import QStatus
from test_card_session import PROMPTS, generated

import QEfficient
from QEfficient.cli.main import app
from QEfficient.cloud import execute
from QEfficient.errors import (
    OptionError,
    OutOfMemoryError,
    PackageError,
    QEfficientError,
    TargetUnavailableError,
)
from QEfficient.targets.base import CardSettings
from QEfficient.targets.manifest import Manifest
from QEfficient.targets.qaic import QaicTarget

LENGTHS = {"prefill_seq_len": 8, "ctx_len": 64}


@pytest.fixture
def package(models, card) -> Path:
    return models["causal"].compile(target="qaic", **LENGTHS)


@pytest.fixture
def spread(models, card) -> Path:
    return models["causal"].compile(target="qaic", num_devices=4, **LENGTHS)


def refused(error: type[QEfficientError], package: Path, *words: str, **options) -> None:
    with pytest.raises(error) as raised:
        QEfficient.load(package, **options)
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_without_the_platform_sdk(package, sdk):
    shutil.rmtree(sdk / "dev")
    target = QaicTarget(sdk)
    check = target.check()
    assert (check.can_compile, check.can_run) == (True, False)
    assert all(word in check.missing[0] for word in ("Platform SDK", "qaicrt", "QAicApi_pb2", str(sdk / "dev")))
    refused(TargetUnavailableError, package, "stand-in", "Apps SDK")
    real = Manifest.load(package).replace(stand_in=False)
    with pytest.raises(TargetUnavailableError, match=r"qaicrt is not in .*Platform SDK"):
        target.load(package, real)
    # A module for another Python is there, and cannot be imported.
    install.install_runtime(sdk)
    module = next((sdk / "dev" / "lib").rglob("qaicrt.py"))
    module.rename(module.with_name("qaicrt.cpython-38-x86_64-linux-gnu.so"))
    with pytest.raises(TargetUnavailableError, match=r"qaicrt\.cpython-38.* is not for Python"):
        target.load(package, real)
    module.write_text("import a_library_that_is_not_here\n")
    with pytest.raises(TargetUnavailableError, match=r"cannot be imported.*a_library_that_is_not_here"):
        target.load(package, real)


def test_a_stand_in_and_a_card_are_never_mixed(package, sdk, caplog):
    with caplog.at_level(logging.WARNING), QEfficient.load(package):
        assert "nothing it gives comes from a card" in caplog.text
    with pytest.raises(TargetUnavailableError, match="is a stand-in that has none"):
        QaicTarget(sdk).load(package, Manifest.load(package).replace(stand_in=False))


def test_what_doctor_says_of_the_runtime(card, sdk):
    assert QaicTarget(sdk).check().can_run
    install.install_runtime(sdk, devices=0)
    assert QaicTarget(sdk).check().missing == ("to run: no device is ready; see qaic-util -q",)
    (sdk / "tools" / "qaic-util").unlink()
    assert "lists no devices" in QaicTarget(sdk).check().missing[0]


def test_a_damaged_program(package, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(package, damaged)
    binary = damaged / "qpc" / "programqpc.bin"
    binary.write_bytes(binary.read_bytes()[:-20] + b"x" * 20)
    refused(PackageError, damaged, "changed after it was compiled")
    refused(PackageError, damaged, "holds no program", "compiler.log", verify=False)


def test_a_program_of_other_sizes(models, package, tmp_path):
    other = models["causal"].compile(target="qaic", prefill_seq_len=4, ctx_len=64)
    mixed = tmp_path / "mixed"
    shutil.copytree(package, mixed)
    shutil.copyfile(other / "qpc" / "programqpc.bin", mixed / "qpc" / "programqpc.bin")
    refused(PackageError, mixed, "has no sizes for Prefill", verify=False)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([0], OptionError, ("4 devices", "[0]")),
        ([0, 1, 2, 2], OptionError, ("different ids",)),
        ([0, 1, 2, 9], TargetUnavailableError, ("devices 0, 1, 2, 9", "QS_NODEV", "no such device")),
        ([], OptionError, ("device_ids",)),
        ([0, 1, 2, -1], OptionError, ("device_ids",)),
    ],
)
def test_a_wrong_group_of_devices(spread, ids, error, words):
    refused(error, spread, *words, device_ids=ids)


def test_any_four_devices(spread, card, models):
    with QEfficient.load(spread, device_ids=[3, 1, 0, 2]) as package:
        tokens = generated(package, PROMPTS[:1])
    with QEfficient.load(models["causal"].compile(**LENGTHS)) as host:
        assert generated(host, PROMPTS[:1]) == tokens
        with pytest.raises(OptionError, match="runs on the host"):
            QEfficient.load(host.directory, device_ids=[0])


@pytest.mark.parametrize(
    ("call", "fault", "error", "words"),
    [
        ("load", QStatus.QS_BUSY, TargetUnavailableError, ("loading the program on device 0", "busy")),
        ("load", QStatus.QS_PERM, TargetUnavailableError, ("may not use",)),
        ("load", QStatus.QS_NOMEM, OutOfMemoryError, ("memory on the device",)),
        ("activate", QStatus.QS_NOSPC, TargetUnavailableError, ("activating", "num_cores")),
        ("activate", RuntimeError("driver is gone\nat 0x7f"), TargetUnavailableError, ("driver is gone",)),
        ("getIoDescriptor", QStatus.QS_ERROR, PackageError, ("holds no program",)),
    ],
)
def test_a_device_that_refuses(package, card, call, fault, error, words):
    card.faults[call] = fault
    refused(error, package, *words)
    with QEfficient.load(package):
        pass


def test_no_device_at_all(package, card):
    card.devices.clear()
    refused(TargetUnavailableError, package, "no devices", "qaic-util")


@pytest.mark.parametrize("call", ["setData", "enqueue", "waitForCompletion", "getData"])
def test_a_step_that_fails_leaves_a_session_that_begins_anew(package, card, call):
    with QEfficient.load(package) as loaded:
        expected = generated(loaded, PROMPTS[3:])
        card.faults[call] = QStatus.QS_DEV_ERROR
        with pytest.raises(QEfficientError, match="Prefill on device 0 failed with QS_DEV_ERROR: the device failed"):
            generated(loaded, PROMPTS[3:])
        one = {"input_ids": np.array([[5]]), "position_ids": np.array([[0]])}
        with pytest.raises(QEfficientError, match=r"unknown: call begin\(\)"):
            loaded.session.run(one, "Decode")
        assert generated(loaded, PROMPTS[3:]) == expected


def test_a_device_that_does_not_answer(package, card):
    """Given up after the time asked for, whatever status the runtime returns; then the next call may work."""
    with QEfficient.load(package, timeout=0.2) as loaded:
        card.hang, began = 30.0, time.monotonic()
        with pytest.raises(QEfficientError, match=r"longer than 0\.2 seconds.*larger timeout"):
            generated(loaded, PROMPTS[:1])
        assert time.monotonic() - began < 5
        card.hang = 0.0
        card.faults["waitForCompletion"] = QStatus.QS_TIMEDOUT
        with pytest.raises(QEfficientError, match="larger timeout"):
            generated(loaded, PROMPTS[:1])
        assert len(generated(loaded, PROMPTS[:1])[0]) == 8
    with pytest.raises(OptionError, match="timeout"):
        QEfficient.load(package, timeout=0)


def test_cores_can_be_lent_and_taken_back(package, card):
    session = QaicTarget().load(package, Manifest.load(package), card=CardSettings((2,)))
    one = {"input_ids": np.array([[5]]), "position_ids": np.array([[0]])}
    session.begin({"batch_size": 1, "ctx_len": 64})
    logits = session.run(one, "Decode")["logits"]
    session.deactivate()
    with pytest.raises(QEfficientError, match="inactive"):
        session.run(one, "Decode")
    session.activate()
    with pytest.raises(QEfficientError, match=r"begin\(\)"):
        session.run(one, "Decode")
    session.begin({"batch_size": 1, "ctx_len": 64})
    np.testing.assert_array_equal(session.run(one, "Decode")["logits"], logits)
    session.close()
    session.close()


@pytest.mark.parametrize("program", ["qefficient", "cloud"])
def test_a_wrong_group_on_the_command_line(package, program, capsys):
    rest = ["--prompt", "x", "--device-group", "[0,1]"]
    call, words = (execute.main, ["--qpc-path"]) if program == "cloud" else (app, ["execute"])
    with pytest.raises(SystemExit) as stopped:
        call([*words, str(package), *rest])
    assert stopped.value.code
    assert "1 device, and device_ids is [0, 1]" in " ".join(capsys.readouterr().err.split())

"""Two processes under `torchrun` train what one process with the doubled batch trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ddp_worker import COUNTS, refine
from safetensors.numpy import load_file

BATCH = 2


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(outputs of one process, outputs of two), a directory per data set."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for name, count in COUNTS.items():
        refine(str(tiny_checkpoint), one / name, 2 * BATCH, count)
    worker = Path(__file__).with_name("ddp_worker.py")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker),
        str(tiny_checkpoint), str(two), str(BATCH),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return one, two


def logged(output: Path, key: str) -> list[float]:
    lines = (output / "logs" / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


@pytest.mark.parametrize(("name", "rest"), [("even", 0), ("uneven", 3), ("idle", 1)])
def test_how_many_rows_the_last_batch_has(runs: tuple[Path, Path], name: str, rest: int) -> None:
    report = json.loads((runs[1] / name / "data_report.json").read_text())
    assert report["splits"]["train"]["rows"] % (2 * BATCH) == rest


@pytest.mark.parametrize("name", COUNTS)
def test_the_same_adapter(runs: tuple[Path, Path], name: str) -> None:
    one, two = (load_file(run / name / "adapter_model.safetensors") for run in runs)
    assert one.keys() == two.keys()
    worst = max(float(abs(one[key] - two[key]).max()) for key in one)
    assert worst <= 1e-5
    first = load_file(sorted((runs[0] / name).glob("checkpoint-*"))[0] / "adapter_model.safetensors")
    assert max(float(abs(first[key] - one[key]).max()) for key in one) > 1e-3  # it moved


@pytest.mark.parametrize("name", COUNTS)
def test_the_same_losses(runs: tuple[Path, Path], name: str) -> None:
    """Per trained token, over both ranks; also of the evaluation, whose rows do not divide evenly."""
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        one, two = (logged(run / name, key) for run in runs)
        assert len(one) == len(two) > 0
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", COUNTS)
def test_everything_is_written_once(runs: tuple[Path, Path], name: str) -> None:
    """The same files as one process writes, but for the random state, which every rank has."""
    one, two = (
        {str(path.relative_to(run / name)) for path in (run / name).rglob("*") if path.is_file()} for run in runs
    )
    ranks = {path for path in two if "rng_state_" in path}
    assert {path.replace("rng_state.pth", "rng_state_0.pth") for path in one} | {
        path.replace("rng_state.pth", "rng_state_1.pth") for path in one
    } == two
    assert len(ranks) == 4
    steps = set(logged(runs[1] / name, "step"))
    assert min(steps) == 0, "no evaluation before the first step"
    assert len(logged(runs[1] / name, "loss")) == len(steps - {0})


def test_both_ranks_did_every_step(runs: tuple[Path, Path]) -> None:
    reports: list[Any] = [json.loads((runs[1] / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0] == reports[1]
    assert reports[0]["world"] == 2
    assert reports[0]["steps"]["even"] == [1, 2, 3, 4, 5, 6]

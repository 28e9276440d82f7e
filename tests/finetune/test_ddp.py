"""Two processes under `torchrun`, as on two hosts, train what one process with the doubled batch trains.

The "hosts" are two `torchrun` agents on this machine that meet at a port, with one process each. One process is killed
in the middle of a run: both agents start theirs anew, and the run continues from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ddp_worker import COUNTS, KILL_STEP, KILLED, LORA, refine, refine_killed, rows
from safetensors.numpy import load_file
from typer.testing import CliRunner

from QEfficient.cli.main import app
from QEfficient.errors import OptionError
from QEfficient.finetune import ranks

BATCH = 2


def two_hosts(words: Sequence[str], restarts: int = 0) -> list[tuple[str, str]]:
    """What two `torchrun` agents of one process each print: (stdout, stderr) of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend",
        "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--max-restarts", str(restarts), *words,
    ]  # fmt: skip
    # Of its own for every attempt is the store in which the processes find each other: pytorch#135712.
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    agents = [subprocess.Popen(command, **options) for _ in range(2)]
    try:
        printed = [agent.communicate(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    for agent, (_, stderr) in zip(agents, printed, strict=True):
        assert agent.returncode == 0, stderr[-4000:]
    return printed


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(outputs of one process, outputs of two), a directory per data set. The two come first: nothing is cached."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    worker = Path(__file__).with_name("ddp_worker.py")
    two_hosts([str(worker), str(tiny_checkpoint), str(two), str(BATCH)], restarts=1)
    refine_killed(str(tiny_checkpoint), one, 2 * BATCH)
    for name, count in COUNTS.items():
        refine(str(tiny_checkpoint), one / name, 2 * BATCH, count)
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
    assert reports[0].pop("reduced") == reports[1].pop("reduced")
    assert reports[0] == reports[1]
    assert reports[0]["world"] == 2
    assert reports[0]["steps"]["even"] == [1, 2, 3, 4, 5, 6]


def test_only_gradients_of_the_adapter_are_exchanged(runs: tuple[Path, Path]) -> None:
    """Once per optimizer step, not per micro-batch: as many bytes as the adapter has in float32."""
    reduced = json.loads((runs[1] / "rank-0.json").read_text())["reduced"]
    adapter = load_file(runs[1] / "even" / "adapter_model.safetensors")
    steps = sum(len(json.loads((runs[1] / "rank-0.json").read_text())["steps"][name]) for name in COUNTS)
    assert sum(reduced) == steps * sum(4 * tensor.size for tensor in adapter.values())


def test_the_step_is_captured_once(runs: tuple[Path, Path]) -> None:
    """The other process waits for it, and so do both after the restart."""
    assert len((runs[1] / "captures").read_text().split()) == 1


def test_a_killed_process_is_replaced(runs: tuple[Path, Path]) -> None:
    """Every process starts anew, the run goes on after its last checkpoint and ends as if nothing had happened."""
    assert (runs[1] / "died").is_file()
    one, two = (load_file(run / KILLED / "adapter_model.safetensors") for run in runs)
    assert max(float(abs(one[key] - two[key]).max()) for key in one) <= 1e-5
    for rank in (0, 1):
        assert json.loads((runs[1] / f"rank-{rank}.json").read_text())["killed"] == [KILL_STEP, 5, 6]
    assert {name.name for name in (runs[1] / KILLED).glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def test_the_command_on_two_hosts(tiny_checkpoint: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    """`python -m QEfficient.finetune` on both; one of them speaks, and the adapter is that of one process."""
    data, file = tmp_path / "rows.jsonl", tmp_path / "run.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(13)))
    options = {
        "model_id": str(tiny_checkpoint), "dataset_name": str(data), "max_ctx_len": 64, "max_steps": 4, "seed": 1,
        "gradient_accumulation_steps": 2, "learning_rate": 5e-4, "num_cores": 1, "batch_size": BATCH,
        "disable_tqdm": True, "train_frac": 1.0, "lora_config": LORA, "output_dir": str(tmp_path / "two"),
    }  # fmt: skip
    file.write_text(yaml.safe_dump(options))
    printed = two_hosts(["-m", "QEfficient.finetune", str(file)])
    assert sorted(stdout.strip() for stdout, _ in printed) == ["", str(tmp_path / "two")]
    for said in ("train: 13 of 13 rows", "first step against torch", "saved to"):
        assert sum(said in stderr for _, stderr in printed) == 1, said
    words = [str(file), f"batch_size={2 * BATCH}", f"output_dir={tmp_path / 'one'}"]
    result = CliRunner().invoke(app, ["finetune", *words])
    assert result.exit_code == 0, result.output
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert max(float(abs(one[key] - two[key]).max()) for key in one) <= 1e-6
    assert max(float(abs(one[key]).max()) for key in one if "lora_B" in key) > 1e-3  # it moved


def test_a_host_that_does_not_see_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process has checkpoints and the lock; here the directory is empty."""
    monkeypatch.setattr(ranks, "agreed", lambda value: (["checkpoint-3"], True))
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 1)
    with pytest.raises(OptionError, match=r"rank 1\) does not see: put output_dir on a file system"):
        ranks.shared_checkpoints(tmp_path)
    (tmp_path / ranks.LOCK).touch()
    assert ranks.shared_checkpoints(tmp_path) == [tmp_path / "checkpoint-3"]

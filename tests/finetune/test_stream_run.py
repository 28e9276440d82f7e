"""Runs on streams: the same weights as on the rows, the same bits after a stop, and what a checkpoint notes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from transformers import TrainerCallback

from QEfficient.errors import PackageError
from QEfficient.finetune import QEffConfig, QEfficient, QEffTrainingArgs

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from resume_test import differences

STEPS = 9
ADAPTER = "adapter_model.safetensors"


class Stops(TrainerCallback):
    """Ends the run the hard way after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def refine(checkpoint: Path, rows: Any, output: Path, *callbacks: Any, **options: Any) -> QEfficient:
    """46 rows in batches of 5, two to a step: nine steps are almost two passes, with a window across them."""
    what = {"streaming": True, "shuffle_buffer_size": 12, "packing": False, "train_frac": 1.0}
    what = {name: options.pop(name, value) for name, value in what.items()}
    if not what["streaming"]:
        del what["shuffle_buffer_size"]
    settings: dict[str, Any] = {
        "max_steps": STEPS, "batch_size": 5, "gradient_accumulation_steps": 2, "learning_rate": 5e-3, "save_steps": 1,
        "logging_steps": 1, "num_cores": 1, "validate": False, "plot": False, "disable_tqdm": True,
    }  # fmt: skip
    config = QEffConfig(str(checkpoint), str(rows), max_ctx_len=64, **what)
    run = QEfficient(config, QEffTrainingArgs(output, **{**settings, **options}), callbacks=callbacks)
    run.refine(load=False, say=lambda message: None)
    return run


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run."""
    output = tmp_path_factory.mktemp("stream") / "run"
    refine(tiny_checkpoint, rows_file, output)
    return output


def test_one_pass_in_order_trains_what_the_rows_train(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    options = {
        "train_sampling_strategy": "sequential", "max_steps": 10, "gradient_accumulation_steps": 1,
        "save_strategy": "no",
    }  # fmt: skip
    for name, streaming in (("stream", True), ("rows", False)):
        refine(tiny_checkpoint, rows_file, tmp_path / name, streaming=streaming, **options)
    one, other = (load_file(tmp_path / name / ADAPTER) for name in ("stream", "rows"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_stopped_run_continues_to_the_same_bits(
    whole: Path, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path, step: int
) -> None:
    """In the first pass, at its last batches, and in the second."""
    with pytest.raises(KeyboardInterrupt):
        refine(tiny_checkpoint, rows_file, tmp_path / "run", Stops(step))
    refine(tiny_checkpoint, rows_file, tmp_path / "run")
    assert differences(whole, tmp_path / "run", STEPS) == []


def test_a_checkpoint_notes_where_the_stream_was(
    whole: Path, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path
) -> None:
    """46 rows make ten batches, the last of one row: batch 8 of the first pass and batch 2 of the second."""
    places = [json.loads((whole / f"checkpoint-{step}" / "stream_position.json").read_text()) for step in (4, 6)]
    assert [(at["batch"], at["epoch"], at["first"], at["taken"]) for at in places] == [(8, 0, 36, 4), (12, 1, 0, 10)]
    output = tmp_path / "run"
    shutil.copytree(whole, output, symlinks=True)
    for step in range(5, STEPS + 1):
        shutil.rmtree(output / f"checkpoint-{step}")
    position = output / "checkpoint-4" / "stream_position.json"
    kept = position.read_text()
    for damaged in ("{", '{"batch": -1}', "[]"):
        position.write_text(damaged)
        with pytest.raises(PackageError, match=r"stream_position.json is damaged"):
            refine(tiny_checkpoint, rows_file, output)
    # Without it, rows are read from the beginning: slower, and to the same bits.
    position.unlink()
    refine(tiny_checkpoint, rows_file, output)
    assert differences(whole, output, STEPS) == []
    assert kept


def test_rows_left_out_are_said_at_the_end(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "elm", "completion": "elm " * (n % 3)} for n in range(12)]
    said: list[Any] = []
    config = QEffConfig(str(tiny_checkpoint), rows, max_ctx_len=64, streaming=True)
    args = QEffTrainingArgs(
        tmp_path / "run", max_steps=2, batch_size=4, num_cores=1, validate=False, plot=False, disable_tqdm=True
    )
    QEfficient(config, args).refine(load=False, say=said.append)
    assert "rows that were left out of the stream: 4 × empty" in said


def test_an_estimate_of_a_stream(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    from QEfficient.finetune.estimate import estimate_run

    config = QEffConfig(str(tiny_checkpoint), str(rows_file), streaming=True, packing=True, max_ctx_len=64)
    run = QEfficient(config, QEffTrainingArgs(tmp_path / "run", max_steps=7, batch_size=2, num_cores=1))
    found = estimate_run(run)
    assert found.steps == 7
    assert found.peak_mb > found.step_mb > 0

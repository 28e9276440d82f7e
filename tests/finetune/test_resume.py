"""A killed run continues to the same bits; what it left half-written is gone; foreign directories are refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from step_models import base_model
from tiny_models import save_tiny, tiny_tokenizer
from transformers import TrainerCallback

from QEfficient.errors import ArtifactWriteError, OptionError, PackageError, TrainingError
from QEfficient.finetune import QEffConfig, QEfficient, QEffTrainingArgs

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from resume_test import differences, resume_rounds

STEPS = 12
ADAPTER = "adapter_model.safetensors"
COMMAND = [str(Path(sys.executable).with_name("qefficient")), "finetune"]


def config(checkpoint: Path, rows: Path, **options: Any) -> QEffConfig:
    return QEffConfig(model_id=str(checkpoint), dataset_name=str(rows), max_ctx_len=64, train_frac=1.0, **options)


def arguments(output: Path, **options: Any) -> QEffTrainingArgs:
    """39 rows in micro-batches of 5, three to a step: the last window of every epoch is short."""
    settings: dict[str, Any] = {
        "max_steps": STEPS, "batch_size": 5, "gradient_accumulation_steps": 3, "learning_rate": 5e-3, "save_steps": 1,
        "logging_steps": 1, "num_cores": 1, "validate": False, "plot": False, "disable_tqdm": True,
    }  # fmt: skip
    return QEffTrainingArgs(output, **{**settings, **options})


def refine(checkpoint: Path, rows: Path, output: Path, *callbacks: TrainerCallback, **options: Any) -> QEfficient:
    run = QEfficient(config(checkpoint, rows), arguments(output, **options), callbacks=callbacks)
    run.refine(load=False, say=lambda message: None)
    return run


class Steps(TrainerCallback):
    """Notes the steps it saw; stops the run the hard way at one of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.done: list[int] = []
        self.stop_after = stop_after

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.done.append(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    refine(tiny_checkpoint, rows_file, output)
    return output


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run as it was after step 5."""
    output = tmp_path / "run"
    shutil.copytree(whole, output, symlinks=True)
    for step in range(6, STEPS + 1):
        shutil.rmtree(output / f"checkpoint-{step}")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (output / name).unlink()
    return output


# ---------------------------------------------------------------------------------- the same bits


def test_killed_at_random_moments(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    """Also with warm-up, cosine decay and rotation of checkpoints; `make resume-test` does it ten times."""
    outcome = resume_rounds(tiny_checkpoint, str(rows_file), tmp_path, kills=3, steps=16, seed=1)
    assert outcome.problems == []
    assert outcome.kills == 3
    assert all(0 < step < 16 for step in outcome.continued_from)


def test_the_command_killed_and_repeated(whole: Path, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    """kill -9 of ``qefficient finetune`` in a process group of its own; the same command line continues."""
    output = tmp_path / "run"
    command = [
        *COMMAND, str(tiny_checkpoint), "--dataset", str(rows_file), "--output", str(output), "--steps", str(STEPS),
        "--batch-size", "5", "--accumulation", "3", "--lr", "5e-3", "--max-ctx-len", "64", "--no-validate",
    ]  # fmt: skip
    for setting in ("train_frac=1.0", "save_steps=1", "num_cores=1", "plot=false"):
        command += ["--set", setting]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (output / "checkpoint-3").exists():
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert not (output / "adapter_model.safetensors").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "continuing from" in again.stderr
    assert again.stdout.strip() == str(output)
    assert differences(whole, output, STEPS) == []


def test_an_interrupted_run_continues_in_the_same_process(
    whole: Path, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Ctrl-C right after a checkpoint; every step is done once."""
    first, second = Steps(stop_after=7), Steps()
    with pytest.raises(KeyboardInterrupt):
        refine(tiny_checkpoint, rows_file, tmp_path / "run", first)
    refine(tiny_checkpoint, rows_file, tmp_path / "run", second)
    assert (first.done, second.done) == (list(range(1, 8)), list(range(8, STEPS + 1)))
    assert differences(whole, tmp_path / "run", STEPS) == []


@pytest.mark.parametrize("step", [2, 3, 5])
def test_from_a_chosen_checkpoint(
    whole: Path, stopped: Path, tiny_checkpoint: Path, rows_file: Path, step: int
) -> None:
    """In the middle of an epoch (2, 5) and at its end (3)."""
    seen = Steps()
    refine(tiny_checkpoint, rows_file, stopped, seen, resume_from_checkpoint=str(stopped / f"checkpoint-{step}"))
    assert seen.done == list(range(step + 1, STEPS + 1))
    assert differences(whole, stopped, STEPS) == []


def test_half_written_leftovers_are_ignored_and_removed(
    whole: Path, stopped: Path, tiny_checkpoint: Path, rows_file: Path
) -> None:
    """A staging directory, an old one moved aside, and a directory named as a checkpoint that has no state."""
    shutil.copytree(stopped / "checkpoint-4", stopped / ".saving-checkpoint-6")
    (stopped / ".saving-checkpoint-6" / "trainer_state.json").write_text("{")
    shutil.copytree(stopped / "checkpoint-4", stopped / ".old-checkpoint-5")
    (stopped / "checkpoint-9").mkdir()
    (stopped / "checkpoint-9" / "adapter_model.safetensors").write_bytes(b"")
    seen = Steps()
    refine(tiny_checkpoint, rows_file, stopped, seen)
    assert seen.done == list(range(6, STEPS + 1))
    assert differences(whole, stopped, STEPS) == []


def test_a_finished_run_has_nothing_to_do(whole: Path, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    """It ends in the middle of an epoch: no step more than asked for."""
    output = tmp_path / "run"
    shutil.copytree(whole, output, symlinks=True)
    seen = Steps()
    run = refine(tiny_checkpoint, rows_file, output, seen)
    assert seen.done == []
    assert run.trainer is not None
    assert run.trainer.state.global_step == STEPS
    assert differences(whole, output, STEPS) == []


def test_a_finished_run_can_be_made_longer(whole: Path, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output, symlinks=True)
    seen = Steps()
    refine(tiny_checkpoint, rows_file, output, seen, max_steps=STEPS + 3)
    assert seen.done == list(range(STEPS + 1, STEPS + 4))


def test_what_does_not_train_leaves_an_earlier_run_alone(stopped: Path, tiny_checkpoint: Path, rows_file: Path) -> None:
    """A dry run, and a run that is refused, although both would overwrite."""
    before = sorted(path.name for path in stopped.glob("checkpoint-*"))
    assert before
    refine(tiny_checkpoint, rows_file, stopped, Steps(), overwrite_output_dir=True, dry_run=True)
    with pytest.raises(OptionError, match="eval_strategy needs evaluation rows"):
        refine(tiny_checkpoint, rows_file, stopped, Steps(), overwrite_output_dir=True, eval_strategy="epoch")
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == before


def test_overwriting_starts_anew(whole: Path, stopped: Path, tiny_checkpoint: Path, rows_file: Path) -> None:
    seen = Steps()
    refine(tiny_checkpoint, rows_file, stopped, seen, overwrite_output_dir=True)
    assert seen.done == list(range(1, STEPS + 1))
    assert differences(whole, stopped, STEPS) == []


# ---------------------------------------------------------------------------------- what a checkpoint holds


def test_a_checkpoint_loads_in_peft(whole: Path, tiny_checkpoint: Path) -> None:
    """Every checkpoint is a PEFT directory, and the last one equals the final adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(whole / "checkpoint-5"))
    stored = load_file(whole / "checkpoint-5" / "adapter_model.safetensors")
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            assert torch.equal(tensor, stored[name.replace(".default.", ".")])
    assert AutoTokenizer.from_pretrained(whole / "checkpoint-5").eos_token == "</s>"
    state = json.loads((whole / "checkpoint-5" / "trainer_state.json").read_text())
    assert (state["global_step"], len(state["log_history"])) == (5, 5)
    last = whole / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
    assert last.read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_failed_save_leaves_the_last_good_checkpoint(
    tiny_checkpoint: Path, rows_file: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full in the middle of checkpoint 4: nothing of it appears, and the run continues from 3."""
    from QEfficient.finetune import trainer

    real = trainer.write_run

    def full(directory: Path, identity: Any) -> None:
        if directory.name == ".saving-checkpoint-4":
            raise OSError(28, "No space left on device")
        real(directory, identity)

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_run", full)
        with pytest.raises(ArtifactWriteError, match="checkpoint-4"):
            refine(tiny_checkpoint, rows_file, output)
    assert not list(output.glob(".saving-*"))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]
    seen = Steps()
    refine(tiny_checkpoint, rows_file, output, seen)
    assert seen.done == list(range(4, STEPS + 1))
    assert differences(whole, output, STEPS) == []


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(
    tiny_checkpoint: Path, rows_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"after optimizer step \d+: lower learning_rate"):
        refine(tiny_checkpoint, rows_file, output, learning_rate=1e30, max_grad_norm=0, warmup_steps=0)
    saved = sorted(output.glob("checkpoint-*"))
    assert all((path / "trainer_state.json").is_file() for path in saved)
    assert all(tensor.isfinite().all() for path in saved for tensor in load_file(path / ADAPTER).values())
    assert not list(output.glob(".saving-*"))


@pytest.mark.parametrize("steps", [1, 3])
def test_weights_that_are_no_numbers_are_never_saved(
    tiny_checkpoint: Path, rows_file: Path, tmp_path: Path, steps: int
) -> None:
    """Also when the last step makes them, after which no loss is computed; the run can then start again."""
    output = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"after optimizer step 1: .*; no checkpoint was written\."):
        refine(tiny_checkpoint, rows_file, output, max_steps=steps, learning_rate=1e39, save_strategy="no")
    assert not (output / ADAPTER).exists()
    with pytest.raises(TrainingError, match=r"no numbers after optimizer step 1: "):
        refine(tiny_checkpoint, rows_file, output, max_steps=steps, learning_rate=1e39)
    assert not list(output.glob("*checkpoint-*"))
    seen = Steps()
    refine(tiny_checkpoint, rows_file, output, seen, max_steps=steps)
    assert seen.done == list(range(1, steps + 1))


def test_a_checkpoint_with_values_that_are_no_numbers(stopped: Path, tiny_checkpoint: Path, rows_file: Path) -> None:
    path = stopped / "checkpoint-5" / ADAPTER
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PackageError, match="no numbers: resume from an earlier checkpoint"):
        refine(tiny_checkpoint, rows_file, stopped)


def test_a_gradient_of_zero_is_said_once(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    """Weights so large that the softmax is saturated learn nothing more."""
    with pytest.warns(UserWarning, match="zero, so nothing is learned") as found:
        refine(tiny_checkpoint, rows_file, tmp_path / "run", learning_rate=1e6)
    assert sum("nothing is learned" in str(warning.message) for warning in found) == 1


@pytest.mark.parametrize("steps", [2, 3])
def test_a_finished_run_says_so(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path, steps: int) -> None:
    """Without accumulation, too, where transformers would do one step more; and when fewer steps are asked for."""
    options: dict[str, Any] = {"gradient_accumulation_steps": 1, "lr_scheduler_type": "constant"}
    output = tmp_path / "run"
    refine(tiny_checkpoint, rows_file, output, max_steps=3, **options)
    weights = (output / ADAPTER).read_bytes()
    seen, said = Steps(), []
    run = QEfficient(
        config(tiny_checkpoint, rows_file), arguments(output, max_steps=steps, **options), callbacks=[seen]
    )
    run.refine(load=False, say=said.append)
    assert seen.done == []
    assert any("finished at step 3 already" in str(message) for message in said)
    assert (output / ADAPTER).read_bytes() == weights
    assert not (output / "checkpoint-4").exists()


def test_two_runs_in_one_directory(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"

    class Second(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            with pytest.raises(OptionError, match="another run is writing to"):
                refine(tiny_checkpoint, rows_file, output)

    refine(tiny_checkpoint, rows_file, output, Second(), max_steps=1)
    refine(tiny_checkpoint, rows_file, output, max_steps=2)
    assert (output / "checkpoint-2").is_dir()


def test_what_is_refused_before_the_data_is_read(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "run"
    for where, options, words in (
        (tmp_path / "file" / "run", {}, "file is a file: choose a directory"),
        (output, {"resume_from_checkpoint": "/nope"}, "/nope is not a complete checkpoint"),
        (output, {"eval_strategy": "epoch"}, "eval_strategy needs evaluation rows"),
    ):
        with pytest.raises(OptionError, match=words):
            refine(tiny_checkpoint, rows_file, where, **options)
    with pytest.raises(OptionError, match="FP16Clop"):
        QEfficient(config(tiny_checkpoint, rows_file), arguments(output), transforms=["FP16Clop"]).refine()
    assert not [path for path in output.rglob("*") if path.is_file()]


# ---------------------------------------------------------------------------------- what is refused


def test_the_directory_of_another_model(stopped: Path, rows_file: Path, tmp_path: Path) -> None:
    other = tiny_tokenizer(save_tiny(base_model("llama", seed=5), tmp_path / "other"))
    before = {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    with pytest.raises(OptionError, match="is of another model or adapter"):
        refine(other, rows_file, stopped)
    assert sorted(path.name for path in stopped.glob("checkpoint-*"))[-1] == "checkpoint-5"
    assert {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file()} == before


def test_the_directory_of_another_adapter(stopped: Path, tiny_checkpoint: Path, rows_file: Path) -> None:
    settings = config(tiny_checkpoint, rows_file, lora_config={"r": 2, "target_modules": ["q_proj"]})
    with pytest.raises(OptionError, match="is of another model or adapter"):
        QEfficient(settings, arguments(stopped)).refine(load=False, say=lambda message: None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 4}, r"another batch_size \(5, now 4\)"),
        ({"gradient_accumulation_steps": 2}, "another gradient_accumulation_steps"),
        ({"seed": 7}, "another seed"),
        ({"optim": "adafactor"}, "another optim"),
    ],
)
def test_a_run_with_other_settings(
    stopped: Path, tiny_checkpoint: Path, rows_file: Path, change: dict[str, Any], words: str
) -> None:
    """They would change the order of the data or the meaning of the optimizer's state."""
    with pytest.raises(OptionError, match=words):
        refine(tiny_checkpoint, rows_file, stopped, **change)


def test_other_data(stopped: Path, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    shorter = tmp_path / "rows.jsonl"
    shorter.write_text("".join(line + "\n" for line in rows_file.read_text().splitlines()[:-1]))
    with pytest.raises(OptionError, match="is of a run on other data: use its settings"):
        refine(tiny_checkpoint, shorter, stopped)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"\x08" * 30), "cannot be read"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "neither adapter_model"),
        (lambda path: (path / "run.json").write_text("{"), "run.json is missing or damaged"),
        (lambda path: (path / "run.json").unlink(), "run.json is missing or damaged"),
        (lambda path: (path / "trainer_state.json").write_text("{"), "trainer_state.json"),
        (lambda path: (path / "optimizer.pt").write_bytes(b"PK"), "optimizer.pt"),
        (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt"),
        (lambda path: (path / "scheduler.pt").unlink(), "scheduler.pt"),
    ],
)
def test_a_damaged_checkpoint(
    stopped: Path, tiny_checkpoint: Path, rows_file: Path, damage: Callable[[Path], Any], words: str
) -> None:
    damage(stopped / "checkpoint-5")
    with pytest.raises(PackageError, match=words):
        refine(tiny_checkpoint, rows_file, stopped)


def test_nothing_to_resume_from(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no checkpoint in"):
        refine(tiny_checkpoint, rows_file, tmp_path / "run", resume_from_checkpoint=True)
    with pytest.raises(OptionError, match="not a complete checkpoint"):
        refine(tiny_checkpoint, rows_file, tmp_path / "run", resume_from_checkpoint=str(tmp_path / "missing"))

"""What a run shows while it trains: sampled texts, the picture's numbers, trackers, and what they refuse."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils

from QEfficient.errors import ContextLengthError, InputError, OptionError
from QEfficient.finetune import QEffConfig, QEfficient, QEffTrainingArgs
from QEfficient.finetune.plots import curves, draw_run
from QEfficient.models.peft import QEFFAutoPeftModelForCausalLM

PROMPTS = ["ash 3:", "a long ivy"]
TOKENS = 5


def arguments(output: Path, **options: Any) -> QEffTrainingArgs:
    settings = {"batch_size": 4, "learning_rate": 3e-2, "max_steps": 4, "num_cores": 1, "validate": False, **options}
    return QEffTrainingArgs(output, **settings)


def config(checkpoint: Path, rows: Path, **options: Any) -> QEffConfig:
    settings = {"max_ctx_len": 64, "lora_config": {"r": 4, "target_modules": "all-linear"}, **options}
    return QEffConfig(str(checkpoint), str(rows), **settings)


def rows_of(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "logs" / name).read_text().splitlines()]


class Tracker(TrainerCallback):
    """A stand-in for a tracker that transformers knows by name."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self.seen.append({"step": state.global_step, **logs})


@dataclass
class Run:
    """A finished run with samples, and how often an inference package was asked for in it."""

    qe: QEfficient
    output: Path
    said: list[Any]
    compiles: int


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output, said, compiles = tmp_path_factory.mktemp("watch") / "tuned", [], []
    compile_package = QEFFAutoPeftModelForCausalLM.compile

    def counted(self: Any, *positional: Any, **options: Any) -> Path:
        compiles.append(options)
        return compile_package(self, *positional, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QEFFAutoPeftModelForCausalLM, "compile", counted)
        patch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
        args = arguments(
            output, eval_strategy="steps", eval_steps=2, save_steps=2, report_to="tensorboard",
            eval_prompts=PROMPTS, eval_generation={"max_new_tokens": TOKENS},
        )  # fmt: skip
        qe = QEfficient(config(tiny_checkpoint, rows_file), args)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            qe.refine(load=False, say=said.append)
    return Run(qe, output, said, len(compiles))


# ---------------------------------------------------------------------------------- samples


def greedy(model: Any, tokenizer: Any, prompt: str) -> str:
    """Hugging Face's own continuation, to the tokenizer's end token."""
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=TOKENS,
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_samples_are_the_adapters_of_their_steps(run: Run, tiny_checkpoint: Path) -> None:
    """Before the run the base model's text, then that of each checkpoint, as Hugging Face and PEFT generate it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    expected = []
    for step in (0, 2, 4):
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
        if step:
            model = PeftModel.from_pretrained(model, str(run.output / f"checkpoint-{step}")).eval()
        expected += [{"step": step, "prompt": p, "text": greedy(model, tokenizer, p)} for p in PROMPTS]
    found = rows_of(run.output, "samples.jsonl")
    assert found == expected
    assert len({row["text"] for row in found if row["prompt"] == PROMPTS[0]}) == 3, "the adapter must matter"
    shown = [what for what in run.said if isinstance(what, str) and what.startswith("step ")]
    assert shown == [f"step {row['step']}, {row['prompt']!r}: {row['text']!r}" for row in expected]


def test_the_package_is_compiled_once(run: Run) -> None:
    assert run.compiles == 1


def test_a_continued_run_replaces_the_samples_after_its_checkpoint(
    run: Run, tiny_checkpoint: Path, rows_file: Path
) -> None:
    """From checkpoint-2: rows of step 4 are made anew, those up to 2 stay, and the texts are the same."""
    before = rows_of(run.output, "samples.jsonl")
    again = run.qe.args.to_dict() | {  # type: ignore[union-attr]
        "resume_from_checkpoint": str(run.output / "checkpoint-2"), "report_to": "none",
    }  # fmt: skip
    QEfficient(run.qe.config, QEffTrainingArgs.from_dict(again)).refine(load=False, say=lambda message: None)
    assert rows_of(run.output, "samples.jsonl") == before


@pytest.mark.parametrize(
    ("what", "how", "error", "message"),
    [
        ({"lora_config": None}, {}, OptionError, "eval_prompts needs lora_config"),
        ({"lora_config": None, "trainable": ("*q_proj*",)}, {}, OptionError, "eval_prompts needs lora_config"),
        ({"task": "seq_classification"}, {}, OptionError, "needs a model that generates text"),
        ({"train_frac": 1.0}, {}, OptionError, "eval_prompts needs evaluation rows"),
        ({}, {"eval_generation": {"max_new_tokens": 121}}, ContextLengthError, "prompt 2 of eval_prompts has 9 tokens"),
        (
            {"lora_config": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}}, {},
            OptionError, r"does not go with lora_config\.modules_to_save",
        ),
    ],
    ids=["full", "part", "classes", "no rows", "too long", "whole modules"],
)  # fmt: skip
def test_what_cannot_be_sampled_is_said_before_training(
    tiny_checkpoint: Path, rows_file: Path, tmp_path: Path, what: Any, how: Any, error: Any, message: str
) -> None:
    args = arguments(tmp_path / "out", **{"eval_prompts": PROMPTS, **how})
    with pytest.raises(error, match=message):
        QEfficient(config(tiny_checkpoint, rows_file, **what), args).refine(load=False, say=lambda said: None)
    assert not (tmp_path / "out").exists()


def test_prompts_from_a_file(tmp_path: Path) -> None:
    """One per line; the run's own record holds the texts, so that it does not depend on the file."""
    (tmp_path / "prompts.txt").write_text("one\n\ntwo words\n")
    args = QEffTrainingArgs("out", eval_prompts=str(tmp_path / "prompts.txt"))
    assert args.eval_prompts == ["one", "two words"]
    assert args.eval_generation == {"max_new_tokens": 64}
    (tmp_path / "prompts.txt").unlink()
    assert QEffTrainingArgs.from_dict(args.to_dict()).eval_prompts == ["one", "two words"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eval_prompts": "no-such-file.txt"}, InputError, "no-such-file.txt cannot be read"),
        ({"eval_prompts": []}, OptionError, "must be a list of texts, or a file"),
        ({"eval_prompts": ["a", ""]}, OptionError, "must be a non-empty string"),
        ({"eval_prompts": ["a", 3]}, OptionError, "must be a non-empty string, got 3"),
        ({"eval_generation": {"do_sample": True}}, OptionError, "says how eval_prompts are answered"),
        ({"eval_prompts": ["a"], "eval_generation": {"temperatur": 1}}, OptionError, "temperature"),
        ({"eval_prompts": ["a"], "eval_generation": {"max_new_tokens": 0}}, OptionError, "max_new_tokens"),
        ({"eval_prompts": ["a"], "eval_generation": {"top_p": 2}}, OptionError, "top_p must be"),
    ],
    ids=str,
)
def test_malformed_prompts(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        QEffTrainingArgs("out", **options)


# ---------------------------------------------------------------------------------- the picture

METRICS = [
    {"step": 0, "eval_loss": 3.5, "eval_tokens_per_second": 900.0},
    {"step": 1, "loss": 3.0, "learning_rate": 1e-3, "grad_norm": 2.0, "tokens_per_second": 100.0,
     "trained_tokens_per_second": 60.0, "padded_tokens_per_second": 120.0},
    {"step": 2, "loss": 2.0, "learning_rate": 0.0, "grad_norm": 0.0, "tokens_per_second": 110.0,
     "trained_tokens_per_second": 66.0, "padded_tokens_per_second": 130.0},
    {"step": 2, "eval_loss": 2.5, "eval_tokens_per_second": 950.0},
    {"step": 3, "loss": "nan", "grad_norm": "inf"},
    {"step": 3, "train_runtime": 2.0, "train_loss": 2.5},
]  # fmt: skip


def test_the_picture_shows_every_quantity_at_its_step() -> None:
    assert curves(METRICS) == {
        "loss": [(1, 3.0), (2, 2.0)],
        "eval_loss": [(0, 3.5), (2, 2.5)],
        "learning_rate": [(1, 1e-3), (2, 0.0)],
        "grad_norm": [(1, 2.0), (2, 0.0)],
        "tokens_per_second": [(1, 100.0), (2, 110.0)],
        "trained_tokens_per_second": [(1, 60.0), (2, 66.0)],
        "padded_tokens_per_second": [(1, 120.0), (2, 130.0)],
    }


def test_the_picture_is_drawn_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    picture = tmp_path / "loss.png"
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    assert draw_run(METRICS[:1], picture) is False
    assert not picture.exists()
    assert draw_run(METRICS, picture) is True
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == ["loss per trained token", "learning rate", "gradient norm", "tokens per second"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    assert lines == {"training": [[1, 3.0], [2, 2.0]], "held out": [[0, 3.5], [2, 2.5]]}
    before = picture.read_bytes()
    assert before.startswith(b"\x89PNG\r\n\x1a\n")

    def breaks(self: Figure, file: Path, **options: Any) -> None:
        Path(file).write_bytes(before[:50])
        raise RuntimeError("no font")

    monkeypatch.setattr(Figure, "savefig", breaks)
    with pytest.raises(RuntimeError, match="no font"):
        draw_run(METRICS, picture)
    assert picture.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_picture_that_fails_does_not_stop_the_run(
    tiny_checkpoint: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def breaks(self: Figure, *positional: Any, **options: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(Figure, "savefig", breaks)
    qe = QEfficient(config(tiny_checkpoint, rows_file), arguments(tmp_path / "out", max_steps=1))
    with pytest.warns(UserWarning, match=r"loss\.png was not drawn \(no font\)"):
        qe.refine(load=False, say=lambda said: None)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "loss.png").exists()


# ---------------------------------------------------------------------------------- trackers


def test_trackers_of_transformers_get_every_row(run: Run) -> None:
    """``report_to`` names a callback of transformers, here a stand-in; it is told what the metrics file is told."""
    written = [{k: v for k, v in row.items() if k != "epoch"} for row in rows_of(run.output, "metrics.jsonl")]
    told = [{k: v for k, v in row.items() if k != "epoch"} for row in Tracker.seen]
    assert [row["loss"] for row in told if "loss" in row] == [row["loss"] for row in written if "loss" in row]
    assert len([row for row in told if "eval_loss" in row]) == 3


def test_no_tracker_is_asked_by_default(run: Run) -> None:
    assert QEffTrainingArgs("out").report_to == []
    assert run.qe.args is not None
    assert run.qe.args.report_to == ["tensorboard"]


def test_a_missing_tracker_is_said_before_the_model_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from QEfficient.cli.main import app

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", list)
    for name in ("tensorboard", "wandb", "trackio", "mlflow"):
        result = CliRunner().invoke(app, ["finetune", "no-such-model", "-d", "sample", f"report_to={name}"])
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert f"report_to='{name}' needs a package that is not installed: pip install {name}" in line


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_events(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    """The numbers in the event file are the metrics file's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path / "out", max_steps=2, report_to="tensorboard")
    QEfficient(config(tiny_checkpoint, rows_file), args).refine(load=False, say=lambda said: None)
    (directory,) = (tmp_path / "out" / "runs").iterdir()
    found = EventAccumulator(str(directory)).Reload()
    losses = {row["step"]: row["loss"] for row in rows_of(tmp_path / "out", "metrics.jsonl") if "loss" in row}
    assert {event.step: event.value for event in found.Scalars("train/loss")} == pytest.approx(losses)
    assert len(losses) == 2
    assert [event.step for event in found.Scalars("eval/loss")] == [0, 2]

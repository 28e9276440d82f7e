"""The documented classes end to end: every stage's product, the proof, the numbers, and the command."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from peft import PeftModel
from step_models import torch_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from typer.testing import CliRunner

from QEfficient.cli.main import app
from QEfficient.errors import OptionError, TrainingError, TransformError
from QEfficient.finetune import (
    CompiledStep,
    ONNXModel,
    QEffConfig,
    QEffDataManager,
    QEfficient,
    QEffModelManager,
    QEffTrainer,
    QEffTrainingArgs,
    StepSession,
)
from QEfficient.finetune.data.audit import LabelAudit

PROMPTS = ["ash 3:", "elm 9:"]
#: What a row of metrics.jsonl must say.
KEYS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "trained_tokens_per_second", "tokens_per_second",
    "padded_tokens_per_second", "padding_ratio", "rss_mb", "peak_rss_mb", "step_time_ms", "num_input_tokens_seen",
}  # fmt: skip


class Events(TrainerCallback):
    """A plain transformers callback."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.names: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self.seen.append("begin")
        self.names = [name for name, _ in model.named_parameters()]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
        self.seen.append("evaluate" if "eval_loss" in metrics else "evaluate nothing")

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.seen.append(f"save {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.seen.append("end")


@dataclass
class Run:
    """A finished run and what it said on its way."""

    qe: QEfficient
    output: Path
    said: list[Any]
    events: Events
    before: list[str]
    model: Any
    tokenizer: Any


def config(checkpoint: Path, rows: Path, **options: Any) -> QEffConfig:
    settings = {"max_ctx_len": 64, "lora_config": {"r": 4, "target_modules": "all-linear"}, **options}
    return QEffConfig(model_id=str(checkpoint), dataset_name=str(rows), **settings)


def arguments(output: Path, **options: Any) -> QEffTrainingArgs:
    settings = {"batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "num_cores": 1, **options}
    return QEffTrainingArgs(output, **settings)


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("refine") / "tuned"
    events, said = Events(), []
    qe = QEfficient(config(tiny_checkpoint, rows_file), callbacks=[events])
    before = qe.generate(PROMPTS, max_new_tokens=6)
    args = arguments(output, num_train_epochs=4, eval_strategy="epoch", save_strategy="epoch", eval_on_start=True)
    model, tokenizer = qe.refine(args, say=said.append)
    return Run(qe, output, said, events, before, model, tokenizer)


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------- products


def test_every_stage_leaves_its_product(run: Run) -> None:
    output = run.output
    assert QEffConfig.load(output / "refine_config.yaml") == run.qe.config
    assert QEffTrainingArgs.load(output / "training_args.yaml").learning_rate == 1e-2
    report = json.loads((output / "data_report.json").read_text())
    assert (report["splits"]["train"]["rows"], report["splits"]["eval"]["rows"]) == (39, 7)
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "loss.png", "validate.json"):
        assert (output / name).is_file(), name
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (10, 20, 30, 40)]
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
    picture = (output / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 5_000
    parts = (run.qe.data_manager, run.qe.model_manager, run.qe.trainer)
    assert [type(part) for part in parts] == [QEffDataManager, QEffModelManager, QEffTrainer]


def test_the_packages_run_without_the_run(run: Run) -> None:
    """``qpc/train`` and ``qpc/eval`` are packages of their own: the same loss, gradients from one of them."""
    held = run.qe.data_manager.prepare_dataset()[1] if run.qe.data_manager else None
    assert held is not None
    batch = QEffDataManager.collate([held[0], held[1]])
    tensors = {name: np.asarray(array) for name, array in step_of(run).file_tensors().items()}
    results = {}
    for name in ("train", "eval"):
        with StepSession(run.output / "qpc" / name) as session:
            session.set_parameters({**tensors, "lora_scaling": step_of(run)._scaling})
            results[name] = session.run(batch)
    assert results["train"].loss == pytest.approx(results["eval"].loss, rel=1e-6)
    assert set(results["train"].gradients) == set(tensors)
    assert results["eval"].gradients == {}


def step_of(run: Run) -> CompiledStep:
    assert run.qe.trainer is not None
    return run.qe.trainer._step


def test_metrics_say_what_was_promised(run: Run) -> None:
    rows = rows_of(run.output)
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 41))
    assert all(row.keys() >= KEYS for row in trained)
    assert all(math.isfinite(row[key]) for row in trained for key in KEYS)
    assert trained[-1]["learning_rate"] < trained[0]["learning_rate"] == 1e-2


def test_held_out_loss_falls(run: Run) -> None:
    held = [row["eval_loss"] for row in rows_of(run.output) if "eval_loss" in row]
    assert held[-1] < 0.6 * held[0]
    assert held[-1] == pytest.approx(min(held), rel=0.1)


def test_it_says_what_it_trains_and_how_it_was_proven(run: Run) -> None:
    audits = [what for what in run.said if isinstance(what, LabelAudit)]
    assert len(audits) == 1
    text = " ".join(str(what) for what in run.said)
    assert "first step against torch autograd" in text
    assert "equal" in text
    assert str(run.output) in text


def test_plain_callbacks_get_their_events(run: Run) -> None:
    seen = run.events.seen
    assert seen[0] == "begin"
    assert [event for event in seen if event.startswith("save")] == [f"save {n}" for n in (10, 20, 30, 40)]
    assert "end" in seen
    assert seen.count("evaluate") >= 5
    assert run.events.names == [name for name, _ in step_of(run).named_parameters()]


def test_a_second_run_starts_from_the_base_model(
    run: Run, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path
) -> None:
    """With other arguments: nothing of the first run's directory, batch size or tensors is left."""
    qe = QEfficient(config(tiny_checkpoint, rows_file))
    losses = []
    for name, size in (("a", 4), ("b", 2), ("c", 4)):
        args = arguments(tmp_path / name, max_steps=2, batch_size=size, validate=False)
        qe.refine(args, load=False, say=lambda message: None)
        losses.append([row["loss"] for row in rows_of(tmp_path / name) if "loss" in row])
        assert (tmp_path / name / "qpc" / "train").is_dir()
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]
    assert losses[0] == [row["loss"] for row in rows_of(run.output) if "loss" in row][:1] + losses[0][1:]


# ---------------------------------------------------------------------------------- the tuned model


def test_the_tuned_model_is_the_one_that_was_measured(run: Run) -> None:
    """refine() returns a PeftModel whose loss on the held-out rows is the last evaluation's."""
    assert isinstance(run.model, PeftModel)
    assert run.qe.data_manager is not None
    held = run.qe.data_manager.prepare_dataset()[1]
    assert held is not None
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(held)):
            row = {name: torch.tensor(held[index][name])[None] for name in ("input_ids", "labels")}
            total -= float(torch_logprobs(run.model.eval(), row).sum())
            count += int((row["labels"][:, 1:] != -100).sum())
    last = [row["eval_loss"] for row in rows_of(run.output) if "eval_loss" in row][-1]
    assert total / count == pytest.approx(last, rel=1e-4)


def greedy(model: Any, tokenizer: Any, ids: list[int], count: int) -> str:
    """Hugging Face's own continuation; it ends at the tokenizer's end token."""
    inputs = torch.tensor([ids])
    out = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def test_generate_before_and_after(run: Run, tiny_checkpoint: Path) -> None:
    """The base model before, the tuned one after; both with Hugging Face's tokens."""
    assert run.qe.data_manager is not None
    prompts = [run.qe.data_manager.prompt_ids(prompt) for prompt in PROMPTS]
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.output)
    assert run.before == [greedy(base, tokenizer, ids, 6) for ids in prompts]
    tuned = PeftModel.from_pretrained(base, str(run.output)).eval()
    after = run.qe.generate(PROMPTS, max_new_tokens=6)
    assert after == [greedy(tuned, tokenizer, ids, 6) for ids in prompts]
    assert after != run.before
    assert run.qe.generate(PROMPTS[0], max_new_tokens=6) == after[0]
    assert run.qe.generate(PROMPTS[0], max_new_tokens=6, return_full_text=True).startswith(PROMPTS[0])


# ---------------------------------------------------------------------------------- stage by stage


def test_the_documented_stages_one_by_one(run: Run, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    """prepare data, init model, export, transforms, compile, load, train, save: each product can be looked at."""
    settings, args = config(tiny_checkpoint, rows_file), arguments(tmp_path, max_steps=2, batch_size=4)
    manager = QEffModelManager(settings, args)
    data = QEffDataManager(settings, manager.tokenizer, None, args)
    train, held = data.prepare_dataset()
    batch = next(iter(data.get_dataloader(train, 4)))
    assert batch["input_ids"].shape == batch["labels"].shape
    described = manager.init_model()
    assert described.adapter == "default"
    assert set(described.trained) == set(run.events.names)
    graph = manager.export_to_onnx()
    names = [value.name for value in onnx.load(graph, load_external_data=False).graph.output]
    assert names[:2] == ["loss", "token_logprobs"]
    assert {name.removeprefix("grad/") for name in names[2:]} == {described.file_names[n] for n in described.trained}
    changed = manager.apply_onnx_transforms()
    assert isinstance(changed, ONNXModel)
    packages = manager.compile()
    assert packages.train.is_dir()
    assert (tmp_path / "qpc" / "train").resolve() == packages.train.resolve()
    step = manager.load()
    trainer = QEffTrainer(step, args, data, train, held)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert trainer.state.global_step == 2
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    # The same model, tensors and options: what the first run compiled is found by its content.
    assert run.qe.model_manager is not None
    assert run.qe.model_manager.packages is not None
    assert packages.graph == run.qe.model_manager.packages.graph


def test_packing_trains_the_same_tokens(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    qe = QEfficient(config(tiny_checkpoint, rows_file, packing=True), arguments(tmp_path, num_train_epochs=1))
    said: list[Any] = []
    qe.refine(load=False, say=said.append)
    assert qe.proof is not None  # against torch, every packed sequence alone
    assert qe.proof.passed
    report = json.loads((tmp_path / "data_report.json").read_text())["splits"]["train"]
    trained = [row for row in rows_of(tmp_path) if "loss" in row]
    assert sum(row["trained_tokens"] for row in trained) == report["trained_tokens"]
    assert report["packed_rows"] < report["rows"] / 2


def test_full_fine_tuning_saves_a_checkpoint(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    """Every weight trained; transformers loads the output directory and has the loss that was measured."""
    settings = config(tiny_checkpoint, rows_file, lora_config=None)
    qe = QEfficient(settings, arguments(tmp_path, max_steps=6, learning_rate=1e-3))
    model, _ = qe.refine(say=lambda message: None)
    assert qe.proof is not None
    assert qe.proof.passed
    assert qe.data_manager is not None
    held = qe.data_manager.prepare_dataset()[1]
    assert held is not None
    row = {name: torch.tensor(held[0][name])[None] for name in ("input_ids", "labels")}
    stored = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    assert qe.trainer is not None
    with torch.no_grad():
        losses = [float(-torch_logprobs(each, row).sum()) for each in (model, stored, base)]
        mine = float(qe.trainer._step(**row, normaliser=1.0))
    assert losses[0] == losses[1]
    assert mine == pytest.approx(losses[0], rel=1e-5)
    assert losses[1] < losses[2] - 0.1
    ids = qe.data_manager.prompt_ids(PROMPTS[0])
    assert qe.generate(PROMPTS[0], max_new_tokens=6) == greedy(stored, qe.data_manager.tokenizer, ids, 6)


# ---------------------------------------------------------------------------------- the proof and user transforms

TRANSFORMS = """
    from dataclasses import dataclass
    from typing import ClassVar

    import onnx_ir as ir
    from QEfficient import OnnxTransform
    from QEfficient.onnx_io import store_tensors
    from QEfficient.transforms.onnx.base import TransformResult

    @dataclass(frozen=True)
    class Corrupt(OnnxTransform):
        name: ClassVar[str] = "Corrupt"
        factor: float = 1.5

        def apply(self, model, workspace):
            name = "model.layers.1.mlp.down_proj.weight"
            value = model.graph.initializers[name]
            array = value.const_value.numpy() * self.factor
            value.const_value = store_tensors({name: array.astype("float32")}, workspace / "w.safetensors")[name]
            return TransformResult(modified=True)

    @dataclass(frozen=True)
    class Look(OnnxTransform):
        name: ClassVar[str] = "Look"

        def apply(self, model, workspace):
            return TransformResult(modified=False, facts={"nodes": len(model.graph)})

    class Fails(OnnxTransform):
        name: ClassVar[str] = "Fails"

        def apply(self, model, workspace):
            raise ValueError("no luck")
"""


@pytest.fixture
def transforms(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(TRANSFORMS))
    return path


def tuned_with(transform: str, checkpoint: Path, rows: Path, output: Path, **options: Any) -> QEfficient:
    args = arguments(output, max_steps=2, **options)
    return QEfficient(config(checkpoint, rows), args, transforms=[transform])


def test_the_proof_catches_a_corrupted_graph(
    transforms: Path, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Before the first step: no checkpoint, no metrics; the report names the worst tensor."""
    output = tmp_path / "out"
    qe = tuned_with(f"{transforms}:Corrupt", tiny_checkpoint, rows_file, output)
    with pytest.raises(TrainingError, match=r"differs from torch autograd .* see validate\.json"):
        qe.refine(say=lambda message: None)
    report = json.loads((output / "validate.json").read_text())
    assert report["passed"] is False
    assert report["loss_difference"] > 1e-3
    assert report["worst_gradient"] in report["gradients"]
    assert not list(output.glob("checkpoint-*"))
    assert not (output / "adapter_model.safetensors").exists()
    assert not (output / "logs" / "metrics.jsonl").exists()
    # Whoever asks for no proof gets none, and the call's word counts more than the arguments'.
    qe.refine(validate=False, load=False, say=lambda message: None)
    assert (output / "adapter_model.safetensors").is_file()


def test_a_harmless_transform_is_listed(
    transforms: Path, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path
) -> None:
    qe = tuned_with(f"{transforms}:Look", tiny_checkpoint, rows_file, tmp_path / "out")
    qe.refine(load=False, say=lambda message: None)
    assert qe.proof is not None
    assert qe.proof.passed
    assert qe.model_manager is not None
    record = next(record for record in qe.model_manager.transform_log() if record["parameters"].get("label") == "Look")
    assert (record["modified"], record["facts"]["nodes"] > 100) == (False, True)


def test_a_transform_that_fails_or_does_not_exist(
    transforms: Path, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path
) -> None:
    for transform, error, words in (
        (f"{transforms}:Fails", TransformError, "no luck"),
        (f"{transforms}:Missing", OptionError, "Missing"),
        ("QuantiseBase", OptionError, "QuantizeBase"),
    ):
        qe = tuned_with(transform, tiny_checkpoint, rows_file, tmp_path / "out", validate=False)
        with pytest.raises((error, TransformError), match=words):
            qe.refine(load=False, say=lambda message: None)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


# ---------------------------------------------------------------------------------- the command


def command(*words: object) -> Any:
    return CliRunner().invoke(app, ["finetune", *(str(word) for word in words)], env={"COLUMNS": "200"})


def test_the_command(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    """The audit and the progress lines are for a person, the directory on stdout is for a script."""
    output = tmp_path / "tuned"
    result = command(
        tiny_checkpoint, "--dataset", rows_file, "-o", output, "--steps", 3, "--batch-size", 4, "--lr", "1e-2",
        "--max-ctx-len", 64, "--rank", 4, "--set", "num_cores=1", "--set", "weight-decay=0.01",
        "--set", "disable_tqdm=false",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(output)
    for words in ("tokens", "trained", "first step against torch autograd", "step 3/3 | loss", "grad-norm", "lr "):
        assert words in result.stderr, words
    assert "padded tok/s" in result.stderr
    assert "memory" in result.stderr
    stored = QEffTrainingArgs.load(output / "training_args.yaml")
    assert (stored.weight_decay, stored.learning_rate, stored.max_steps) == (0.01, 1e-2, 3)
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 4


def test_the_dry_run_stops_after_the_data(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    result = command(tiny_checkpoint, "-d", rows_file, "-o", tmp_path / "out", "--dry-run", "--max-ctx-len", 64)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "data_report.json", "qpc", "refine_config.yaml", "run.yaml", "training_args.yaml",
    ]  # fmt: skip
    # The options as they were resolved, the audit, and what the run will need.
    shown = yaml.safe_load(result.stdout.split("peak memory")[0])
    assert shown == yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert shown["max_ctx_len"] == 64
    assert "trained tokens" in result.stderr
    assert "peak memory" in result.stdout
    assert "step time" in result.stdout


def test_a_run_from_a_file_and_words(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    """Files that build on files, words of any form, and the file a run leaves, which makes the same run again."""
    (tmp_path / "base.yaml").write_text("lr: 1e-2\nmax_ctx_len: 64\nlora_config: {rank: 2, lora_alpha: 4}\n")
    file = tmp_path / "run.yaml"
    file.write_text(f"base: base.yaml\nmodel: {tiny_checkpoint}\ndata: {rows_file}\nbatch_size: 4\n")
    words = ["max_steps=2", "--lora_config.r", "3", "--no-plot", "--learning-rate=5e-3", "--no_validate"]
    result = command(file, *words, "-o", tmp_path / "one")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 4)
    assert not (tmp_path / "one" / "loss.png").exists()
    again = command(tmp_path / "one" / "run.yaml", f"output_dir={tmp_path / 'two'}")
    assert again.exit_code == 0, again.output
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_preset_fits_the_run(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    words = ["-d", rows_file, "--max-ctx-len", 64, "--steps", 1, "--dry-run", "preset=host-64gb", "batch_size=4"]
    result = command(tiny_checkpoint, *words, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    run = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert (run["per_device_train_batch_size"], run.get("gradient_accumulation_steps", 1)) == (4, 1)
    assert "preset" not in run


def test_a_file_of_options_and_words_that_win_over_it(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    options = tmp_path / "run.yaml"
    options.write_text(
        f"model_id: {tiny_checkpoint}\ndataset_name: {rows_file}\noutput_dir: {tmp_path / 'out'}\n"
        "learning_rate: 1e-3\nmax_ctx_len: 64\nbatch_size: 2\nlora_config:\n  r: 2\n  target_modules: [q_proj]\n"
    )
    result = command("--config", options, "--lr", "5e-4", "--rank", 3, "--dry-run")
    assert result.exit_code == 0, result.output
    stored = QEffTrainingArgs.load(tmp_path / "out" / "training_args.yaml")
    assert (stored.learning_rate, stored.per_device_train_batch_size) == (5e-4, 2)
    what = QEffConfig.load(tmp_path / "out" / "refine_config.yaml")
    assert what.lora_config == {"r": 3, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a model"),
        (["MODEL"], "name the data with --dataset"),
        (["MODEL", "-d", "DATA", "--set", "learning_rte=1"], "learning_rate"),
        (["MODEL", "-d", "DATA", "--set", "learning_rate"], "NAME=VALUE"),
        (["MODEL", "-d", "DATA", "--full", "--rank", "4"], "exclude each other"),
        (["MODEL", "-d", "DATA", "--set", "train_frac=2"], "train_frac"),
        (["MODEL", "-d", "DATA", "--target", "hosst"], "host"),
        (["MODEL", "-d", "DATA", "--base-weights", "int5"], "int4"),
        (["MODEL", "-d", "no-such-rows.jsonl", "--max-ctx-len", "64"], "no-such-rows"),
        (["no-such-model", "-d", "DATA"], "no-such-model"),
        (["MODEL", "-d", "DATA", "--max-ctx-len", "4096"], "128 positions"),
        (["MODEL", "-d", "DATA", "--config", "missing.yaml"], "missing.yaml"),
        (["missing.yaml", "-d", "DATA"], "missing.yaml"),
        (["MODEL", "-d", "DATA", "--learning_rte", "1e-4"], "Did you mean 'learning_rate'"),
        (["MODEL", "-d", "DATA", "stray"], "'stray' is no option"),
        (["MODEL", "-d", "DATA", "preset=host-3gb"], "preset must be one of"),
    ],
)
def test_what_the_command_refuses(
    tiny_checkpoint: Path, rows_file: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    places = {"MODEL": str(tiny_checkpoint), "DATA": str(rows_file)}
    result = command(*(places.get(word, word) for word in words), "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr

"""QEffTrainer does what transformers' Trainer does: the same steps, schedule, windows, best model, early stopping."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from step_models import compiled, torch_logprobs, trained, with_lora
from transformers import AutoTokenizer, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from QEfficient.errors import InputError
from QEfficient.finetune import CompiledStep, QEffConfig, QEffDataManager, QEffTrainer, QEffTrainingArgs


class Reference(Trainer):
    """transformers' own trainer over the torch model, fed with the same batches."""

    def __init__(self, source: QEffTrainer, **options: Any) -> None:
        super().__init__(**options)
        self.source = source
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> Any:
        return self.source.get_train_dataloader()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return -torch_logprobs(model, inputs).sum() / num_items_in_batch


class Log(TrainerCallback):
    """The order of events, and what was logged."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self.rows.append({"step": state.global_step, "epoch": state.epoch, **logs})

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name != "on_log":
            return lambda args, state, control, **more: self.events.append(f"{name[3:]} {state.global_step}")
        return super().__getattribute__(name)


@pytest.fixture(scope="module")
def data(tiny_checkpoint: Path, rows_file: Path) -> tuple[QEffDataManager, Any, Any]:
    config = QEffConfig(model_id=str(tiny_checkpoint), dataset_name=str(rows_file), max_ctx_len=64, train_frac=0.8)
    manager = QEffDataManager(config, AutoTokenizer.from_pretrained(tiny_checkpoint))
    return manager, *manager.prepare_dataset()


@pytest.fixture
def step() -> Iterator[CompiledStep]:
    made = compiled(with_lora("llama"))
    yield made
    made.close()


def arguments(output: Path, **options: Any) -> dict[str, Any]:
    """For both trainers: 36 rows in micro-batches of 5, three to a step, so that the last window has two."""
    return {
        "output_dir": str(output), "per_device_train_batch_size": 5, "gradient_accumulation_steps": 3,
        "learning_rate": 3e-3, "weight_decay": 0.02, "max_grad_norm": 0.7, "warmup_steps": 2,
        "lr_scheduler_type": "cosine", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "report_to": "none", "use_cpu": True, "seed": 3, **options,
    }  # fmt: skip


def trainer(step: CompiledStep, data: Any, output: Path, *callbacks: TrainerCallback, **options: Any) -> QEffTrainer:
    manager, train, held = data
    args = QEffTrainingArgs(**arguments(output, plot=False, **options))
    return QEffTrainer(step, args, manager, train, held, callbacks=callbacks)


# ---------------------------------------------------------------------------------- the same training


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 3},
        {"num_train_epochs": 1.5},
        {"max_steps": 7, "lr_scheduler_type": "linear", "warmup_steps": 0.3},
        {"num_train_epochs": 2, "gradient_accumulation_steps": 4, "max_grad_norm": 0, "logging_steps": 2},
        {"num_train_epochs": 2, "optim": "adamw_torch", "adam_beta2": 0.95, "gradient_accumulation_steps": 1},
    ],
    ids=["epochs", "part of an epoch", "steps", "windows of four", "no accumulation"],
)
def test_as_transformers_trains(step: CompiledStep, data: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    """Every logged loss, learning rate and gradient norm, the epochs, and the adapter."""
    mine, theirs = Log(), Log()
    ours = trainer(step, data, tmp_path / "ours", mine, **options)
    model = with_lora("llama")
    reference = Reference(
        ours, model=model, args=TrainingArguments(**arguments(tmp_path / "theirs", **options)), callbacks=[theirs]
    )
    reference.train()
    ours.train()
    assert ours.state.global_step == reference.state.global_step
    assert mine.events == theirs.events
    assert {"train_begin 0", "epoch_begin 0", "step_begin 0", "step_end 1"} <= set(mine.events)
    kept = [[row for row in log.rows if "loss" in row] for log in (mine, theirs)]
    assert [row["step"] for row in kept[0]] == [row["step"] for row in kept[1]]
    for key in ("epoch", "learning_rate", "grad_norm"):
        assert [row[key] for row in kept[0]] == pytest.approx([row[key] for row in kept[1]], rel=1e-4, abs=1e-7), key
    if options.get("logging_steps", 1) == 1:
        assert [row["loss"] for row in kept[0]] == pytest.approx([row["loss"] for row in kept[1]], abs=2e-5)
    wanted = trained(model)
    for name, parameter in trained(step).items():
        assert float((parameter - wanted[name]).detach().abs().max()) <= 2e-5, name


def test_losses_between_log_lines_are_token_means(step: CompiledStep, data: Any, tmp_path: Path) -> None:
    """With a line every third step: the sum over the trained tokens of the three, divided by their number."""
    every, third = Log(), Log()
    trainer(step, data, tmp_path / "a", every, max_steps=6).train()
    other = compiled(with_lora("llama"))
    trainer(other, data, tmp_path / "b", third, max_steps=6, logging_steps=3).train()
    rows = [row for row in every.rows if "loss" in row]
    for number, row in enumerate(row for row in third.rows if "loss" in row):
        part = rows[3 * number : 3 * number + 3]
        tokens = sum(line["trained_tokens"] for line in part)
        assert row["trained_tokens"] == tokens
        assert row["loss"] == pytest.approx(sum(line["loss"] * line["trained_tokens"] for line in part) / tokens, 1e-5)
    other.close()


def test_evaluation_is_a_token_mean(step: CompiledStep, data: Any, tmp_path: Path) -> None:
    """However the rows are cut into batches, and equal to torch's loss over every row by itself."""
    found = [
        trainer(step, data, tmp_path / str(size), per_device_eval_batch_size=size).evaluate() for size in (1, 4, 64)
    ]
    model, total, count = with_lora("llama"), 0.0, 0
    held = data[2]
    with torch.no_grad():
        for index in range(len(held)):
            row = {name: torch.tensor(held[index][name])[None] for name in ("input_ids", "labels")}
            total -= float(torch_logprobs(model, row).sum())
            count += int((row["labels"][:, 1:] != -100).sum())
    for metrics in found:
        assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
        assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)


def test_without_evaluation_rows(step: CompiledStep, data: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no evaluation rows"):
        trainer(step, (data[0], data[1], None), tmp_path).evaluate()


# ---------------------------------------------------------------------------------- checkpoints


def checkpoints(output: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))


def test_the_best_checkpoint_is_kept_and_loaded(step: CompiledStep, data: Any, tmp_path: Path) -> None:
    """The learning rate explodes after step 3: the best evaluation is not the last one."""
    log = Log()

    class Explode(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **more: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 if state.global_step < 3 else 0.1

    run = trainer(
        step, data, tmp_path, log, Explode(), max_steps=7, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=2, load_best_model_at_end=True, lr_scheduler_type="constant", warmup_steps=0,
    )  # fmt: skip
    run.train()
    losses = {row["step"]: row["eval_loss"] for row in log.rows if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best < 7
    assert run.state.best_global_step == best
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert checkpoints(tmp_path) == [best, 7]
    stored = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(p.detach(), stored[step.file_names[name]]) for name, p in trained(step).items())
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_early_stopping(step: CompiledStep, data: Any, tmp_path: Path) -> None:
    """Stops when two evaluations in a row were no better."""
    log = Log()
    run = trainer(
        step, data, tmp_path, log, EarlyStoppingCallback(early_stopping_patience=2), max_steps=40,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        learning_rate=0.1, lr_scheduler_type="constant", warmup_steps=0,
    )  # fmt: skip
    run.train()
    losses = [row["eval_loss"] for row in log.rows if "eval_loss" in row]
    best = losses.index(min(losses)) + 1
    assert run.state.global_step == best + 2 < 40
    assert run.state.best_global_step == best


@pytest.mark.parametrize(("patience", "threshold"), [(1, 0.0), (3, 0.0), (2, 0.05)])
def test_early_stopping_as_an_option(
    step: CompiledStep, data: Any, tmp_path: Path, patience: int, threshold: float
) -> None:
    """Ends where the losses of the run itself say, whatever is saved."""
    log = Log()
    run = trainer(
        step, data, tmp_path, log, max_steps=40, eval_strategy="steps", eval_steps=1, learning_rate=0.1,
        lr_scheduler_type="constant", warmup_steps=0, early_stopping_patience=patience,
        early_stopping_threshold=threshold,
    )  # fmt: skip
    run.train()
    losses = [row["eval_loss"] for row in log.rows if "eval_loss" in row]
    best, waited, stops = math.inf, 0, []
    for number, loss in enumerate(losses, start=1):
        waited = 0 if best - loss > threshold or best == math.inf else waited + 1
        best = min(best, loss)
        stops += [number] if waited == patience else []
    assert stops == [len(losses)]
    assert run.state.global_step == len(losses) < 40


@pytest.mark.parametrize(("limit", "kept"), [(1, [6]), (2, [5, 6]), (None, [1, 2, 3, 4, 5, 6])])
def test_save_total_limit(step: CompiledStep, data: Any, tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    trainer(step, data, tmp_path, max_steps=6, save_strategy="steps", save_steps=1, save_total_limit=limit).train()
    assert checkpoints(tmp_path) == kept


def test_saving_every_epoch_and_only_the_model(step: CompiledStep, data: Any, tmp_path: Path) -> None:
    trainer(step, data, tmp_path, num_train_epochs=2, save_strategy="epoch", save_only_model=True).train()
    assert checkpoints(tmp_path) == [3, 6]
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "run.json", "trainer_state.json"}


def test_the_trainers_state_counts_as_transformers_does(step: CompiledStep, data: Any, tmp_path: Path) -> None:
    trainer(step, data, tmp_path, num_train_epochs=2, save_strategy="epoch").train()
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["num_train_epochs"], state["epoch"]) == (6, 6, 2, 2.0)
    assert [row["step"] for row in state["log_history"] if "loss" in row] == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------------------------- what is logged


def test_metrics(step: CompiledStep, data: Any, tmp_path: Path) -> None:
    """Tokens add up to those of the data; rates are tokens over time; a second run starts the file anew."""
    for _ in range(2):
        trainer(step, data, tmp_path, num_train_epochs=1).train()
    rows = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    lines = [row for row in rows if "loss" in row]
    assert [row["step"] for row in lines] == [1, 2, 3]
    manager, train, _ = data
    items = [train[index] for index in range(len(train))]
    assert sum(row["tokens"] for row in lines) == sum(len(item["input_ids"]) for item in items)
    assert sum(row["trained_tokens"] for row in lines) == sum(int((item["labels"][1:] != -100).sum()) for item in items)
    batches = [batch["input_ids"].size for batch in manager.get_dataloader(train, 5)]
    assert sum(row["padded_tokens"] for row in lines) == sum(batches)
    for row in lines:
        assert row["padding_ratio"] == pytest.approx(1 - row["tokens"] / row["padded_tokens"], abs=1e-4)
        for kind in ("trained_tokens", "tokens", "padded_tokens"):
            seconds = row[kind] / row[f"{kind}_per_second"]
            assert seconds == pytest.approx(row["step_time_ms"] / 1000, rel=0.02)
        assert 50 < row["rss_mb"] < 50_000


def test_a_window_without_labels_is_refused(step: CompiledStep, data: Any, tmp_path: Path) -> None:
    """No step without a gradient, and no division by zero."""

    class Masked:
        lengths = data[1].lengths

        def __len__(self) -> int:
            return len(data[1])

        def __getitem__(self, index: int) -> Any:
            item = dict(data[1][index])
            return {**item, "labels": item["labels"] * 0 - 100}

    run = trainer(step, (data[0], Masked(), None), tmp_path, max_steps=2)
    with pytest.raises(InputError, match="every label of this optimizer step is masked"):
        run.train()

"""``QEfficient.cloud.finetune``: efficient-transformers' flags, defaults and results; a rate that falls by epochs."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from QEfficient.cloud import finetune
from QEfficient.errors import OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.options import split_options

COMMON = {"train_batch_size": 4, "context_length": 48, "intermediate_step_save": 8}


@pytest.fixture
def flags(tiny_checkpoint, rows_file, tmp_path):
    return {
        **COMMON,
        "model_name": str(tiny_checkpoint),
        "dataset": str(rows_file),
        "output_dir": str(tmp_path / "out"),
    }


def test_defaults_are_theirs():
    found = finetune.options({"model_name": "m"})
    assert found == {
        "model_id": "m", "dataset_name": "alpaca_dataset", "learning_rate": 3e-4, "epoch_decay": 0.85,
        "weight_decay": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 4, "seed": 42, "target": "host", "save_strategy": "steps", "save_steps": 250,
        "eval_strategy": "epoch", "lora_config": {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    }  # fmt: skip
    what, how = split_options(found)
    assert isinstance(what, QEffConfig)
    assert how.epoch_decay == 0.85


def test_flags_become_options(tmp_path):
    lora = tmp_path / "lora.yaml"
    lora.write_text("r: 4\ntarget_modules: all-linear\n")
    found = finetune.options(
        {
            "model_name": "m", "task_type": "seq_classification", "batch_size_training": 8, "max_train_step": 10,
            "gradient_accumulation_steps": 3, "run_validation": False, "peft_config_file": lora, "save_model": False,
            "batching_strategy": "packing", "device": "cpu:0",
        }
    )  # fmt: skip
    wanted = {
        "task": "seq_classification", "per_device_train_batch_size": 8, "max_steps": 4, "train_frac": 1.0,
        "lora_config": str(lora), "save_strategy": "no", "packing": True, "target": "host",
    }  # fmt: skip
    assert wanted.items() <= found.items()
    assert "eval_strategy" not in found
    assert finetune.options({"model_name": "m", "use_peft": False})["lora_config"] is None


def test_what_has_no_effect_is_said():
    with pytest.warns(UserWarning, match="grad_scaler has no effect: the step computes in float32"):
        finetune.options({"model_name": "m", "grad_scaler": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finetune.options({"model_name": "m", "enable_pp": False, "max_eval_step": 0})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "name a model"),
        ({"modelname": "m"}, "Did you mean 'model_name'"),
        ({"model_name": "m", "enable_pp": True}, "enable_pp is not available"),
        ({"model_name": "m", "device": "cuda"}, "device must be one of cpu, host, qaic"),
        ({"model_name": "m", "peft_method": "ia3"}, "peft_method must be 'lora'"),
        ({"model_name": "m", "batching_strategy": "wrap"}, "batching_strategy must be"),
        ({"model_name": "m", "from_peft_checkpoint": "x"}, "continues from its last checkpoint"),
    ],
)
def test_bad_flags(flags, words):
    with pytest.raises(OptionError, match=words):
        finetune.options(flags)


def test_a_run_and_its_results(flags):
    """Losses and rates against the run's own records, the rate's fall against torch's StepLR."""
    results = finetune.main(**flags, num_epochs=3, gamma=0.5, gradient_accumulation_steps=2, lr=1e-2)
    output = Path(flags["output_dir"])
    rows = [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert results["metrics_filename"] == str(output / "logs" / "metrics.jsonl")
    assert results["train_step_loss"] == [row["loss"] for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row and row["step"]]
    assert results["eval_step_loss"] == [row["eval_loss"] for row in evaluations]
    assert len(evaluations) == 3
    assert results["last_epoch_eval_metric"] == pytest.approx(math.exp(results["last_epoch_eval_loss"]))
    assert results["last_epoch_eval_loss"] < evaluations[0]["eval_loss"]
    assert results["avg_epoch_time"] > 0
    assert results["avg_checkpoint_time"] > 0
    assert (output / "adapter_config.json").is_file()
    assert json.loads((output / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]

    of_epoch = 5  # 39 training rows, 4 a batch, 2 batches an optimizer step
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=of_epoch, gamma=0.5)
    rates = []
    for _ in range(3 * of_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    found = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    assert found
    assert all(rates[step - 1] == pytest.approx(rate) for step, rate in found.items()), found


def test_the_command_line(flags, capsys):
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    finetune.run([*words, "--max-train-step", "4", "--no-run-validation", "--lr", "1e-3"])
    output = Path(flags["output_dir"])
    assert capsys.readouterr().out.strip() == str(output / "logs" / "metrics.jsonl")
    assert (output / "adapter_model.safetensors").is_file()
    rows = [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 1, "4 micro-batches are one optimizer step"
    assert not [row for row in rows if "eval_loss" in row]
    assert AutoTokenizer.from_pretrained(output).eos_token


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model_name", "m", "--lr", "fast"], "invalid float value"),
        (["--model_name", "m", "--learning-rate", "1"], "there is no flag --learning-rate"),
        (["--model_name", "m", "--run_validation", "maybe"], "neither true nor false"),
        (["--lr", "1e-4"], "name a model"),
        (["--model_name", "missing/dir/here", "--dataset", "sample"], "missing/dir/here"),
    ],
)
def test_a_bad_command_line(words, said, capsys, tmp_path):
    with pytest.raises(SystemExit, match=r"^2$"):
        finetune.run([*words, "--output_dir", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1

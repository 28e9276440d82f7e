"""Training a kit with numpy and ONNX Runtime alone, against torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_causal_lm

from QEfficient.errors import InputError, PackageError, TrainingError
from QEfficient.finetune import CompiledStep, PackageTrainer

_BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "safetensors", "onnx", "onnx_ir", "onnxscript"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import numpy as np
from QEfficient.finetune import PackageTrainer
data = np.load(sys.argv[2])
with PackageTrainer(sys.argv[1], weight_decay=0.01, max_norm=0.5) as trainer:
    for i in range(6):
        parts = [{k: data[f"{k}{i}{half}"] for k in ("input_ids", "attention_mask", "labels")} for half in "ab"]
        trainer.step(parts, 1e-3)
    trainer.save(sys.argv[3])
"""


def _adapted() -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(tiny_causal_lm("llama"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _batches() -> list[list[dict[str, np.ndarray]]]:
    source = np.random.default_rng(0)
    found = []
    for _ in range(6):
        pair = []
        for rows, length in ((3, 20), (1, 7)):  # micro-batches of unequal size
            ids = source.integers(1, 100, (rows, length))
            mask = np.ones_like(ids)
            mask[0, length - 2 :] = 0
            labels = np.where(mask == 1, ids, -100)
            labels[:, :3] = -100
            pair.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        found.append(pair)
    return found


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return _adapted()


@pytest.fixture(scope="module")
def kit(model: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CompiledStep.from_model(model).save_kit(tmp_path_factory.mktemp("kit") / "kit")


def test_trains_without_torch_as_torch_does(kit: Path, tmp_path: Path) -> None:
    batches = _batches()
    arrays = {
        f"{k}{i}{half}": a
        for i, pair in enumerate(batches)
        for half, b in zip("ab", pair, strict=True)
        for k, a in b.items()
    }
    np.savez(tmp_path / "data.npz", **arrays)
    command = [sys.executable, "-c", _BLOCKED, str(kit), str(tmp_path / "data.npz"), str(tmp_path / "tuned")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

    reference = _adapted()
    trained = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    for pair in batches:
        total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in pair)
        optimizer.zero_grad()
        for batch in pair:
            ids, mask, labels = (torch.tensor(batch[k]) for k in ("input_ids", "attention_mask", "labels"))
            logits = reference(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
            )
            (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
    tuned = PeftModel.from_pretrained(tiny_causal_lm("llama"), str(tmp_path / "tuned"))
    wanted = {n: p for n, p in reference.named_parameters() if "lora_" in n}
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(parameter.detach(), wanted[name].detach(), rtol=0, atol=1e-5)


def test_a_checkpoint_continues_to_the_same_bits(kit: Path, tmp_path: Path) -> None:
    batches = _batches()
    with PackageTrainer(kit, max_norm=1.0) as whole:
        for pair in batches:
            whole.step(pair, 1e-3)
        end = {n: v.copy() for n, v in whole.optimizer.parameters.items()}
        loss = whole.evaluate(batches[0])
    with PackageTrainer(kit, max_norm=1.0) as first:
        for pair in batches[:2]:
            first.step(pair, 1e-3)
        first.save_checkpoint(tmp_path / "checkpoint")
    with PackageTrainer(kit, max_norm=1.0) as second:
        second.load_checkpoint(tmp_path / "checkpoint")
        assert second.steps == 2
        for pair in batches[2:]:
            second.step(pair, 1e-3)
        assert all(np.array_equal(v, end[n]) for n, v in second.optimizer.parameters.items())
        assert second.evaluate(batches[0]) == loss


def test_a_broken_step_changes_nothing(kit: Path) -> None:
    with PackageTrainer(kit) as trainer:
        trainer.step(_batches()[0], 1e-3)
        before = {n: v.copy() for n, v in trainer.optimizer.parameters.items()}
        bad = {**_batches()[0][0], "labels": np.full((3, 20), -100)}
        with pytest.raises(InputError, match="masked"):
            trainer.step([bad], 1e-3)
        weights = np.full((3, 20), np.float32(1e38))
        with pytest.raises(TrainingError):
            trainer.step([{**_batches()[0][0], "weights": weights * np.float32(3)}], 1e-3)
        assert all(np.array_equal(v, before[n]) for n, v in trainer.optimizer.parameters.items())
        assert trainer.steps == 1


def test_what_is_no_kit_is_refused(kit: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="not a training kit"):
        PackageTrainer(tmp_path)
    with PackageTrainer(kit) as trainer:
        with pytest.raises(PackageError, match="not a checkpoint"):
            trainer.load_checkpoint(tmp_path)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("x")
        with pytest.raises(PackageError, match="not empty"):
            trainer.save(tmp_path / "full")
        assert (tmp_path / "full" / "mine").read_text() == "x"

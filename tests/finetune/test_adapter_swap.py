"""Train, then serve: adapters trained through one compiled step, loaded by PEFT, swapped in one compiled package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from step_models import IGNORED, base_model, compiled, trained, with_lora
from tiny_models import greedy_reference, sample_prompt, save_tiny

from QEfficient import QEFFAutoPeftModelForCausalLM
from QEfficient.errors import OptionError, PackageError
from QEfficient.finetune import CompiledStep
from QEfficient.finetune.trainer import load_trained, save_trained

PROMPT = sample_prompt(10)
NEW = 8
#: What the two adapters learn to answer.
ANSWERS = {"up": [20, 21, 22, 23, 24, 25, 26, 27], "down": [90, 89, 88, 87, 86, 85, 84, 83]}
ALPHAS = {"up": 8, "down": 24}


def teach(step: CompiledStep, answer: list[int]) -> float:
    """Trains prompt -> answer with a plain torch optimizer until it is learned; returns the last loss."""
    ids = torch.tensor([PROMPT + answer])
    labels = torch.tensor([[IGNORED] * len(PROMPT) + answer])
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-2)
    loss = torch.ones(())
    for _ in range(150):
        optimizer.zero_grad()
        loss = step(input_ids=ids, labels=labels)
        if float(loss.detach()) < 0.02:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(base_model("llama"), tmp_path_factory.mktemp("swap") / "base")


@pytest.fixture(scope="module")
def adapters(checkpoint: Path) -> dict[str, Path]:
    """Both trained through the same package, though their alphas differ."""
    packages, found = set(), {}
    for name, answer in ANSWERS.items():
        model = with_lora("llama", seed=1, lora_alpha=ALPHAS[name], task_type="CAUSAL_LM")
        model.peft_config["default"].base_model_name_or_path = str(checkpoint)
        step = compiled(model)
        packages.add(step.packages.train)
        assert teach(step, answer) < 0.05
        found[name] = checkpoint.parent / name
        found[name].mkdir()
        save_trained(step, found[name])
        step.close()
    assert len(packages) == 1
    return found


def reference(adapter: Path | None) -> list[int]:
    model: Any = base_model("llama")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return greedy_reference(model.eval(), PROMPT, NEW)[0]


def test_peft_reads_what_was_trained(adapters: dict[str, Path]) -> None:
    """In plain PEFT each adapter gives the answer it was taught."""
    for name, directory in adapters.items():
        assert sorted(path.name for path in directory.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert reference(directory) == ANSWERS[name]
    assert reference(None) not in ANSWERS.values()


def test_swapped_in_one_compiled_package(adapters: dict[str, Path], checkpoint: Path) -> None:
    model = QEFFAutoPeftModelForCausalLM.from_pretrained(adapters["up"], adapter_name="up")
    package = model.compile(ctx_len=24, prefill_seq_len=8, progress=False)
    model.load_adapter(adapters["down"], "down")

    def tokens(**arguments: Any) -> list[int]:
        ids = model.generate(input_ids=np.array([PROMPT]), max_new_tokens=NEW, **arguments)
        return ids[0, len(PROMPT) :].tolist()

    for name in ("up", "down", "up", None, "down"):
        model.set_adapter(name)
        assert tokens() == reference(adapters[name] if name is not None else None), name
    assert tokens(adapter_name="up") == ANSWERS["up"]
    assert model.qpc_path == package


def test_merged_weights_give_the_same_tokens(adapters: dict[str, Path]) -> None:
    merged: Any = PeftModel.from_pretrained(base_model("llama"), str(adapters["up"])).merge_and_unload()
    assert greedy_reference(merged.eval(), PROMPT, NEW)[0] == ANSWERS["up"]


def test_saved_tensors_are_the_steps_parameters(adapters: dict[str, Path], tmp_path: Path) -> None:
    """Under PEFT's names, and back: bit by bit, in a step of another seed."""
    step = compiled(with_lora("llama", seed=7))
    stored = load_file(adapters["down"] / "adapter_model.safetensors")
    assert set(stored) == {step.file_names[name] for name in trained(step)}
    load_trained(step, adapters["down"])
    for name, parameter in trained(step).items():
        assert torch.equal(parameter.detach(), stored[step.file_names[name]])
    save_trained(step, tmp_path)
    again = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


def test_peft_continues_from_the_step(adapters: dict[str, Path]) -> None:
    """An adapter that was trained here trains on in torch, and the other way round: the same loss at the seam."""
    model: Any = PeftModel.from_pretrained(base_model("llama"), str(adapters["up"]), is_trainable=True).eval()
    ids = torch.tensor([PROMPT + ANSWERS["up"]])
    labels = torch.tensor([[IGNORED] * len(PROMPT) + ANSWERS["up"]])
    with torch.no_grad():
        wanted = float(model(input_ids=ids, labels=labels).loss)
        assert float(compiled(model)(input_ids=ids, labels=labels)) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda path: (path / "adapter_model.safetensors").unlink(), PackageError, "neither adapter_model"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"\x08" * 40), PackageError, "cannot be read"),
    ],
)
def test_a_damaged_adapter_is_refused(
    adapters: dict[str, Path], tmp_path: Path, damage: Callable[[Path], Any], error: type[Exception], words: str
) -> None:
    step = compiled(with_lora("llama", seed=7))
    before = copy.deepcopy({name: p.detach() for name, p in trained(step).items()})
    save_trained(step, tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=words):
        load_trained(step, tmp_path)
    assert all(torch.equal(p.detach(), before[name]) for name, p in trained(step).items())


def test_an_adapter_of_another_rank_is_refused(adapters: dict[str, Path], tmp_path: Path) -> None:
    other = compiled(with_lora("llama", r=2, target_modules=["q_proj"]))
    save_trained(other, tmp_path)
    with pytest.raises(OptionError, match="another model or adapter"):
        load_trained(compiled(with_lora("llama", seed=7)), tmp_path)
    with pytest.raises(OptionError, match=r"has shape \(4, 64\), this run trains \(2, 64\)"):
        load_trained(other, adapters["up"])

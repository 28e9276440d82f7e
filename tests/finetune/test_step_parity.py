"""A hundred optimizer steps through a compiled step and through torch give the same losses and the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_models import (
    CLASSIFIERS,
    base_model,
    class_batch,
    compiled,
    counted,
    relative,
    step_gradients,
    token_batch,
    torch_gradients,
    torch_logprobs,
    trained,
    with_lora,
)
from transformers import get_cosine_schedule_with_warmup

STEPS = 100
#: Rows of a micro-batch, by length: ragged, of one row, of one shape and another, one row of two tokens.
RAGGED = ([11, 7], [9], [5, 13, 8], [2], [16, 3])
TOLERANCE = 1e-5


def windows(family: str, steps: int) -> list[list[dict[str, torch.Tensor]]]:
    """``steps`` accumulation windows of two micro-batches with different numbers of trained tokens."""
    make = class_batch if family in CLASSIFIERS else token_batch
    return [[make(RAGGED[(2 * n + k) % len(RAGGED)], seed=2 * n + k) for k in range(2)] for n in range(steps)]


def train(model: torch.nn.Module, family: str, lr: float, steps: int, loss_of: Any) -> tuple[list[float], list[float]]:
    """AdamW, clipping, warm-up and cosine decay, token-weighted accumulation; returns losses and gradient norms."""
    parameters = list(trained(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    losses, norms = [], []
    for window in windows(family, steps):
        optimizer.zero_grad()
        total = sum(counted(batch) for batch in window)
        value = 0.0
        for batch in window:
            loss = loss_of(batch, total)
            loss.backward()
            value += float(loss.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        scheduler.step()
        losses.append(value)
    return losses, norms


def compare(model: Any, family: str, lr: float = 1e-3, steps: int = STEPS) -> None:
    step = compiled(model)
    assert list(trained(step)) == list(trained(model))
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    wanted, norms = train(model, family, lr, steps, lambda b, n: -torch_logprobs(model, b).sum() / n)
    found, _ = train(step, family, lr, steps, lambda b, n: step(**b, normaliser=n))
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= TOLERANCE
    tuned = trained(model)
    differences = {n: float(decided(n, tuned[n] - p).abs().max()) for n, p in trained(step).items()}
    assert max(differences.values()) <= TOLERANCE, max(differences, key=differences.__getitem__)
    # Not vacuous: clipping was active, and every tensor moved much further than the tolerance.
    assert max(norms) > 1.0
    moved = [float(decided(n, tuned[n] - before[n]).abs().max()) for n in tuned if decided(n, before[n]).any()]
    assert min(moved) > 50 * TOLERANCE
    step.close()


def decided(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that has a gradient: 0 in place of a key's bias.

    That adds the same to all scores of a query, which softmax takes out again: its gradient is nothing but rounding,
    and AdamW makes steps of the learning rate's size out of it.
    """
    tensor = tensor.detach()
    if name.endswith("attention.self.key.bias"):
        return torch.zeros_like(tensor)
    if name.endswith("attn.c_attn.bias"):
        query, _, value = tensor.chunk(3)
        return torch.cat([query, value])
    return tensor


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gpt2",
        "gemma2",
        "mistral",
        *(pytest.param(name, marks=pytest.mark.sweep) for name in ("qwen2", "phi3")),
    ],
)
def test_lora(family: str) -> None:
    compare(with_lora(family), family)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_full_fine_tuning(family: str) -> None:
    compare(base_model(family).requires_grad_(True), family, lr=1e-4)


def test_tied_embedding_trains_once() -> None:
    """GPT-2's embedding is its output head: one parameter whose gradient is the sum of both uses."""
    model = base_model("gpt2").requires_grad_(True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    compare(model, "gpt2", lr=1e-4, steps=30)


def test_lora_on_experts_and_attention() -> None:
    """Mixtral's experts are stacked tensors: PEFT adapts them as parameters."""
    settings = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = with_lora("mixtral", target_modules=["q_proj", "v_proj"], **settings)
    assert any("experts" in name for name in trained(model))
    compare(model, "mixtral")


@pytest.mark.sweep
def test_lora_of_a_model_with_shared_experts() -> None:
    compare(with_lora("qwen2_moe"), "qwen2_moe", steps=30)


def test_chosen_parameters_only() -> None:
    """Name patterns instead of flags; what is not named keeps its value and gets no gradient."""
    model = base_model("llama").requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    assert sorted(trained(model)) == ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
    compare(model, "llama", steps=30)


def test_the_adapters_scaling_is_an_input() -> None:
    """Another alpha, rank-stabilised scaling: the same package, with the numbers of a fresh torch model."""
    batch = token_batch([9, 6])
    packages, losses = set(), []
    for options in ({"lora_alpha": 8}, {"lora_alpha": 20}, {"lora_alpha": 8, "use_rslora": True}):
        model = with_lora("llama", **options)
        step = compiled(model)
        packages.add(step.packages.train)
        with torch.no_grad():
            losses.append((float(step(**batch)), float(-torch_logprobs(model, batch).sum() / counted(batch))))
        found, wanted = step_gradients(step, batch)[1], torch_gradients(model, -torch_logprobs(model, batch).mean())
        count = batch["labels"].numel() / counted(batch)
        assert relative(found, {name: gradient * count for name, gradient in wanted.items()}) < TOLERANCE
    assert len(packages) == 1
    assert max(abs(mine - torchs) for mine, torchs in losses) < TOLERANCE
    assert len({round(mine, 3) for mine, _ in losses}) == 3

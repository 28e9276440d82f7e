"""Tiny models that train, their compiled steps, and torch's own loss as the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import NUM_LABELS, VOCAB_SIZE, sharpen, tiny_causal_lm, tiny_classifier
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from QEfficient.finetune import CompiledStep, StepOptions

IGNORED = -100
CLASSIFIERS = ("bert",)
#: "all-linear" would give GPT-2's Conv1D layers an adapter as well, but not every PEFT version agrees.
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "bert": ["query", "value"]}
_QWEN2_MOE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def base_model(family: str, seed: int = 0) -> Any:
    """Two layers, float32; eager attention, because only that honours every family's soft caps."""
    options = {"attn_implementation": "eager", "num_hidden_layers": 2}
    if family in ("gpt2",):
        options = {"attn_implementation": "eager", "n_layer": 2}
    if family in CLASSIFIERS:
        return tiny_classifier(family, seed, **options)
    if family == "qwen2_moe":
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            config = AutoConfig.for_model("qwen2_moe", **_QWEN2_MOE)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
            sharpen(model, seed)
        return model
    return tiny_causal_lm(family, seed, **options)


def with_lora(family: str, seed: int = 0, **options: Any) -> Any:
    """The model with an adapter whose B is not zero: otherwise every gradient of A would be."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS.get(family, "all-linear"), **options}
    model = get_peft_model(base_model(family), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            elif "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def compiled(model: Any, **options: Any) -> CompiledStep:
    """The model's step with its own copy of what trains; the cache of the run holds the package."""
    chosen = StepOptions(**options) if options else None
    return CompiledStep.from_model(model, options=chosen, threads=1, progress=False)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def token_batch(sizes: list[int], seed: int = 0, prompt: float = 0.25) -> dict[str, torch.Tensor]:
    """Rows of these lengths, padded on the right; the first quarter of each is prompt and is not trained."""
    generator = torch.Generator().manual_seed(seed)
    length = max(sizes)
    ids = torch.randint(4, VOCAB_SIZE, (len(sizes), length), generator=generator)
    columns = torch.arange(length)[None]
    sizes_ = torch.tensor(sizes)[:, None]
    mask = (columns < sizes_).long()
    begins = torch.clamp((sizes_ * prompt).long(), min=1)
    labels = torch.where((columns >= begins) & (mask == 1), ids, IGNORED)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def class_batch(sizes: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of these lengths with a class each."""
    generator = torch.Generator().manual_seed(seed)
    batch = token_batch(sizes, seed)
    batch["labels"] = torch.randint(0, NUM_LABELS, (len(sizes),), generator=generator)
    return batch


def counted(batch: Mapping[str, torch.Tensor]) -> int:
    """Labels that train: in a language model the first column never does."""
    labels = batch["labels"]
    return int((labels != IGNORED).sum() if labels.dim() == 1 else (labels[:, 1:] != IGNORED).sum())


def torch_logprobs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """log p of every label at its own column, [batch, seq] (or [batch]); 0 where there is none."""
    labels = batch["labels"]
    named = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**named).logits.float()
    if labels.dim() == 1:
        found = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        return torch.where(labels != IGNORED, found, 0.0)
    found = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return nn.functional.pad(torch.where(labels[:, 1:] != IGNORED, found, 0.0), (1, 0))


def gradients(model: nn.Module) -> dict[str, np.ndarray]:
    """Copies of all gradients; zeros where torch has none."""
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).detach().clone().numpy()
        for name, p in trained(model).items()
    }


def step_gradients(step: CompiledStep, *calls: Mapping[str, Any]) -> tuple[float, dict[str, np.ndarray]]:
    """Sum of the losses of several calls, and their accumulated gradients."""
    step.zero_grad()
    total = 0.0
    for call in calls:
        loss = step(**call)
        loss.backward()
        total += float(loss.detach())
    found = gradients(step)
    step.zero_grad()
    return total, found


def torch_gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, np.ndarray]:
    model.zero_grad()
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    return found


def relative(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """The norm of the difference relative to the norm of ``wanted``, of the tensor where that is largest."""
    assert got.keys() == wanted.keys()
    norm = np.linalg.norm
    return max(float(norm(got[n] - wanted[n]) / max(norm(wanted[n]), 1e-6)) for n in wanted)


def apart(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """The same over all tensors as one vector: the relative error of the whole gradient."""
    assert got.keys() == wanted.keys()
    both = [np.concatenate([tensors[name].ravel() for name in wanted]) for tensors in (got, wanted)]
    return float(np.linalg.norm(both[0] - both[1]) / np.linalg.norm(both[1]))

"""What an adapter's tensors start as where that depends on the base model's weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from QEfficient.exporter.adapters import base_name, dora_layer
from QEfficient.finetune.initial import Start

#: What PEFT puts into the name of a module it trains whole.
_COPY = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
_ROWS = ".token_adapter.trainable_tokens_delta."
_MAGNITUDE = ".lora_magnitude_vector."


def adapter_starts(model: nn.Module, trained: Iterable[str], adapter: str) -> dict[str, Start]:
    """Trained tensors that begin as something of the base model's; LoRA's factors and IA3's vectors do not.

    Args:
        model: a PEFT model whose own tensors have content, its base weights need not.
        trained: names of its parameters.
    """
    found = {}
    for name in trained:
        if _COPY.search(name):
            found[name] = Start(_COPY.sub("", base_name(name)))
        elif _ROWS in name:
            place = name.partition(_ROWS)[0]
            layer: Any = model.get_submodule(f"{place}.token_adapter")
            rows = torch.tensor(layer.token_indices[adapter])
            found[name] = Start(f"{base_name(place)}.weight", partial(_rows, rows=rows))
        elif _MAGNITUDE in name:
            place = name.partition(_MAGNITUDE)[0]
            module = model.get_submodule(place)
            found[name] = Start(f"{base_name(place)}.weight", partial(_magnitudes, module=module, adapter=adapter))
    return found


def _rows(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return weight[rows].clone()


@torch.no_grad()
def _magnitudes(weight: torch.Tensor, module: Any, adapter: str) -> torch.Tensor:
    """The norm of every output's weights, the adapter included (PEFT's rule; arXiv:2402.09353, section 4.1)."""
    if adapter in module.lora_A:
        left, right = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    else:
        left, right = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    norm: torch.Tensor = dora_layer(module, adapter).get_weight_norm(weight, right @ left, module.scaling[adapter])
    return norm

"""The transformed torch module, runnable in eager mode: what is exported, before it is exported."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from QEfficient.transforms.pytorch.patching import patched, use_our_attention
from QEfficient.transforms.pytorch.pooling import Pool
from QEfficient.transforms.pytorch.state import StateLayout
from QEfficient.transforms.pytorch.wrappers import CausalStep, Encoder


class TransformedModel(nn.Module):
    """A model with our cache, mask, attention and scans in place; shares its weights with the original.

    The forward signature is that of the exported graph: `CausalStep` or `Encoder`. The original model is not changed.
    """

    def __init__(self, step: CausalStep | Encoder, model: PreTrainedModel) -> None:
        super().__init__()
        self.step, self.inner = step, model

    @classmethod
    def causal(cls, model: PreTrainedModel, layout: StateLayout) -> TransformedModel:
        twin = sharing_weights(model)
        use_our_attention(twin)
        return cls(CausalStep(twin, layout, loop_scans=True).eval(), twin)

    @classmethod
    def encoder(cls, model: PreTrainedModel, pool: Pool | None, output: str) -> TransformedModel:
        twin = sharing_weights(model)
        use_our_attention(twin)
        return cls(Encoder(twin, pool, output).eval(), twin)

    @property
    def layout(self) -> StateLayout:
        """The states of a causal model."""
        if not isinstance(self.step, CausalStep):
            raise TypeError("an encoder keeps no state")
        return self.step.layout

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one step; arguments are those of the wrapped module."""
        with patched(self.inner):
            return self.step(*args, **kwargs)


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree and the config around the same parameter and buffer objects."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} | {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo)

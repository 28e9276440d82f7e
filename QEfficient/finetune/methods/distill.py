"""Distillation: the student learns a teacher's probabilities beside the answers of the data."""

from __future__ import annotations

import numpy as np
import torch

from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.finetune.meter import perplexity
from QEfficient.finetune.methods.base import Measured, Tensors, Weighed, tensors
from QEfficient.finetune.methods.cross_entropy import TokenCrossEntropy
from QEfficient.finetune.step_session import trained_places


class Distill(TokenCrossEntropy):
    """Forward KL divergence from a teacher, with cross entropy.

    With N trained tokens, teacher p and student q over the teacher's K likeliest tokens::

        L = [(1 - weight) * -sum(log q(label)) + weight * sum(sum_k p_k * (log p_k - log q_k))] / N

    (Hinton et al. 2015, arXiv:1503.02531, at temperature 1). The batch has ``teacher_ids`` int64 and
    ``teacher_logprobs`` float32 [rows, seq, K], of the token at the same column.

    Args:
        weight: of the divergence, from 0 to 1.
    """

    def __init__(self, weight: float = 0.5) -> None:
        self.weight = weight

    def weigh(self, step: CompiledStep, batch: Tensors, items: float) -> Weighed:
        return Weighed({**batch, **self._weights(batch, items)}, 1.0)

    def measure(self, step: CompiledStep, batch: Tensors) -> Measured:
        with torch.no_grad():
            loss = float(step(**batch, **self._weights(batch, 1.0), normaliser=1.0))
        assert step.last is not None
        return Measured(self.count(batch), loss, {"cross_entropy": -float(step.last.logprobs.astype(np.float64).sum())})

    def summary(self, measured: Measured) -> dict[str, float]:
        means = measured.means()
        return {**means, "perplexity": perplexity(means["cross_entropy"])}

    def _weights(self, batch: Tensors, items: float) -> dict[str, torch.Tensor]:
        places = trained_places(batch["labels"].numpy(), batch["attention_mask"].numpy()) / items
        own = places * batch["weights"].numpy() if "weights" in batch else places
        return tensors(
            weights=((1 - self.weight) * own).astype(np.float32),
            teacher_weights=(self.weight * places).astype(np.float32),
        )

"""Cross entropy: of the trained tokens of text, and of the classes of a classifier."""

from __future__ import annotations

import numpy as np
import torch

from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.finetune.meter import perplexity
from QEfficient.finetune.methods.base import Measured, Method, Tensors, Weighed, trained_tokens
from QEfficient.finetune.step_session import IGNORED


class TokenCrossEntropy(Method):
    """Supervised fine-tuning: minus the log-probability per trained token."""

    def count(self, batch: Tensors) -> int:
        return int(trained_tokens(batch).sum())

    def weigh(self, step: CompiledStep, batch: Tensors, items: float) -> Weighed:
        return Weighed(dict(batch), items)

    def measure(self, step: CompiledStep, batch: Tensors) -> Measured:
        return Measured(self.count(batch), _loss(step, batch))

    def summary(self, measured: Measured) -> dict[str, float]:
        return {"perplexity": perplexity(measured.loss / measured.count)}


class ClassCrossEntropy(Method):
    """Sequence classification: minus the log-probability per row."""

    unit = "row"

    def count(self, batch: Tensors) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def weigh(self, step: CompiledStep, batch: Tensors, items: float) -> Weighed:
        return Weighed(dict(batch), items)

    def measure(self, step: CompiledStep, batch: Tensors) -> Measured:
        loss = _loss(step, batch)
        assert step.last is not None
        labels = batch["labels"].numpy()
        right = (step.last.logprobs.argmax(1) == labels) & (labels != IGNORED)
        return Measured(self.count(batch), loss, {"accuracy": float(np.sum(right))})


def _loss(step: CompiledStep, batch: Tensors) -> float:
    """The sum of a batch's loss, without a backward pass."""
    with torch.no_grad():
        return float(step(**batch, normaliser=1.0))

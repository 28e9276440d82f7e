"""KTO: answers that are good or bad by themselves."""

from __future__ import annotations

import numpy as np

from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.finetune.losses import kto_weights, spread
from QEfficient.finetune.methods.base import (
    Measured,
    Method,
    Tensors,
    Weighed,
    sequence_logprobs,
    tensors,
    tokens_of,
    trained_tokens,
)


class Kto(Method):
    """Kahneman-Tversky optimisation.

    The batch is the answers, then a mismatched answer to the prompt of each, with ``desirable`` bool [answers] and
    ``reference`` float [answers, 2]. The mismatched ones estimate the divergence from the reference, per micro-batch.

    Args:
        beta: how strongly the policy is held to the reference.
        desirable_weight, undesirable_weight: of good and of bad answers, for data that has more of one.
    """

    unit = "answer"

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight

    def count(self, batch: Tensors) -> int:
        return int(self._counted(batch).sum())

    def weigh(self, step: CompiledStep, batch: Tensors, items: float) -> Weighed:
        values, measured = self._judged(step, batch)
        answers = {name: tensor[: len(values)] for name, tensor in tokens_of(batch).items()}
        places = answers["labels"].numpy(), answers["attention_mask"].numpy()
        weights = spread(values * (measured.count / items), *places)
        return Weighed({**answers, **tensors(weights=weights)}, 1.0, measured)

    def measure(self, step: CompiledStep, batch: Tensors) -> Measured:
        return self._judged(step, batch)[1]

    @staticmethod
    def _counted(batch: Tensors) -> np.ndarray:
        found: np.ndarray = trained_tokens(batch).reshape(2, -1)[0] > 0
        return found

    def _judged(self, step: CompiledStep, batch: Tensors) -> tuple[np.ndarray, Measured]:
        """A weight of every answer, and totals."""
        counted, values = self._counted(batch), np.zeros(len(batch["desirable"]), np.float32)
        if not counted.any():
            return values, Measured(0, 0.0)
        ratio = sequence_logprobs(step, batch).reshape(2, -1) - batch["reference"].numpy().astype(np.float64).T
        own, good = ratio[0, counted], batch["desirable"].numpy()[counted]
        kl = max(float(ratio[1, counted].mean()), 0.0)
        found = kto_weights(
            own, np.zeros_like(own), good, kl, self.beta, self.desirable_weight, self.undesirable_weight
        )
        values[counted] = found.weights
        count = int(counted.sum())
        right = (own > kl) == good
        sums = {"rewards": float(self.beta * own.sum()), "rewards/accuracies": float(right.sum()), "kl": kl * count}
        return values, Measured(count, found.loss * count, sums)

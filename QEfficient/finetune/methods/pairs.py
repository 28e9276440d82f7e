"""Methods that compare two answers to one prompt by their log-probabilities: DPO and ORPO."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.finetune.losses import PairWeights, dpo_weights, orpo_weights, spread
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


class PairMethod(Method):
    """A batch is the chosen answers of its pairs, then the rejected ones; a pair without labels counts for nothing."""

    unit = "pair"

    def count(self, batch: Tensors) -> int:
        return int(self._counted(batch).sum())

    def weigh(self, step: CompiledStep, batch: Tensors, items: float) -> Weighed:
        weights, measured = self._compared(step, batch)
        values = np.concatenate([weights.chosen, weights.rejected])
        tokens = tokens_of(batch)
        of_tokens = spread(
            values * (measured.count / items), tokens["labels"].numpy(), tokens["attention_mask"].numpy()
        )
        return Weighed({**tokens, **tensors(weights=of_tokens)}, 1.0, measured)

    def measure(self, step: CompiledStep, batch: Tensors) -> Measured:
        return self._compared(step, batch)[1]

    @staticmethod
    def _counted(batch: Tensors) -> np.ndarray:
        return np.all(trained_tokens(batch).reshape(2, -1) > 0, axis=0)

    def _compared(self, step: CompiledStep, batch: Tensors) -> tuple[PairWeights, Measured]:
        """Weights of every row, in the batch's order, and totals."""
        counted = self._counted(batch)
        if not counted.any():
            none = np.zeros(counted.size, np.float32)
            return PairWeights(0.0, none, none), Measured(0, 0.0)
        logprobs = sequence_logprobs(step, batch).reshape(2, -1)
        found, sums = self._compare(logprobs[:, counted], batch, counted)
        chosen, rejected = np.zeros((2, counted.size), np.float32)
        chosen[counted], rejected[counted] = found.chosen, found.rejected
        sums |= {"logps/chosen": logprobs[0, counted], "logps/rejected": logprobs[1, counted]}
        count = int(counted.sum())
        totals = Measured(count, found.loss * count, {name: float(np.sum(values)) for name, values in sums.items()})
        return PairWeights(found.loss, chosen, rejected), totals

    @abstractmethod
    def _compare(
        self, logprobs: np.ndarray, batch: Tensors, counted: np.ndarray
    ) -> tuple[PairWeights, dict[str, np.ndarray]]:
        """The weights of pairs and metrics of each.

        Args:
            logprobs: of the chosen and the rejected answers, float64 [2, pairs].
            counted: which pairs of the batch these are.
        """


class Dpo(PairMethod):
    """Direct preference optimisation; the batch has ``reference`` float [pairs, 2] unless it is reference-free.

    Args:
        beta: how strongly the policy is held to the reference.
        reference_free: take every reference log-probability as 0.
    """

    def __init__(self, beta: float = 0.1, reference_free: bool = False) -> None:
        self.beta, self.reference_free = beta, reference_free

    def _compare(
        self, logprobs: np.ndarray, batch: Tensors, counted: np.ndarray
    ) -> tuple[PairWeights, dict[str, np.ndarray]]:
        if self.reference_free:
            reference = np.zeros_like(logprobs)
        else:
            reference = batch["reference"].numpy().astype(np.float64).T[:, counted]
        rewards = self.beta * (logprobs - reference)
        found = dpo_weights(logprobs[0], logprobs[1], reference[0], reference[1], self.beta)
        return found, _rewards(rewards)


class Orpo(PairMethod):
    """Odds ratio preference optimisation, which needs no reference.

    Args:
        beta: weight of the odds ratio beside the cross entropy of the chosen answers.
    """

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = beta

    def _compare(
        self, logprobs: np.ndarray, batch: Tensors, counted: np.ndarray
    ) -> tuple[PairWeights, dict[str, np.ndarray]]:
        lengths = trained_tokens(batch).reshape(2, -1)[:, counted]
        found = orpo_weights(logprobs[0], logprobs[1], lengths[0], lengths[1], self.beta)
        return found, _rewards(self.beta * logprobs / lengths)


def _rewards(rewards: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics under TRL's names, from rewards [2, pairs]."""
    return {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "rewards/accuracies": rewards[0] > rewards[1],
    }

"""Reward models: a score that is higher for the better of two answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.finetune.losses import reward_weights
from QEfficient.finetune.methods.base import Measured, Method, Tensors, Weighed, tensors, tokens_of


class Reward(Method):
    """The Bradley-Terry loss over pairs; the step's model is a classifier with one output, the score.

    The batch is the chosen answers, then the rejected ones. A pair that only fills a place has no label.
    """

    unit = "pair"

    def count(self, batch: Tensors) -> int:
        return int(self._counted(batch).sum())

    def weigh(self, step: CompiledStep, batch: Tensors, items: float) -> Weighed:
        values, measured = self._compared(step, batch)
        weights = (values * (measured.count / items)).astype(np.float32)
        plain = self.plain(batch)
        return Weighed({**plain, **tensors(labels=plain["labels"], weights=weights)}, 1.0, measured)

    def measure(self, step: CompiledStep, batch: Tensors) -> Measured:
        return self._compared(step, batch)[1]

    def plain(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {**tokens_of(batch), "labels": np.zeros(len(batch["input_ids"]), np.int64)}

    @staticmethod
    def _counted(batch: Tensors) -> np.ndarray:
        labelled = (batch["labels"] >= 0).any(dim=1).numpy()
        return np.all(labelled.reshape(2, -1), axis=0)

    def _compared(self, step: CompiledStep, batch: Tensors) -> tuple[np.ndarray, Measured]:
        """The weight of every row's score, and totals."""
        counted = self._counted(batch)
        weights = np.zeros((2, counted.size), np.float32)
        if not counted.any():
            return weights.ravel(), Measured(0, 0.0)
        scores = step.logprobs(self.plain(batch))[:, 0].astype(np.float64).reshape(2, -1)[:, counted]
        found = reward_weights(*scores)
        weights[:, counted] = found.chosen, found.rejected
        count = int(counted.sum())
        sums = {"accuracy": float((scores[0] > scores[1]).sum()), "margin": float((scores[0] - scores[1]).sum())}
        return weights.ravel(), Measured(count, found.loss * count, sums)

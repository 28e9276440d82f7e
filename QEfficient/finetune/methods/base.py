"""The protocol of a method: how a batch becomes inputs of the compiled step, and what is measured on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.finetune.step_session import trained_places

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """Totals over a batch, to be summed over batches and ranks before they are divided.

    Attributes:
        count: what the loss is a mean over: trained tokens, rows or pairs.
        loss: sum of the loss over them.
        sums: name of a metric -> its sum over the same.
    """

    count: int
    loss: float
    sums: dict[str, float] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """The metrics as means."""
        return {name: value / self.count for name, value in self.sums.items()} if self.count else {}

    def __add__(self, other: Measured) -> Measured:
        names = {**self.sums, **other.sums}
        sums = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names}
        return Measured(self.count + other.count, self.loss + other.loss, sums)


@dataclass(frozen=True)
class Weighed:
    """A batch as the compiled step takes it.

    Attributes:
        inputs: keywords of `CompiledStep.forward`.
        normaliser: the one of them that divides the weights.
        measured: the method's totals, where they are known before the step runs; None: the step's own loss counts.
    """

    inputs: dict[str, torch.Tensor]
    normaliser: float
    measured: Measured | None = None


class Method(ABC):
    """One way to train."""

    #: Divides sums over a window into its loss; for messages.
    unit = "token"

    @abstractmethod
    def count(self, batch: Tensors) -> int:
        """What of a batch the loss is a mean over."""

    @abstractmethod
    def weigh(self, step: CompiledStep, batch: Tensors, items: float) -> Weighed:
        """The batch with the weights whose gradient is that of the loss summed over the batch and divided by ``items``.

        Args:
            step: for methods that need log-probabilities first.
            items: the count of the whole window, over micro-batches and ranks.
        """

    @abstractmethod
    def measure(self, step: CompiledStep, batch: Tensors) -> Measured:
        """Totals of a batch; runs no backward pass."""

    def plain(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as the step takes it with equal weights, to see what a step costs."""
        return tokens_of(batch)

    def summary(self, measured: Measured) -> dict[str, float]:
        """What an evaluation reports besides the loss."""
        return measured.means()


def tokens_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that every step takes."""
    names = ("input_ids", "attention_mask", "position_ids", "labels", "weights")
    return {name: batch[name] for name in names if name in batch}


def trained_tokens(batch: Tensors) -> np.ndarray:
    """Trained tokens of every row, int64 [rows]."""
    counts: np.ndarray = trained_places(batch["labels"].numpy(), batch["attention_mask"].numpy()).sum(axis=1)
    return counts


def sequence_logprobs(step: CompiledStep, batch: Tensors, *, adapter: bool = True) -> np.ndarray:
    """log p of the trained tokens of every row together, float64 [rows]; runs no backward pass."""
    found: np.ndarray = step.logprobs(tokens_of(batch), adapter=adapter).astype(np.float64).sum(axis=1)
    return found


def tensors(**arrays: Any) -> dict[str, torch.Tensor]:
    """Arrays as tensors."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

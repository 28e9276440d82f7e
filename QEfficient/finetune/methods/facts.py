"""The methods by name: which rows each reads and which options it has; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodFacts:
    """What the configuration must know of a method.

    Attributes:
        rows: kind of rows it reads, as `QEfficient.finetune.data.formats.Format.kind`; None: what the task reads.
        options: options of ``QEffConfig`` that only such methods have.
        packs: whether several rows may share one.
        scores: whether the model gives a score in place of text.
        metrics: what its evaluation measures besides the loss; none: what the task measures.
    """

    rows: str | None = None
    options: tuple[str, ...] = ()
    packs: bool = False
    scores: bool = False
    metrics: tuple[str, ...] = ()


_REWARDS = ("rewards/accuracies", "rewards/margins")
METHODS = {
    "sft": MethodFacts(packs=True),
    "dpo": MethodFacts("preference", ("beta", "reference_free"), metrics=_REWARDS),
    "orpo": MethodFacts("preference", ("beta",), metrics=_REWARDS),
    "kto": MethodFacts("unpaired_preference", ("beta", "desirable_weight", "undesirable_weight"), metrics=_REWARDS[:1]),
    "reward": MethodFacts("preference", scores=True, metrics=("accuracy", "margin")),
    "distill": MethodFacts(options=("teacher_model", "distillation", "teacher_top", "distillation_weight")),
}

#: What an evaluation under cross entropy measures besides the loss.
TASK_METRICS = {"generation": ("perplexity",), "seq_classification": ("accuracy",)}
#: Metrics that are better when greater.
GREATER_IS_BETTER = ("accuracy", "margin", *_REWARDS)

#: What a teacher gives: the probabilities of its likeliest tokens, or answers of its own.
DISTILLATION = ("logits", "response")

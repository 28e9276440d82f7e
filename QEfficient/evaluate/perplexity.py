"""Perplexity of a text under a compiled package: what a change of its weights costs, in one number."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from QEfficient.errors import InputError
from QEfficient.evaluate.steps import SessionSteps

if TYPE_CHECKING:
    from QEfficient.engine.text import CompiledCausalLM

#: Tokens of a window, unless the context is shorter.
WINDOW = 256


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, over how many tokens it was taken."""

    value: float
    tokens: int


def perplexity(package: CompiledCausalLM, text: str) -> Perplexity:
    """Measures a package on a text, which is given and not generated.

    The text is cut into windows. The first half of each goes in as a prompt does, the second half token by token, and
    only what is said about the second half counts: so both ways of running a package take part.

    Raises:
        InputError: the text has fewer than 4 tokens.
    """
    ids = np.asarray(package.tokenizer.encode(text), np.int64)
    if len(ids) < 4:
        raise InputError(f"the text has {len(ids)} tokens, and perplexity takes 4 or more: pass a longer one.")
    steps, width = SessionSteps(package.session), min(WINDOW, package.ctx_len)
    nats, count = 0.0, 0
    for window in (ids[start : start + width] for start in range(0, len(ids), width)):
        half = len(window) // 2
        if not half:
            continue
        steps.begin(package.ctx_len)
        known = 0
        for end in range(half, len(window)):
            positions = np.arange(known, end)[None]
            logits = steps.step(window[None, known:end], positions)
            nats -= float(log_softmax(logits)[window[end]])
            known, count = end, count + 1
    mean = nats / count
    return Perplexity(math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf, count)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64: the difference of two nearly equal distributions would be noise in float32."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))

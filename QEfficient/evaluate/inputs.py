"""The input that reports compare on: what the caller brings, or a few built-in texts, as rows of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from QEfficient.engine.arrays import integer_matrix, mask_matrix
from QEfficient.engine.package import LoadedPackage
from QEfficient.errors import InputError

#: What is compared when the caller brings no input.
DEFAULT_TEXTS = (
    "Natalia sold clips to 48 of her friends.",
    "How many apples are left?",
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?",
)


def one_of(inputs: Any, prompts: Any, texts: Any) -> Any:
    """What was given under one of its three names, or None; InputError when there is more than one."""
    given = [value for value in (inputs, prompts, texts) if value is not None]
    if len(given) > 1:
        raise InputError("pass one of inputs, prompts and texts.")
    return given[0] if given else None


def check_tokens(tokens: int) -> None:
    """InputError for a number of greedy tokens below 1."""
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, got {tokens}.")


def token_rows(given: Any, package: LoadedPackage) -> list[np.ndarray]:
    """Token ids of each row, without padding."""
    if given is None:
        if (package.directory / "tokenizer.json").is_file():
            given = DEFAULT_TEXTS
        else:
            random = np.random.default_rng(0)
            vocabulary = package.manifest.model.get("vocab_size") or 100
            return [random.integers(4, max(vocabulary, 6), n) for n in (9, 5, 17)]
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise InputError("input_ids is missing: pass the tokenizer's output.")
        ids = integer_matrix("input_ids", given["input_ids"])
        mask = mask_matrix(given.get("attention_mask"), ids.shape)
        return [row[keep] for row, keep in zip(ids, mask, strict=True)]
    texts = [given] if isinstance(given, str) else list(given)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise InputError("texts must be a non-empty list of non-empty strings.")
    return [np.asarray(package.tokenizer.encode(text), np.int64) for text in texts]


def refuse_long(rows: list[np.ndarray], limit: int | None, option: str) -> None:
    """Proof about half a text is no proof: InputError instead of a silent cut."""
    longest = max(len(row) for row in rows)
    if limit is not None and longest > limit:
        raise InputError(f"a text of {longest} tokens does not fit {option}={limit}: shorten it or compile with more.")

"""Words of other tools for precision: what a model computes in, and how its frozen weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.keywords import boolean, short

#: Names that transformers and others have for the precision of the computation.
COMPUTE = ("dtype", "torch_dtype")
#: bitsandbytes' switches -> the ``base_weights`` that does the same.
STORED = {"load_in_8bit": "int8", "load_in_4bit": "int4"}
WORDS = (*COMPUTE, *STORED)


def base_weights_of(given: Mapping[str, Any]) -> str | None:
    """The ``base_weights`` that options in other tools' words ask for, None when they ask for nothing.

    Raises:
        OptionError: they ask for what cannot be had, or contradict each other or ``base_weights``.
    """
    for name in COMPUTE:
        value = given.get(name)
        if value is not None and str(value).removeprefix("torch.") not in ("auto", "float32", "fp32", "float"):
            raise OptionError(
                f"{name}={short(str(value))} is not supported: a step computes in float32, and frozen weights stay in "
                "the checkpoint's own 16 or 32 bits; leave it out, and save memory with base_weights='int8' or 'int4'."
            )
    asked = [name for name in STORED if given.get(name) is not None and boolean(name, given[name])]
    if not asked:
        return None
    own = given.get("base_weights") or STORED[asked[0]]
    if len(asked) > 1 or own != STORED[asked[0]]:
        others = asked[1] if len(asked) > 1 else f"base_weights={own!r}"
        raise OptionError(f"{asked[0]} and {others} contradict each other: give base_weights alone.")
    return STORED[asked[0]]

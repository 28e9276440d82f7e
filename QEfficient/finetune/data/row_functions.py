"""A user's functions over rows: how they are named, and whether they take one row or all."""

from __future__ import annotations

import inspect
from typing import Any

from QEfficient.finetune.data.steps import as_specs
from QEfficient.finetune.user_code import UserFunction, load_function

#: First parameter of a function that takes one row; any other name takes all rows at once.
ONE_ROW = ("row", "example", "sample", "item", "record")


def read_functions(specs: Any) -> tuple[UserFunction, ...]:
    """Functions from ``"file.py:function"`` or callables; OptionError for anything else."""
    return tuple(load_function(spec, "a preprocessing function") for spec in as_specs(specs, "preprocess"))


def takes_one_row(function: Any) -> bool:
    """Whether a function wants one row at a time, by the name of its first parameter."""
    names = list(inspect.signature(function).parameters)
    return bool(names) and names[0] in ONE_ROW

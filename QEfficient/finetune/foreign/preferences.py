"""What other tools' preference training becomes: the method, its options, and columns of rows with several answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from QEfficient.finetune.foreign import data
from QEfficient.finetune.foreign.tool import Reading

#: Why settings of other losses than ours are refused.
ONE_LOSS = "each method has the loss of its paper; docs/finetuning_methods.md has the formulas"


def put_method(
    reading: Reading, key: str, methods: Mapping[str, str], beta: Any, desirable: Any = None, undesirable: Any = None
) -> str:
    """Sets ``method`` and its options from what a tool calls it.

    Args:
        key: the key that holds the tool's name of the method; its value must be there.
        methods: tool's name -> ours.
        beta: how strongly the model is held to what it was; None is the method's default.
        desirable, undesirable: weights of good and bad answers under KTO.

    Returns:
        Our name of the method.

    Raises:
        OptionError: a method that there is not.
    """
    name = str(reading[key])
    if name not in methods:
        raise reading.error(key, f"is not available; these are: {', '.join(sorted(methods))}")
    method = methods[name]
    reading.put(method=method)
    if method in ("dpo", "orpo", "kto"):
        reading.put(beta=beta)
    if method == "kto":
        reading.put(desirable_weight=desirable, undesirable_weight=undesirable)
    return method


def rows_of(method: str) -> str:
    """``dataset_format`` of the rows a method reads."""
    return "unpaired_preference" if method == "kto" else "preference"


def entry(method: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Format and columns of a data set for a method."""
    found = {"dataset_format": rows_of(method), "columns": data.renamed(columns)}
    return {name: value for name, value in found.items() if value is not None}

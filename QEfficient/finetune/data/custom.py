"""A data set as a class or a function: ``load_data``, if wanted ``preprocess`` and ``split``, with values by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.files import Rows
from QEfficient.finetune.data.row_functions import takes_one_row
from QEfficient.finetune.data.sources import Source, choose_splits, rows_of
from QEfficient.finetune.keywords import short
from QEfficient.suggest import did_you_mean

METHODS = ("load_data", "preprocess", "split")

_PATHS = ("path", "file_path", "csv_file", "json_file", "data_path", "dataset_path", "dataset_name", "filename")


def load_custom(dataset_class: Any, config: QEffConfig, tokenizer: Any) -> Source:
    """Rows from a user's class, or from a function, which stands for ``load_data``.

    Args:
        dataset_class: a class or an instance. ``load_data(…)`` returns rows, or a dict of splits; ``preprocess(rows)``
            or ``preprocess(row)`` turns them into rows of any known format, tokenized ones included (None drops a
            row); ``split(rows)`` returns (train, evaluation). Each may be an instance, class or static method. Besides
            its first, a parameter may be called ``path`` (or ``file_path``, ``csv_file``), ``tokenizer``,
            ``max_length`` (or ``max_ctx_len``), ``config``, ``train_frac`` (or ``train_ratio``), ``seed``, or like a
            key of ``custom_dataset_config``.

    Raises:
        OptionError: no ``load_data``, or a parameter that has no value.
        Exception: whatever the user's code raises, as it is.
    """
    values = {
        **dict.fromkeys(_PATHS, config.dataset_name),
        "tokenizer": tokenizer,
        **dict.fromkeys(("max_length", "max_ctx_len", "max_seq_length", "context_length"), config.max_ctx_len),
        "config": config,
        **dict.fromkeys(("train_frac", "train_ratio", "split_ratio"), config.train_frac),
        "seed": config.seed,
        "custom_dataset_config": config.custom_dataset_config,
        **(config.custom_dataset_config or {}),
    }
    name = getattr(dataset_class, "__name__", type(dataset_class).__name__)
    methods = _methods(dataset_class, name, values)
    rows = _call(methods["load_data"], values, f"{name}.load_data")
    if isinstance(rows, Mapping):
        return _of_splits(rows, methods, values, name, config)
    if "preprocess" in methods:
        rows = _preprocessed(methods["preprocess"], rows, values, f"{name}.preprocess")
    if "split" not in methods:
        return Source(name, rows_of(rows, f"what {name} returned"))
    both = _call(methods["split"], values, f"{name}.split", rows)
    if not isinstance(both, tuple | list) or len(both) != 2:
        raise OptionError(f"{name}.split must return two sets of rows, (train, evaluation), got {short(both)}.")
    evaluation = None if both[1] is None or len(both[1]) == 0 else rows_of(both[1], f"{name}'s evaluation rows")
    return Source(name, rows_of(both[0], f"{name}'s training rows"), evaluation)


def _of_splits(
    splits: Mapping[str, Any],
    methods: Mapping[str, Callable[..., Any]],
    values: Mapping[str, Any],
    name: str,
    config: QEffConfig,
) -> Source:
    """What a ``load_data`` that returns splits itself makes."""
    if "split" in methods:
        raise OptionError(f"{name}.load_data returns splits, so {name}.split has nothing to divide: leave one out.")
    found = {}
    for split, part in splits.items():
        if "preprocess" in methods:
            part = _preprocessed(methods["preprocess"], part, values, f"{name}.preprocess")
        found[str(split)] = rows_of(part, f"split {split!r} of {name}")
    return choose_splits(name, found, config)


def _methods(dataset_class: Any, name: str, values: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    owner = dataset_class
    if inspect.isroutine(owner):
        return {"load_data": owner}
    present = [method for method in METHODS if callable(getattr(owner, method, None))]
    if "load_data" not in present:
        raise OptionError(
            f"{name} has no load_data method, which returns the rows of a custom dataset: add one."
            f"{did_you_mean('load_data', [n for n in dir(owner) if not n.startswith('_')])}"
        )
    if isinstance(owner, type) and any(_needs_instance(owner, method) for method in present):
        owner = _call(owner, values, name)
    return {method: getattr(owner, method) for method in present}


def _needs_instance(owner: type, method: str) -> bool:
    return not isinstance(inspect.getattr_static(owner, method), staticmethod | classmethod)


def _preprocessed(method: Callable[..., Any], rows: Any, values: Mapping[str, Any], what: str) -> Any:
    if not takes_one_row(method):
        return _call(method, values, what, rows)
    found: Rows = [_call(method, values, what, row) for row in rows_of(rows, "what load_data returned", check=False)]
    return [row for row in found if row is not None]


def _call(function: Callable[..., Any], values: Mapping[str, Any], what: str, *first: Any) -> Any:
    """Calls a user's function with the values its parameters are named after; ``first`` goes in by position."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[len(first) :]
    except ValueError:
        # A class without a Python __init__ has no signature, and takes nothing.
        parameters = []
    arguments = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in values:
            arguments[parameter.name] = values[parameter.name]
        elif parameter.default is parameter.empty:
            raise OptionError(
                f"{what} asks for {parameter.name!r}, which has no value: give it a default, put it into "
                f"custom_dataset_config, or use one of {', '.join(sorted(values))}."
                f"{did_you_mean(parameter.name, values)}"
            )
    return function(*first, **arguments)

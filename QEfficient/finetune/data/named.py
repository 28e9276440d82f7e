"""Data sets with a name: those that come with this library, and those a user registers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from QEfficient.errors import OptionError
from QEfficient.finetune.keywords import text
from QEfficient.suggest import did_you_mean

_Dataset = TypeVar("_Dataset")

#: Functions of `QEfficient.finetune.data.builtin`. Other libraries' names end in ``_dataset``.
BUILT_IN = ("gsm8k", "alpaca", "imdb", "grammar", "custom_dataset")
_SUFFIX = "_dataset"
#: Those that hand ``custom_dataset_config`` on, whatever it holds.
_OPEN = ("custom_dataset",)

_registered: dict[str, Any] = {}


def register_dataset(name: str, dataset: _Dataset | None = None) -> Any:
    """Gives a data set a name that ``dataset_name`` then accepts, in this process.

    Args:
        name: what ``QEffConfig(dataset_name=…)`` calls it.
        dataset: a class or object with ``load_data`` (and ``preprocess``, ``split``), or a function that returns what
            ``load_data`` would: rows, or a dict of splits. Parameters are filled by name; see
            `QEfficient.finetune.data.custom.load_custom`. Without it this is a decorator.

    Returns:
        The data set, or the decorator.

    Raises:
        OptionError: the name is one of this library's, or not a text; the data set is nothing that can be called.

    Example:
        >>> @register_dataset("squares")
        ... def squares(count=5):
        ...     return [{"prompt": f"{n} * {n} =", "completion": f" {n * n}"} for n in range(count)]
    """
    text("the name of a data set", name)
    if _built_in(name) is not None or name == "sample":
        raise OptionError(f"{name!r} is the name of a data set that comes with this library: choose another.")

    def register(found: _Dataset) -> _Dataset:
        if not callable(found) and not callable(getattr(found, "load_data", None)):
            raise OptionError(f"a data set must be a function or have load_data, got {type(found).__name__}.")
        _registered[name] = found
        return found

    return register if dataset is None else register(dataset)


def named_dataset(name: Any, own_options: Mapping[str, Any] | None = None) -> Any:
    """What is registered under a name, or a built-in data set's function; None for any other name.

    Args:
        own_options: ``custom_dataset_config``.

    Raises:
        OptionError: an option that a built-in data set has no use for.
    """
    if not isinstance(name, str):
        return None
    if name in _registered:
        return _registered[name]
    function = _built_in(name)
    if function is None:
        return None
    from QEfficient.finetune.data import builtin

    found = getattr(builtin, function)
    if function not in _OPEN:
        _check_own_options(found, own_options or {})
    return found


def dataset_names() -> list[str]:
    """Every name that `named_dataset` knows."""
    return [*BUILT_IN, *_registered]


def _check_own_options(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(function).parameters if name not in ("config", "tokenizer")]
    for key in given:
        if key not in known:
            raise OptionError(
                f"the data set {function.__name__} takes {', '.join(known)} in custom_dataset_config, not {key!r}."
                f"{did_you_mean(key, known)}"
            )


def _built_in(name: str) -> str | None:
    """The function that a name means; None for other names."""
    return next((known for known in (name, name.removesuffix(_SUFFIX)) if known in BUILT_IN), None)

"""Named steps over rows, such as filters: how ``name:0.8`` or ``name:threshold=0.8`` is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.keywords import short
from QEfficient.finetune.settings_file import parse_value
from QEfficient.finetune.user_code import is_file_function, load_function
from QEfficient.suggest import did_you_mean


def as_specs(specs: Any, what: str) -> Sequence[Any]:
    """A list of steps; one by itself is a list of one.

    Raises:
        OptionError: anything else; ``what`` says what they are ("filters").
    """
    specs = [specs] if isinstance(specs, str) or callable(specs) else specs
    if not isinstance(specs, Sequence):
        raise OptionError(f"{what} must be a list of {what}, got {short(specs)}.")
    return specs


@dataclass(frozen=True)
class Step:
    """A step as it was asked for.

    Attributes:
        name: what reports call it.
        identity: what decides its result, as JSON values.
        made: what the maker of a named step returned, or a function of the user's.
        own: whether it is a function of the user's.
    """

    name: str
    identity: tuple[Any, ...]
    made: Any
    own: bool


def read_step(spec: Any, kind: str, known: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]]) -> Step:
    """A step from its name with parameters, ``"file.py:function"`` or a callable.

    Args:
        kind: what it is, with its article, for messages ("a filter").
        known: name -> what makes it, and its parameters with their defaults; None has to be given.

    Raises:
        OptionError: an unknown name or parameter, or a value out of range.
    """
    if callable(spec) or (isinstance(spec, str) and is_file_function(spec)):
        own = load_function(spec, kind)
        return Step(own.name, (own.name, own.digest), own.call, own=True)
    if not isinstance(spec, str):
        raise OptionError(f"{kind} must be a name, a callable or 'file.py:function', got {short(spec)}.")
    name, _, text = spec.partition(":")
    word = kind.partition(" ")[2]
    if name not in known:
        raise OptionError(
            f"there is no {word} {name!r}; there are {', '.join(known)} and your own as 'file.py:function'."
            f"{did_you_mean(name, known)}"
        )
    make, defaults = known[name]
    values = parameters(word, name, text, defaults)
    return Step(name, (name, *sorted(values.items())), make(**values), own=False)


def parameters(kind: str, name: str, text: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``"0.8"`` or ``"threshold=0.8,words=3"`` over the defaults, where None stands for what has to be given.

    Args:
        kind: what it is, for messages ("filter").

    Raises:
        OptionError: an unknown parameter, one that is missing, or a value that is no number of at least 0.
    """
    values = dict(defaults)
    for number, part in enumerate(text.split(",") if text else ()):
        key, equals, value = part.partition("=")
        if not equals and number == 0 and values:
            key, value = next(iter(values)), key
        if key not in values:
            raise OptionError(
                f"the {kind} {name} takes {', '.join(values) or 'no parameters'}, got {part!r}."
                f"{did_you_mean(key, values)}"
            )
        found = parse_value(value)
        if isinstance(found, bool) or not isinstance(found, int | float) or found < 0:
            raise OptionError(f"{key} of the {kind} {name} must be a number of at least 0, got {value!r}.")
        values[key] = found
    if any(value is None for value in values.values()):
        raise OptionError(f"the {kind} {name} needs a number, for example {name}:10.")
    return values

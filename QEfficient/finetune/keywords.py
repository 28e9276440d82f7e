"""Keywords of a configuration class: aliases, unknown names, contradictions, and the checks of single values."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean


def canonical(given: Mapping[str, Any], names: Iterable[str], aliases: Mapping[str, str], owner: str) -> dict[str, Any]:
    """``given`` under canonical names.

    Args:
        given: what the user wrote, by the name they wrote.
        names: the canonical names.
        aliases: other spelling -> canonical name.
        owner: the class, for messages.

    Raises:
        OptionError: a name is unknown, or an alias and its canonical name have different values.
    """
    names = list(names)
    found: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in given.items():
        name = aliases.get(key, key)
        if name not in names:
            raise unknown(key, owner)
        if name in found and not same(found[name], value):
            raise OptionError(
                f"{key}={short(value)} contradicts {spelled[name]}={short(found[name])}, which is the same option "
                f"of {owner}: give one of them."
            )
        found[name], spelled[name] = value, key
    return found


def unknown(key: object, owner: str) -> OptionError:
    """The error for an option that ``owner`` does not have; says where it belongs, or what has a similar name."""
    # Only now: options knows the training arguments, which import transformers.
    from QEfficient.finetune.options import where

    return OptionError(f"{owner} has no option {key!r}.{where(str(key), owner)}")


def plain_types(cls: type) -> dict[str, tuple[type, bool]]:
    """Fields of a dataclass that hold a bool, an int, a float or a text -> that type, and whether None is allowed."""
    hints = get_type_hints(cls)
    found: dict[str, tuple[type, bool]] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        members = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
        kinds = members - {NoneType}
        if field.init and len(kinds) == 1 and kinds <= {bool, int, float, str}:
            found[field.name] = (kinds.pop(), NoneType in members)
    return found


def fill(instance: Any, values: Mapping[str, Any]) -> None:
    """Sets every field of a dataclass instance, to ``values`` where given and to its default otherwise."""
    for field in dataclasses.fields(instance):
        if field.name in values:
            value = values[field.name]
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = field.default
        object.__setattr__(instance, field.name, value)


def same(left: Any, right: Any) -> bool:
    """Whether two values given for one option agree; objects that only compare elementwise agree if identical."""
    if left is right:
        return True
    if type(left) is not type(right) and not (is_number(left) and is_number(right)):
        return False
    equal = left == right
    return equal if isinstance(equal, bool) else False


def is_number(value: object) -> bool:
    """Whether a value is a finite int or float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def integer(name: str, value: Any, minimum: int = 1) -> int:
    """``value``, which must be an int of at least ``minimum``; 8.0 and True are not."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise OptionError(f"{name} must be an integer of at least {minimum}, got {short(value)}.")
    return value


def number(name: str, value: Any) -> float:
    """``value``, which must be a finite number of at least 0."""
    if not is_number(value) or value < 0:
        raise OptionError(f"{name} must be a finite number of at least 0, got {short(value)}.")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """``value``, which must be True or False."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be True or False, got {short(value)}.")
    return value


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """``value``, which must be one of ``allowed``."""
    allowed = list(allowed)
    if value not in allowed:
        raise OptionError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {short(value)}."
            f"{did_you_mean(str(value), allowed)}"
        )
    return str(value)


def text(name: str, value: Any) -> str:
    """``value``, which must be a non-empty string."""
    if not isinstance(value, str) or not value.strip():
        raise OptionError(f"{name} must be a non-empty string, got {short(value)}.")
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A copy of ``value``, which must be a mapping whose keys are strings."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise OptionError(f"{name} must be a mapping with string keys, got {short(value)}.")
    return dict(value)


def short(value: object) -> str:
    """A repr of bounded length, for messages."""
    return reprlib.repr(value)

"""Named steps over rows, such as filters: how ``name:0.8`` or ``name:threshold=0.8`` is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.keywords import short
from QEfficient.finetune.settings_file import parse_value
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

"""Augmentation: training rows changed or multiplied, each by a generator that depends on the seed and the row only."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.data.readers import ROLES
from QEfficient.finetune.data.steps import as_specs, read_step
from QEfficient.finetune.keywords import short

Row = Mapping[str, Any]
#: A row and a generator -> the rows that take its place.
Change = Callable[[Row, random.Random], list[Any]]


@dataclass(frozen=True)
class Augmentation:
    """An augmentation as it was asked for.

    Attributes:
        name: what reports call it.
        identity: what decides its result, as JSON values.
        change: what it does.
    """

    name: str
    identity: tuple[Any, ...]
    change: Change


def read_augmentations(specs: Any) -> tuple[Augmentation, ...]:
    """Augmentations from their names.

    Args:
        specs: a list of ``"system_dropout:0.5"``, ``"turn_prefixes"``, ``"file.py:function"`` or callables. A function
            of one's own is called with (row, rng), the row under our column names and a ``random.Random``, and returns
            a row, several, or None for none.

    Raises:
        OptionError: an unknown name or parameter, or a value out of range.
    """
    return tuple(_read(spec) for spec in as_specs(specs, "augmentations"))


def augmented(augmentations: Iterable[Augmentation], row: Row, seed: int, number: int) -> list[Any]:
    """The rows that take the place of a row; the same for the same seed and number, whatever came before.

    Raises:
        InputError: a function of the user's returned something that is no row.
    """
    rows: list[Any] = [row]
    for place, item in enumerate(augmentations):
        digest = blake3(f"{seed}/{number}/{place}/{item.name}".encode()).digest()
        rng = random.Random(int.from_bytes(digest[:8], "big"))
        rows = [new for old in rows for new in item.change(old, rng)]
    return rows


def _read(spec: Any) -> Augmentation:
    step = read_step(spec, "an augmentation", AUGMENTATIONS)
    return Augmentation(step.name, step.identity, _own(step.made, step.name) if step.own else step.made)


def _own(call: Callable[..., Any], name: str) -> Change:
    def change(row: Row, rng: random.Random) -> list[Any]:
        found = call(dict(row), rng)
        found = [] if found is None else [found] if isinstance(found, Mapping) else found
        if not isinstance(found, list | tuple) or not all(isinstance(item, Mapping) for item in found):
            raise InputError(f"the augmentation {name} must return a row, a list of rows or None, got {short(found)}.")
        return list(found)

    return change


def _system_dropout(share: float) -> Change:
    """Leaves out the system message of a share of the rows, so that a model answers with and without it."""
    if not 0 < share <= 1:
        raise OptionError(f"share of the augmentation system_dropout must be above 0 and at most 1, got {share}.")

    def change(row: Row, rng: random.Random) -> list[Any]:
        if rng.random() >= share:
            return [row]
        left = {name: value for name, value in row.items() if name not in ("system", "system_prompt")}
        for name in ("messages", "conversations"):
            if isinstance(left.get(name), list | tuple):
                left[name] = [message for message in left[name] if _role(message) != "system"]
        return [left]

    return change


def _turn_prefixes() -> Change:
    """A conversation of several turns also as its beginnings, each up to an earlier answer.

    For ``train_on="last"``, where else only the last answer of each conversation would be learned.
    """

    def change(row: Row, rng: random.Random) -> list[Any]:
        for name in ("messages", "conversations"):
            turns = row.get(name)
            if isinstance(turns, list | tuple):
                ends = [
                    place
                    for place, message in enumerate(turns, start=1)
                    if ROLES.get(str(_role(message))) == "assistant"
                ]
                return [{**row, name: list(turns[:end])} for end in ends if end < len(turns)] + [row]
        return [row]

    return change


def _role(message: Any) -> Any:
    return message.get("role", message.get("from")) if isinstance(message, Mapping) else None


#: Name -> what makes it, and its parameters with their defaults.
AUGMENTATIONS: dict[str, tuple[Callable[..., Change], dict[str, Any]]] = {
    "system_dropout": (_system_dropout, {"share": 0.5}),
    "turn_prefixes": (_turn_prefixes, {}),
}

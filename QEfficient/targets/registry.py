"""Finds a target by name. Adding a target is one file and one line here."""

from __future__ import annotations

import importlib

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean
from QEfficient.targets.base import Target

#: Name -> where the class lives; imported when asked for.
TARGETS = {"host": "QEfficient.targets.host:HostTarget"}
ALIASES = {"cpu": "host"}


def get_target(name: str) -> Target:
    """The target called ``name``; OptionError naming the known ones otherwise."""
    name = ALIASES.get(name, name)
    if name not in TARGETS:
        raise OptionError(
            f"there is no target {name!r} in this version; known targets: {sorted(TARGETS)}."
            f"{did_you_mean(name, TARGETS)}"
        )
    module, _, attribute = TARGETS[name].partition(":")
    target: Target = getattr(importlib.import_module(module), attribute)()
    return target

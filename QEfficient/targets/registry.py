"""Finds a target by name. Adding a target is one file and one line here."""

from __future__ import annotations

import importlib

from QEfficient.errors import OptionError, TargetUnavailableError
from QEfficient.suggest import did_you_mean
from QEfficient.targets.base import Target
from QEfficient.targets.options import CompileOptions

#: Name -> where the class lives; imported when asked for.
TARGETS = {
    "host": "QEfficient.targets.host:HostTarget",
    "qaic": "QEfficient.targets.qaic:QaicTarget",
    "qnn": "QEfficient.targets.qnn:QnnTarget",
}
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


def compiling_target(options: CompileOptions) -> Target:
    """The target that ``options`` name, once it said that it can do what they ask; see `require_compiler`."""
    target = get_target(options.target)
    require_compiler(target, options)
    return target


def require_compiler(target: Target, options: CompileOptions) -> None:
    """Asks a target, before any work, whether it can compile with these options.

    Raises:
        OptionError: it refuses an option.
        TargetUnavailableError: what it compiles with is not installed, and no dry run was asked for.
    """
    target.normalise(options)
    here = target.check()
    if not here.can_compile and not options.dry_run:
        raise TargetUnavailableError(f"the target {target.name} cannot compile here, {here.detail}: {here.missing[0]}.")

"""Makes a command of a function: flag groups become flags, errors become sentences, ``--debug`` is added."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from QEfficient.cli.user_errors import user_errors

Debug = Annotated[bool, typer.Option("--debug", help="Show the Python traceback of an error.")]


def add_command(
    app: typer.Typer, function: Callable[..., None], name: str | None = None, *, open_ended: bool = False
) -> None:
    """Registers ``function`` as a command of ``app``.

    A parameter whose type is a dataclass stands for a group: each field (``Annotated`` with a `typer.Option`) is one
    flag, and the function gets the filled dataclass. So flags that several commands share are written once.

    Args:
        open_ended: flags nobody declared go to the command's last argument, as they were written.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type] = {}
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(hint):
            groups[parameter.name] = hint  # type: ignore[assignment]
            parameters += _flags_of(hint)  # type: ignore[arg-type]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint))
    parameters.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug))

    @functools.wraps(function)
    def run(*, debug: bool, **values: Any) -> None:
        with user_errors(debug):
            for parameter, group in groups.items():
                names = [f.name for f in dataclasses.fields(group)]
                values[parameter] = group(**{n: values.pop(n) for n in names})
            function(**values)

    # What typer reads the flags from.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, context_settings={"ignore_unknown_options": open_ended})(run)


def _flags_of(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in dataclasses.fields(group)
    ]

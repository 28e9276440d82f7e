"""Applies a user's functions to the rows of a source, before filters, split and encoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from QEfficient.errors import InputError
from QEfficient.finetune.data.files import Rows, Unreadable
from QEfficient.finetune.data.row_functions import takes_one_row
from QEfficient.finetune.data.sources import Source, rows_of
from QEfficient.finetune.keywords import short
from QEfficient.finetune.user_code import UserFunction


def preprocessed(functions: tuple[UserFunction, ...], source: Source) -> Source:
    """The source with every function applied in turn, to training and evaluation rows by themselves.

    Raises:
        InputError: a function returned something that is no row, or no row at all.
        Exception: whatever the user's code raises, as it is.
    """
    for function in functions:
        evaluation = None if source.evaluation is None else _applied(function, source.evaluation)
        source = dataclasses.replace(source, train=_applied(function, source.train), evaluation=evaluation)
    return source


def _applied(function: UserFunction, rows: Rows) -> Rows:
    where = f"what {function.name} returned"
    if not takes_one_row(function.call):
        readable = [row for row in rows if not isinstance(row, Unreadable)]
        return rows_of(function.call(readable), where)
    found: list[Any] = []
    for index in range(len(rows)):
        row: Any = rows[index]
        new = row if isinstance(row, Unreadable) else one_row(function, row, index + 1)
        if new is not None:
            found.append(new)
    return rows_of(found, where, check=False)


def one_row(function: UserFunction, row: Mapping[str, Any], number: int) -> Mapping[str, Any] | None:
    """What a function makes of a row; None drops it. InputError when that is no row."""
    new = function.call(dict(row))
    if new is not None and not isinstance(new, Mapping):
        raise InputError(f"{function.name} must return a row or None, and made {short(new)} of row {number}.")
    return new

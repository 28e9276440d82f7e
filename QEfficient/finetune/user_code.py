"""A user's own function, named as ``file.py:function``, and a digest of its source for cache keys."""

from __future__ import annotations

import inspect
import marshal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean
from QEfficient.user_file import run_source


@dataclass(frozen=True)
class UserFunction:
    """A callable, what to call it in messages, and the digest of the source it came from."""

    call: Callable[..., Any]
    name: str
    digest: str


def is_file_function(text: str) -> bool:
    """Whether a text has the form ``file.py:function``."""
    return text.partition(":")[0].endswith(".py")


def load_function(spec: Any, what: str) -> UserFunction:
    """The function of ``file.py:name``, or a callable as it is.

    Args:
        spec: the text, or the callable.
        what: what it is for, for messages ("a filter").

    Raises:
        OptionError: no such file or function, or not a callable; a callable of which neither source nor bytecode can
            be read, so that a cache could not tell it from another.
        Exception: whatever the file raises while it is loaded, as it is.
    """
    if callable(spec):
        name = getattr(spec, "__qualname__", type(spec).__qualname__)
        return UserFunction(spec, name, blake3(_definition(spec, name)).hexdigest())
    if not isinstance(spec, str) or not is_file_function(spec):
        raise OptionError(f"{what} must be a callable or 'file.py:function', got {spec!r}.")
    path, _, name = spec.partition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise OptionError(f"there is no file {file} to load {what} from.")
    if not name:
        raise OptionError(f"name the function in {file.name}: '{path}:function'.")
    source = file.read_text(encoding="utf-8")
    module = run_source(source, file)
    found = getattr(module, name, None)
    if not callable(found):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise OptionError(f"{file} has no function {name!r}.{did_you_mean(name, names)}")
    return UserFunction(found, f"{file.name}:{name}", blake3(source.encode()).hexdigest())


def _definition(spec: Callable[..., Any], name: str) -> bytes:
    """What a callable does, as bytes: its source, or, for one that was typed in, its bytecode."""
    try:
        return inspect.getsource(spec if inspect.isfunction(spec) or inspect.isclass(spec) else type(spec)).encode()
    except (OSError, TypeError):
        if inspect.isfunction(spec):
            return marshal.dumps(spec.__code__)
    raise OptionError(
        f"the source of {name} cannot be read, so its results could not be cached safely: put it into a file and pass "
        f"'file.py:{name}'."
    )

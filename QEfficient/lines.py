"""Reads a text file line by line, with one sentence when that cannot be done."""

from __future__ import annotations

import sys
from pathlib import Path

from QEfficient.errors import InputError


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are not blank; ``-`` is standard input.

    Raises:
        InputError: the file cannot be read or has no text.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8.") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{'standard input' if str(path) == '-' else path} holds no text: write one per line.")
    return lines

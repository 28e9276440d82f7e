"""Runs a user's Python file as a module of its own, for transforms and functions named ``file.py:Name``."""

from __future__ import annotations

import sys
import types
from pathlib import Path

from blake3 import blake3


def run_source(source: str, path: Path) -> types.ModuleType:
    """The module that the text of a file makes; whatever it raises surfaces as it is."""
    # Not through the import system: its bytecode cache may hold the file's previous text, and lies beside it.
    module = types.ModuleType(f"qefficient_user_{path.stem}_{blake3(source.encode()).hexdigest()[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their own module up
    exec(compile(source, str(path), "exec"), vars(module))
    return module

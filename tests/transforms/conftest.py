"""Captured steps, made once per run: capturing takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import training_steps
from filelock import FileLock


@pytest.fixture(scope="session")
def captured(qeff_home: Path) -> Callable[[str], ir.Model]:
    """Family -> a fresh copy of its training step; workers of pytest-xdist share what one has captured."""
    place = qeff_home.with_name("captured-steps")
    place.mkdir(exist_ok=True)

    def get(family: str) -> ir.Model:
        file = place / f"{family}.onnx"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                file.write_bytes(training_steps.capture(family))
        return training_steps.load(file.read_bytes())

    return get

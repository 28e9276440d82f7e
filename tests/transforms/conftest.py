"""Captured steps, made once per run: capturing takes seconds."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest
import training_steps


@pytest.fixture(scope="session")
def captured() -> Callable[[str], ir.Model]:
    """Family -> a fresh copy of its training step."""
    made: dict[str, bytes] = {}

    def get(family: str) -> ir.Model:
        if family not in made:
            made[family] = training_steps.capture(family)
        return training_steps.load(made[family])

    return get

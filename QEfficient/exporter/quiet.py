"""Keeps the chatter of torch and transformers off a user's terminal while an export runs."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "transformers")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Errors only, no warnings: exporters log progress and signature guesses, models log missing fast kernels."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

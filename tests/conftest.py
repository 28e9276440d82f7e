"""What every test gets: a cache of its own run, one torch thread, a quiet transformers and no network."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch, tokenizers or transformers; subprocesses inherit them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)
# Thousands of lines per export, which pytest would print after every failure.
logging.getLogger("torch.__trace").addFilter(lambda record: False)


@pytest.fixture(scope="session", autouse=True)
def qeff_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``QEFF_HOME`` of this run, so that no test reads or writes the user's cache.

    Workers of pytest-xdist share it: what one compiled, the other finds.
    """
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "qeff-home"
    before = os.environ.get("QEFF_HOME")
    os.environ["QEFF_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["QEFF_HOME"]
    else:
        os.environ["QEFF_HOME"] = before

"""A checkpoint with a tokenizer and rows to train on, made once per run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from step_models import base_model
from tiny_models import save_tiny, tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Llama with random weights, 128 tokens, and a tokenizer that fits them."""
    place = save_tiny(base_model("llama"), tmp_path_factory.mktemp("checkpoint") / "tiny-llama")
    return tiny_tokenizer(place)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """46 rows of different length that a tiny model can learn: an answer says the prompt's word three times."""
    words = ["ash", "birch", "cedar", "dogwood", "elm", "fir", "gum", "holly", "ivy", "jute", "kapok"]
    rows = [
        {"prompt": f"{words[n % 11]} {n}:", "completion": " ".join([words[n % 11]] * (1 + n % 3))} for n in range(46)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

"""Rows that cannot be read: refused with their number, or left out and reported; never trained."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_tokenizers import byte_tokenizer

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data_manager import QEffDataManager

GOOD = [{"prompt": f"what is {n}", "completion": f"it is {n}"} for n in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def prepared(tokenizer, data, home, **options):
    config = QEffConfig(
        model_id="m", dataset_name=data, train_frac=1.0, max_ctx_len=64, chat_template="none", **options
    )
    manager = QEffDataManager(config, tokenizer, cache_home_dir=home)
    train, _ = manager.prepare_dataset()
    return manager, train


def lines(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


#: What stands in place of a row, and words of the reason.
BAD = {
    "not JSON": ('{"prompt": "a", ', ["Line 4", "not JSON"]),
    "a number": ("3", ["Line 4", "must be an object"]),
    "a list": ('["a", "b"]', ["Line 4", "must be an object"]),
    "deeply nested": ("[" * 100_000, ["Line 4", "not JSON"]),
    "a missing column": ({"prompt": "a"}, ["Row 4", "prompt"]),
    "other columns": ({"messages": [{"role": "user", "content": "a"}]}, ["Row 4", "messages"]),
    "a number in a text": ({"prompt": 3, "completion": "b"}, ["prompt", "a number"]),
    "an object in a text": ({"prompt": {"a": 1}, "completion": "b"}, ["prompt", "an object"]),
    "half a character": ({"prompt": "a", "completion": "b \ud800"}, ["Row 4", "surrogate"]),
}


@pytest.mark.parametrize(("row", "words"), BAD.values(), ids=BAD)
def test_a_bad_row_stops_the_run_or_is_left_out(tokenizer, tmp_path, row, words):
    data = lines(tmp_path / "rows.jsonl", [*GOOD[:3], row, *GOOD[3:]])
    with pytest.raises(InputError) as error:
        prepared(tokenizer, data, tmp_path)
    assert "4" in str(error.value)
    manager, train = prepared(tokenizer, data, tmp_path, on_bad_row="skip")
    clean, expected = prepared(tokenizer, GOOD, tmp_path)
    assert len(train) == len(expected) == 12
    for found, wanted in zip(train, expected, strict=True):
        np.testing.assert_array_equal(found["input_ids"], wanted["input_ids"])
        np.testing.assert_array_equal(found["labels"], wanted["labels"])
    audit = manager.audit
    assert audit.splits["train"].dropped == {"malformed": 1}
    assert audit.splits["train"].rows_in == 13
    assert len(audit.bad_rows) == 1
    assert all(word in audit.bad_rows[0] for word in words), audit.bad_rows[0]
    assert any("on_bad_row='skip'" in note for note in audit.notes)
    assert not clean.audit.bad_rows
    report = json.loads(manager.write_report(tmp_path).read_text())
    assert report["bad_rows"] == audit.bad_rows
    # From the cache the same.
    again, _ = prepared(tokenizer, data, tmp_path, on_bad_row="skip")
    assert again.audit.bad_rows == audit.bad_rows


def test_a_bad_first_row_does_not_condemn_the_others(tokenizer, tmp_path):
    data = lines(tmp_path / "rows.jsonl", [{"prompt": 1, "completion": 2}, *GOOD])
    manager, train = prepared(tokenizer, data, tmp_path, on_bad_row="skip")
    assert (len(train), manager.audit.splits["train"].dropped) == (12, {"malformed": 1})


def test_the_most_common_format_decides(tokenizer, tmp_path):
    others = [{"instruction": "x", "output": "y"}] * 5
    manager, train = prepared(tokenizer, [*others, *GOOD], tmp_path, on_bad_row="skip")
    assert (manager.audit.format, len(train)) == ("prompt_completion", 12)
    assert manager.audit.splits["train"].dropped == {"malformed": 5}


def test_csv_lines(tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        writer.writerows([["a", "b"], ["only one"], ["c", "d", "e"], ["f", "g"]])
    with pytest.raises(InputError, match="Line 3"):
        prepared(tokenizer, str(path), tmp_path)
    manager, train = prepared(tokenizer, str(path), tmp_path, on_bad_row="skip")
    assert len(train) == 2
    assert [why[:6] for why in manager.audit.bad_rows] == ["Line 3", "Line 4"]


def test_a_huge_row(tokenizer, tmp_path):
    data = lines(tmp_path / "rows.jsonl", [*GOOD, {"prompt": "a", "completion": "x " * 200_000}])
    with pytest.raises(InputError, match="row 13"):
        prepared(tokenizer, data, tmp_path)
    _, train = prepared(tokenizer, data, tmp_path, truncation="drop")
    assert len(train) == 12


def test_nothing_left(tokenizer, tmp_path):
    data = lines(tmp_path / "rows.jsonl", ["nonsense", "more"])
    with pytest.raises(InputError):
        prepared(tokenizer, data, tmp_path, on_bad_row="skip")


def test_the_option(tokenizer):
    with pytest.raises(OptionError, match="on_bad_row must be one of 'error', 'skip'"):
        QEffConfig(model_id="m", dataset_name="d", on_bad_row="ignore")


# ---------------------------------------------------------------------------------- anything at all

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.one_of(
    st.text(max_size=30).filter(lambda text: text.strip()),
    st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "text", "label"]), VALUES, max_size=4),
    VALUES,
)


def refusal(tokenizer, data, home) -> str | None:
    try:
        prepared(tokenizer, data, home)
    except InputError as error:
        return str(error)
    return None


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROWS, min_size=4, max_size=4))
def test_a_thousand_rows_of_anything(tokenizer, tmp_path_factory, bad):
    """Either an error names a row or a line, or, when skipping, all that is trained are the rows that are right."""
    home = tmp_path_factory.mktemp("fuzz")
    mixed = [*GOOD[:6], *bad, *GOOD[6:]]
    data = lines(home / "rows.jsonl", [row if isinstance(row, str) else json.dumps(row) for row in mixed])
    good = {row["completion"] for row in GOOD}
    refused = refusal(tokenizer, data, home)
    assert refused is None or any(word in refused for word in ("Row ", "row ", "Line ")), refused
    manager, train = prepared(tokenizer, data, home, on_bad_row="skip")
    split = manager.audit.splits["train"]
    assert split.rows == len(train) >= len(GOOD)
    assert split.rows + sum(split.dropped.values()) == split.rows_in
    assert all(any(word in why for word in ("Row ", "Line ")) for why in manager.audit.bad_rows)
    trained = [tokenizer.decode(row["input_ids"][row["labels"] != -100]) for row in train]
    assert sum(any(answer in text for answer in good) for text in trained) >= len(GOOD)

"""The same rows in every format from every kind of storage: identical token ids and labels."""

from __future__ import annotations

import csv
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from toy_tokenizers import CHATML, byte_tokenizer

from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data_manager import QEffDataManager

TURNS = [("Grüße, wie geht's?", "gut, danke"), ('2 + 2, "quoted"\nand a line', "[4]"), ("[x]", "{y}")]
FORMATS: dict[str, list[dict[str, Any]]] = {
    "tokenized": [
        {"input_ids": [7, 8, 9, 10 + n], "labels": [-100, 8, -100, 10 + n], "attention_mask": [1, 1, 1, 1]}
        for n in range(3)
    ],
    "segments": [{"segments": [{"label": False, "text": q}, {"label": True, "text": a}]} for q, a in TURNS],
    "messages": [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in TURNS],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}], "system": "Be short."}
        for q, a in TURNS
    ],
    "alpaca": [{"instruction": q, "input": "in", "output": a, "history": [["before", "and after"]]} for q, a in TURNS],
    "prompt_completion": [{"prompt": q, "completion": a} for q, a in TURNS],
    "classification": [{"text": q, "label": n % 2} for n, (q, _) in enumerate(TURNS)],
    "text": [{"text": q + a} for q, a in TURNS],
    "preference": [{"prompt": q, "chosen": a, "rejected": f"{a} [not]"} for q, a in TURNS],
    "unpaired_preference": [{"prompt": q, "completion": a, "label": n != 1} for n, (q, a) in enumerate(TURNS)],
}
#: What such rows are for, where it is not the default.
OPTIONS = {
    "classification": {"task": "seq_classification"},
    "preference": {"method": "dpo"},
    "unpaired_preference": {"method": "kto"},
}


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row where text is all there is: lists as JSON."""
    return {k: v if isinstance(v, str | int) else json.dumps(v, ensure_ascii=False) for k, v in row.items()}


def as_jsonl(rows, place: Path) -> dict[str, Any]:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {"dataset_name": str(path)}


def as_csv(rows, place: Path) -> dict[str, Any]:
    path = place / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(map(flat, rows))
    return {"dataset_name": str(path)}


def as_parquet(rows, place: Path) -> dict[str, Any]:
    path = place / "rows.parquet"
    Dataset.from_list(rows).to_parquet(str(path))
    return {"dataset_name": str(path)}


def as_database(rows, place: Path) -> dict[str, Any]:
    path = place / "rows.db"
    names = list(rows[0])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"CREATE TABLE data (number INTEGER PRIMARY KEY, {', '.join(f'[{n}]' for n in names)})")
        for row in map(flat, rows):
            marks = ", ".join("?" * len(names))
            connection.execute(
                f"INSERT INTO data ({', '.join(f'[{n}]' for n in names)}) VALUES ({marks})", [*row.values()]
            )
    query = f"SELECT {', '.join(f'[{n}]' for n in names)} FROM data ORDER BY number"
    return {"dataset_name": f"sqlite:///{path}", "dataset_query": query}


def as_memory(rows, place: Path) -> dict[str, Any]:
    return {"dataset_name": rows}


STORAGES = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet, "database": as_database}


def encoded(source: dict[str, Any], name: str, home: Path) -> list[dict[str, np.ndarray]]:
    config = QEffConfig(model_id="m", **source, train_frac=1.0, max_ctx_len=256, **OPTIONS.get(name, {}))
    manager = QEffDataManager(config, byte_tokenizer(template=CHATML), cache_home_dir=home)
    train, _ = manager.prepare_dataset()
    assert manager.audit is not None
    assert manager.audit.format == name
    return [_flat(row) for row in train]


def _flat(row: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a row, or of both rows of a pair and what goes with them."""
    flat = {}
    for name, value in row.items():
        flat |= {f"{name}/{n}": v for n, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_storages(name, storage, tmp_path):
    rows = FORMATS[name]
    expected = encoded(as_memory(rows, tmp_path), name, tmp_path)
    assert len(expected) == len(rows) == 3
    found = encoded(STORAGES[storage](rows, tmp_path), name, tmp_path)
    assert [list(row) for row in found] == [list(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for key, value in wanted.items():
            np.testing.assert_array_equal(row[key], value)


def test_the_contents_are_those_written(tmp_path):
    """Against the text itself: what all storages agree on is also right."""
    tokenizer = byte_tokenizer(template=CHATML)
    for name in ("messages", "prompt_completion"):
        for row, (question, answer) in zip(
            encoded(as_csv(FORMATS[name], tmp_path), name, tmp_path), TURNS, strict=True
        ):
            whole = tokenizer.decode(row["input_ids"])
            trained = tokenizer.decode(row["input_ids"][row["labels"] != -100])
            assert question in whole
            assert trained.startswith(answer)
            assert question not in trained

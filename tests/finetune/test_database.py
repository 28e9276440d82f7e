"""Rows from a database: read in a stable order, never written, and mistakes said in one sentence."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
import yaml

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.database import is_database, read_database, without_password
from QEfficient.finetune.data.sources import load_source

ROWS = [("How many?", "Two.", 1), ("And now?", "Three.", 2), ("Grüße?", "ja\nnein", 3)]


@pytest.fixture
def database(tmp_path) -> Iterator[str]:
    path = tmp_path / "rows.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE pairs (question TEXT, answer TEXT, number INTEGER PRIMARY KEY)")
        # Inserted backwards: the order read is the key's, not the file's.
        connection.executemany("INSERT INTO pairs VALUES (?, ?, ?)", ROWS[::-1])
        connection.execute("CREATE TABLE loose (text TEXT)")
        connection.executemany("INSERT INTO loose VALUES (?)", [("b",), ("a",), ("c",)])
        connection.execute("CREATE VIEW answers AS SELECT answer AS text FROM pairs WHERE number > 1")
        connection.execute("CREATE TABLE empty (text TEXT)")
        connection.execute("CREATE TABLE binary (text TEXT, picture BLOB)")
        connection.execute("INSERT INTO binary VALUES ('x', X'00FF')")
    before = path.read_bytes()
    yield f"sqlite:///{path}"
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.glob("rows.db*")) == ["rows.db"]


def test_a_table_in_the_order_of_its_key(database):
    assert read_database(database, None, "pairs") == [{"question": q, "answer": a, "number": n} for q, a, n in ROWS]
    assert [row["text"] for row in read_database(database, None, "loose")] == ["b", "a", "c"]
    assert [row["text"] for row in read_database(database, None, "answers")] == ["Three.", "ja\nnein"]


def test_a_query(database):
    query = "SELECT question AS prompt, answer AS completion FROM pairs WHERE number <> 2 ORDER BY number DESC"
    assert read_database(database, query, None) == [
        {"prompt": "Grüße?", "completion": "ja\nnein"},
        {"prompt": "How many?", "completion": "Two."},
    ]
    assert len(read_database(database, "  with x as (select 1 as text) select * from x", None)) == 1


def test_a_configuration_reads_it(database):
    config = QEffConfig(model_id="m", dataset_name=database, dataset_table="pairs")
    source = load_source(config)
    assert [row["answer"] for row in source.train] == [a for _, a, _ in ROWS]
    assert source.name == database


def test_a_large_table(tmp_path):
    path = tmp_path / "large.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE t (text TEXT)")
        connection.executemany("INSERT INTO t VALUES (?)", ((f"row {i}",) for i in range(5000)))
    rows = read_database(f"sqlite:///{path}", None, "t")
    assert [row["text"] for row in rows] == [f"row {i}" for i in range(5000)]


REFUSED = {
    "nothing to read": ({}, OptionError, ["dataset_query or dataset_table", "pairs", "answers"]),
    "both": ({"query": "select 1", "table": "pairs"}, OptionError, ["give one"]),
    "unknown table": ({"table": "pair"}, OptionError, ["no table 'pair'", "Did you mean 'pairs'"]),
    "a query that writes": ({"query": "DELETE FROM pairs"}, OptionError, ["must only read"]),
    "a write behind a read": ({"query": "select 1; delete from pairs"}, InputError, ["cannot be read"]),
    "a write inside": (
        {"query": "with x as (select 1) insert into loose select 'z' from x"},
        InputError,
        ["cannot be read", "readonly"],
    ),
    "syntax": ({"query": "select from where"}, InputError, ["cannot be read", "syntax"]),
    "unknown column": ({"query": "select nowhere from pairs"}, InputError, ["no such column"]),
    "no rows": ({"table": "empty"}, InputError, ["no rows"]),
    "a column twice": ({"query": "select number as n, answer as n from pairs"}, InputError, ["a column twice"]),
    "binary": ({"table": "binary"}, InputError, ["Row 1", "binary data in picture"]),
}


@pytest.mark.parametrize(("options", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(database, options, error, words):
    with pytest.raises(error) as found:
        read_database(database, options.get("query"), options.get("table"))
    assert all(word in str(found.value) for word in words), str(found.value)


URLS = {
    "no file": ("sqlite:///no/such.db", InputError, ["no database file"]),
    "memory": ("sqlite://", OptionError, ["must be a file"]),
    "unknown kind": ("oracel://host/db", OptionError, ["does not know"]),
    "no driver": ("postgresql+psycopg2://me:secret@host/db", OptionError, ["psycopg2", "not installed"]),
    "no port": ("mysql+pymysql://me:secret@host:port/db", OptionError, ["no database URL"]),
    "variable": ("postgresql://me:${NO_SUCH_VARIABLE}@host/db", OptionError, ["NO_SUCH_VARIABLE", "not set"]),
}


@pytest.mark.parametrize(("url", "error", "words"), URLS.values(), ids=URLS)
def test_urls_that_are_refused(url, error, words):
    with pytest.raises(error) as found:
        read_database(url, "select 1", None)
    assert all(word in str(found.value) for word in words), str(found.value)
    assert "secret" not in str(found.value)


def test_what_is_a_database():
    assert all(map(is_database, ("sqlite:///x.db", "postgresql+psycopg2://h/d", "mysql://u:p@h/d")))
    assert not any(map(is_database, ("rows.jsonl", "org/name", "https://x/y.json", "hf://datasets/x", "/a/b", "C:\\x")))


def test_passwords_are_not_saved(tmp_path):
    config = QEffConfig(model_id="m", dataset_name="mysql://me:s3cret@host/db", dataset_query="select 1")
    saved = yaml.safe_load(config.save(tmp_path / "config.yaml").read_text())
    assert saved["dataset_name"] == "mysql://me:***@host/db"
    assert saved["dataset_query"] == "select 1"
    kept = "mysql://me:${DB_PASSWORD}@host/db"
    assert QEffConfig(model_id="m", dataset_name=kept).to_dict()["dataset_name"] == kept
    assert without_password("sqlite:///a.db") == "sqlite:///a.db"


def test_options_of_a_database_without_one(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(OptionError, match="are for databases"):
        load_source(QEffConfig(model_id="m", dataset_name=str(rows), dataset_table="t"))


def test_variables(tmp_path, monkeypatch):
    path = tmp_path / "a b@c.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE t (text TEXT)")
        connection.execute("INSERT INTO t VALUES ('x')")
    monkeypatch.setenv("PLACE", str(path))
    assert read_database("sqlite:///${PLACE}", None, "t") == [{"text": "x"}]


def test_a_password_with_signs_of_a_url(monkeypatch):
    seen = []
    monkeypatch.setattr("sqlalchemy.create_engine", lambda url: seen.append(url) or 1 / 0)
    monkeypatch.setenv("DB_PASSWORD", "p@ss:w/rd")
    with pytest.raises(ZeroDivisionError):
        read_database("mysql://me:${DB_PASSWORD}@host/db", "select 1", None)
    assert (seen[0].password, seen[0].host) == ("p@ss:w/rd", "host")

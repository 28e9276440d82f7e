"""Rows from a database: any SQLAlchemy URL and a query or a table, read only."""

from __future__ import annotations

import datetime
import decimal
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_plus

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.keywords import short
from QEfficient.suggest import did_you_mean

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine

_URL = re.compile(r"(?!https?:|s3:|gs:|hf:|file:)[A-Za-z][A-Za-z0-9+]*://")
#: Queries that only read; anything else is refused before it is sent.
_READS = re.compile(r"\s*(\(\s*)*(select|with|values|table)\b", re.IGNORECASE)
#: Of an environment variable in a URL, for passwords: ``postgresql://me:${DB_PASSWORD}@host/db``.
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def is_database(name: str) -> bool:
    """Whether a data set's name is the URL of a database."""
    return _URL.match(name) is not None


def without_password(name: str) -> str:
    """The URL with ``***`` for a password that is written out; the name of an environment variable stays."""
    return re.sub(r"(://[^:/@]*:)(?!\$\{)[^@]+@", r"\1***@", name)


def read_database(name: str, query: str | None, table: str | None) -> list[dict[str, Any]]:
    """All rows that `stream_database` gives; InputError when there are none."""
    rows = list(stream_database(name, query, table))
    if not rows:
        raise InputError(f"There are no rows in what was read from {without_password(name)}.")
    return rows


def stream_database(name: str, query: str | None, table: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a query, or of a table in the order of its primary key, as the server hands them out.

    Args:
        name: SQLAlchemy URL; ``${NAME}`` in it is taken from the environment.
        query: an SQL query that reads. Without ORDER BY its order is the database's, and with it what is trained.
        table: a table or view, when there is no query.

    Raises:
        OptionError: neither query nor table, both, a query that does not only read, an unknown table, a driver or
            SQLAlchemy that is not installed, or a variable that is not set.
        InputError: the database cannot be reached, refuses the query, or holds binary values.
    """
    if query is not None and table is not None:
        raise OptionError("dataset_query and dataset_table both say what to read: give one of them.")
    if query is not None and not _READS.match(query):
        raise OptionError(f"dataset_query must only read (SELECT …), got {short(query)}.")
    shown = without_password(name)
    engine = _engine(name, shown)
    from sqlalchemy import exc, text

    try:
        with engine.connect() as connection:
            statement = text(query) if query is not None else _table(engine, table, shown)
            result = connection.execution_options(stream_results=True).execute(statement)
            columns = list(result.keys())
            if len(set(columns)) != len(columns):
                raise InputError(f"The query to {shown} has a column twice ({', '.join(columns)}): name them apart.")
            for number, row in enumerate(result, start=1):
                yield {column: _plain(value, column, number) for column, value in zip(columns, row, strict=True)}
    except exc.SQLAlchemyError as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise InputError(f"{shown} cannot be read ({reason[:300]}): check the query and the connection.") from None
    finally:
        engine.dispose()


def _engine(name: str, shown: str) -> Engine:
    try:
        from sqlalchemy import create_engine, exc, make_url
    except ImportError:
        raise OptionError("Data from a database needs SQLAlchemy: pip install 'qefficient[db]'.") from None
    text = _VARIABLE.sub(_from_environment, name)
    try:
        url = make_url(text)
    except (exc.ArgumentError, ValueError) as error:
        raise OptionError(f"{shown} is no database URL ({' '.join(str(error).split())[:200]}).") from None
    if url.get_backend_name() == "sqlite":
        url = _read_only(url)
    try:
        return create_engine(url)
    except exc.NoSuchModuleError:
        raise OptionError(f"{shown} names a kind of database that SQLAlchemy does not know here.") from None
    except ModuleNotFoundError as error:
        raise OptionError(f"{shown} needs the driver {error.name}, which is not installed: pip install it.") from None


def _from_environment(found: re.Match[str]) -> str:
    if found[1] not in os.environ:
        raise OptionError(f"the environment variable {found[1]}, which the database URL names, is not set: set it.")
    value = os.environ[found[1]]
    # Before the @ stand user and password, where signs that mean something in a URL are written as %XX.
    return quote_plus(value) if "@" in found.string[found.end() :] else value


def _read_only(url: URL) -> URL:
    """SQLite would make the file, and lock it for writing."""
    if not url.database or url.database == ":memory:":
        raise OptionError("an SQLite database must be a file: sqlite:///rows.db, or sqlite:////absolute/rows.db.")
    path = Path(url.database).expanduser().absolute()
    if not path.is_file():
        raise InputError(f"There is no database file {path}.")
    return url.set(database=f"file:{path}", query={"mode": "ro", "uri": "true"})


def _table(engine: Engine, name: str | None, shown: str) -> Any:
    from sqlalchemy import MetaData, Table, inspect, select

    found = inspect(engine)
    names = [*found.get_table_names(), *found.get_view_names()]
    if name is None:
        tables = ", ".join(names) or "no tables"
        raise OptionError(f"name what to read from {shown} with dataset_query or dataset_table; it has {tables}.")
    if name not in names:
        raise OptionError(f"{shown} has no table {name!r}.{did_you_mean(name, names)}")
    table = Table(name, MetaData(), autoload_with=engine)
    keys = list(table.primary_key.columns)
    if not keys and engine.dialect.name == "sqlite" and name in found.get_table_names():
        from sqlalchemy import literal_column

        return select(table).order_by(literal_column("rowid"))
    return select(table).order_by(*keys) if keys else select(table)


def _plain(value: Any, column: str, number: int) -> Any:
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes | bytearray | memoryview):
        raise InputError(f"Row {number} has binary data in {column}: leave the column out of the query.")
    return value

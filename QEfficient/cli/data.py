"""``qefficient data``: look at rows, rewrite them, split them, without training anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from QEfficient.cli.command import add_command
from QEfficient.cli.common import CacheDir, TrustRemoteCode
from QEfficient.errors import OptionError

if TYPE_CHECKING:
    from QEfficient.finetune.config import QEffConfig

app = typer.Typer(
    name="data",
    help="Look at the rows of a data set, rewrite them in another form or file, split them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

#: Options of `QEffConfig` that say which rows there are; the others are about tokens.
_ABOUT_ROWS = (
    *("dataset_config", "dataset_query", "dataset_table", "train_split", "eval_split", "dataset_format", "columns"),
    *("task", "on_bad_row", "filters", "preprocess", "custom_dataset_config"),
)

Source = Annotated[
    str,
    typer.Argument(metavar="DATA", help="File, directory, hub id, database URL or name, as for qefficient finetune."),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=VALUE]...", help="Options of the data, e.g. filters=[dedupe].", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]


def inspect(
    source: Source,
    words: Words = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Whose tokenizer to audit labels with.", show_default=False
        ),
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=0, help="Rows to show.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    cache_dir: CacheDir = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Says what a data set holds: its format, splits, filtered and unreadable rows; with --model which tokens train.

    [bold]Examples[/bold]

    qefficient data inspect rows.jsonl
    qefficient data inspect rows.csv columns.prompt=frage columns.completion=antwort
    qefficient data inspect gsm8k dataset_config=mini --model ./my-model max_ctx_len=256
    """
    if model is not None:
        from QEfficient.finetune.data_manager import QEffDataManager
        from QEfficient.finetune.tokenizer_files import load_tokenizer
        from QEfficient.progress import bar

        config = _config(source, words, None, model_id=model)
        tokenizer = load_tokenizer(config.tokenizer_name or model, trust_remote_code=trust_remote_code)
        manager = QEffDataManager(config, tokenizer, cache_home_dir=cache_dir)
        with bar(f"preparing {source}") as report:
            manager.prepare_dataset(report)
        assert manager.audit is not None
        typer.echo(json.dumps(manager.audit.to_dict(), ensure_ascii=False) if as_json else manager.audit.to_text())
        return
    from QEfficient.finetune.data.load import load_rows

    config = _config(source, words, _ABOUT_ROWS)
    found = load_rows(config)
    parts = {"train": found.train, **({"eval": found.evaluation} if found.evaluation is not None else {})}
    facts = {name: _facts(config, part, found.name, rows) for name, part in parts.items()}
    if as_json:
        typer.echo(json.dumps({"source": found.name, "splits": facts}, ensure_ascii=False, default=str))
        return
    typer.echo(f"data: {found.name}")
    for name, fact in facts.items():
        typer.echo(_sentence(name, fact))
        for row in fact["sample"]:
            typer.echo(json.dumps(row, ensure_ascii=False, default=str))


def convert(
    source: Source,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="A .jsonl, .json, .csv or .parquet file.")],
    words: Words = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="FORM", help="messages or pairs; without it rows keep their format.", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Writes the rows of a data set to one file, if wanted as messages or as pairs of prompt and completion.

    Of several splits the one for training; train_split=NAME names another.

    [bold]Examples[/bold]

    qefficient data convert chats.json chats.jsonl --to messages
    qefficient data convert sqlite:///support.db rows.parquet dataset_table=tickets
    """
    from QEfficient.finetune.data.convert import check_output, read_all, write_rows
    from QEfficient.finetune.data.load import load_rows

    config = _config(source, words, _ABOUT_ROWS, train_frac=1.0)
    check_output(output, overwrite)
    found = load_rows(config)
    read = read_all(config, found.train, found.name, to)
    write_rows(read.rows, output)
    typer.echo(f"{output}: {len(read.rows):,} rows{_left_out(read.empty, read.bad)}")


def split(
    source: Source,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Gets train.jsonl and validation.jsonl.")],
    words: Words = None,
    train_frac: Annotated[float, typer.Option(metavar="X", help="Share of the rows for training.")] = 0.85,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the permutation that decides.")] = 42,
    overwrite: Overwrite = False,
) -> None:
    """Splits a data set as a run with the same seed would; the directory is then a data set with evaluation rows.

    [bold]Example[/bold]

    qefficient data split rows.jsonl ./rows --train-frac 0.9
    """
    from QEfficient.finetune.data.convert import check_output, left, read_all, write_rows
    from QEfficient.finetune.data.load import load_rows
    from QEfficient.finetune.data.prepare import split_rows

    config = _config(source, words, _ABOUT_ROWS, train_frac=train_frac, seed=seed)
    files = {"train": directory / "train.jsonl", "eval": directory / "validation.jsonl"}
    for file in files.values():
        if directory.is_dir() or not directory.parent.is_dir():
            check_output(file, overwrite)
    found = load_rows(config)
    if found.evaluation is not None:
        raise OptionError(f"{source} has evaluation rows of its own: it is split already.")
    numbers = left(config, found.train, found.name)
    parts = split_rows(len(numbers), config.train_frac, config.seed)
    if not len(parts[1]):
        raise OptionError(f"train_frac={train_frac} of {len(numbers)} rows leaves none for evaluation: lower it.")
    read = [read_all(config, found.train, found.name, numbers=numbers[part]) for part in parts]
    directory.mkdir(exist_ok=True)
    for file, part in zip(files.values(), read, strict=True):
        write_rows(part.rows, file)
        typer.echo(f"{file}: {len(part.rows):,} rows{_left_out(part.empty, part.bad)}")


def _config(source: str, words: Sequence[str] | None, allowed: Sequence[str] | None, **more: Any) -> QEffConfig:
    """The configuration of a source; with ``allowed``, of options about rows alone."""
    from QEfficient.finetune.config import ALIASES, QEffConfig
    from QEfficient.finetune.layers import read_words
    from QEfficient.suggest import did_you_mean

    given = read_words(list(words or []))
    for name in given:
        if allowed is not None and ALIASES.get(name, name) not in allowed:
            raise OptionError(
                f"{name} has no effect on rows; what has: {', '.join(allowed)}.{did_you_mean(name, allowed)}"
            )
    return QEffConfig(**{"model_id": "none", **more}, dataset_name=source, **given)


def _facts(config: QEffConfig, rows: Any, where: str, shown: int) -> dict[str, Any]:
    from QEfficient.finetune.data.convert import read_all
    from QEfficient.finetune.data.sources import columns_of

    read = read_all(config, rows, where)
    return {
        "rows": len(rows),
        "filtered": read.filtered,
        "empty": read.empty,
        "unreadable": read.bad,
        "format": read.format.name,
        "columns": columns_of(rows),
        "sample": read.rows[:shown],
    }


def _sentence(name: str, fact: dict[str, Any]) -> str:
    said = f"{name}: {fact['rows']:,} rows, format {fact['format']} (columns {', '.join(fact['columns'])})"
    if fact["filtered"]:
        said += f", filters leave out {fact['filtered']:,}"
    return said + _left_out(fact["empty"], fact["unreadable"])


def _left_out(empty: Sequence[int], bad: Sequence[str]) -> str:
    said = f", {len(empty):,} left out with an empty value (the first: row {empty[0]})" if empty else ""
    return said + (f", {len(bad):,} left out that cannot be read (the first: {bad[0]})" if bad else "")


for _command in (inspect, convert, split):
    add_command(app, _command, open_ended=True)

"""``qefficient data``: what it says about rows, and that rewritten or split rows train the same tokens."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from QEfficient.cli.main import app
from QEfficient.errors import InputError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data_manager import QEffDataManager

sys.path.insert(0, str(Path(__file__).parents[1] / "finetune"))
from toy_tokenizers import CHATML, byte_tokenizer


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["data", *(str(a) for a in arguments)], env={"COLUMNS": "200"})


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def refused(*arguments: object) -> str:
    """The one sentence on stderr."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert result.stdout == ""
    return str(line)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tokens(home: Path, source: Path, template: str | None = None, **options: Any) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every training row."""
    config = QEffConfig("m", str(source), **{"max_ctx_len": 512, "train_frac": 1.0, **options})
    train, _ = QEffDataManager(config, byte_tokenizer(template=template), cache_home_dir=home).prepare_dataset()
    return [(row["input_ids"].tolist(), row["labels"].tolist()) for row in train]


PAIRS = [{"question": f"How much is {n}+1? é", "answer": f"{n + 1}"} for n in range(5)]
ALPACA = [{"instruction": "Sort.", "input": f"{n}, 2", "output": "2"} for n in range(5)]
SEGMENTS = [{"segments": [{"label": False, "text": "q"}, {"label": True, "text": f"{n}"}]} for n in range(5)]
PLAIN = [{"prompt": f"{n} ", "completion": "one\ntwo", "system": "Be brief."} for n in range(5)]
CHATS = [
    {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": f"q{n}"},
                       {"from": "gpt", "value": "a"}, {"from": "human", "value": "r"}, {"from": "gpt", "value": "b"}]}
    for n in range(5)
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize(
    ("rows", "form", "template"),
    [
        (PAIRS, "pairs", None), (PAIRS, "pairs", CHATML), (PAIRS, "messages", CHATML),
        (ALPACA, "pairs", None), (ALPACA, "messages", CHATML),
        (PLAIN, "pairs", None), (PLAIN, "messages", CHATML),
        (CHATS, "messages", CHATML), (CHATS, None, CHATML), (PAIRS, None, None),
        ([{"text": f"row {n}"} for n in range(5)], "pairs", None),
        (SEGMENTS, "pairs", None),
    ],
)  # fmt: skip
def test_rewritten_rows_train_the_same_tokens(
    tmp_path: Path, rows: list[Any], form: str | None, template: str | None, suffix: str
) -> None:
    source, output = write(tmp_path / "rows.jsonl", rows), tmp_path / f"out.{suffix}"
    said = done("convert", source, output, *(["--to", form] if form else []))
    assert said.strip() == f"{output}: 5 rows"
    assert tokens(tmp_path, output, template) == tokens(tmp_path, source, template)
    assert sorted(path.name for path in tmp_path.glob("*out*")) == [output.name], "nothing half-written is left"


def test_a_split_is_the_one_a_run_makes(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*PAIRS, *ALPACA_AS_PAIRS])
    done("split", source, tmp_path / "parts", "--train-frac", 0.7, "--seed", 3)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["train.jsonl", "validation.jsonl"]
    home = tmp_path / "home"
    whole = QEffDataManager(
        QEffConfig("m", str(source), train_frac=0.7, seed=3), byte_tokenizer(), cache_home_dir=home
    ).prepare_dataset()
    parts = QEffDataManager(
        QEffConfig("m", str(tmp_path / "parts"), seed=3), byte_tokenizer(), cache_home_dir=home
    ).prepare_dataset()
    for one, other in zip(whole, parts, strict=True):
        assert one is not None
        assert other is not None
        assert [row["input_ids"].tolist() for row in one] == [row["input_ids"].tolist() for row in other]
    assert len(whole[0]) == 7


ALPACA_AS_PAIRS = [{"question": f"Sort {n}.", "answer": "2"} for n in range(5)]


def test_inspect_counts_what_is_there(tmp_path: Path) -> None:
    rows = [*PAIRS, PAIRS[0], {"question": "", "answer": "x"}, {"question": "only"}]
    source = write(tmp_path / "rows.jsonl", rows)
    said = done("inspect", source, "filters=[dedupe]", "on_bad_row=skip", "--rows", 1)
    first, counts, sample = said.strip().splitlines()
    assert first == f"data: {source}"
    assert counts.startswith("train: 8 rows, format prompt_completion (columns question, answer), filters leave out 1")
    assert "1 left out with an empty value (the first: row 7)" in counts
    assert "1 left out that cannot be read (the first: Row 8 has the columns question" in counts
    assert json.loads(sample) == PAIRS[0]


def test_rows_of_two_formats_are_refused_as_in_a_run(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*PAIRS, *CHATS[:1]])
    assert "Row 6 has the columns conversations (format sharegpt), and 5 of 6 rows" in refused("inspect", source)
    config = QEffConfig("m", str(source))
    with pytest.raises(InputError, match="Row 6 has the columns conversations"):
        QEffDataManager(config, byte_tokenizer(), cache_home_dir=tmp_path).prepare_dataset()
    # Where rows may be skipped, the most common format decides, and the odd row keeps its number.
    said = done("inspect", source, "on_bad_row=skip")
    assert "format prompt_completion" in said
    assert "the first: Row 6 has" in said


def test_inspect_as_json_and_renamed_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("frage", "antwort"), ("1+1?", "2"), ("2+2?", "4")])
    found = json.loads(
        done("inspect", path, "columns.prompt=frage", "columns.completion=antwort", "--json", "--rows", 9)
    )
    assert found["splits"]["train"]["sample"] == [
        {"prompt": "1+1?", "completion": "2"}, {"prompt": "2+2?", "completion": "4"}
    ]  # fmt: skip


def test_inspect_with_a_tokenizer_is_the_audit(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options = (
        "inspect",
        "gsm8k",
        "dataset_config=mini",
        "--model",
        tmp_path / "model",
        "--cache-dir",
        tmp_path / "home",
    )
    said = done(*options, "max_ctx_len=512", "train_frac=0.75")
    assert "train: 9 of 9 rows" in said
    assert "eval: 3 of 3 rows" in said
    assert "[[" in said
    assert json.loads(done(*options, "max_ctx_len=512", "--json"))["format"] == "prompt_completion"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "missing.jsonl"), "There is no data at missing.jsonl"),
        (("inspect", "/dev/null"), "/dev/null is neither a file nor a directory"),
        (("inspect", "ROWS", "max_ctx_len=9"), "max_ctx_len has no effect on rows"),
        (("inspect", "ROWS", "filter=[dedupe]"), "Did you mean 'filters'"),
        (("inspect", "ROWS", "dedupe"), "'dedupe' is no option"),
        (("convert", "ROWS", "DIR/out.txt"), "must end in one of .jsonl, .json, .csv, .parquet"),
        (("convert", "ROWS", "DIR/none/out.jsonl"), "there is no directory"),
        (("convert", "ROWS", "ROWS"), "is there already"),
        (("convert", "ROWS", "DIR/out.jsonl", "--to", "chat"), "rows can become messages or pairs"),
        (("convert", "CHATS", "DIR/out.jsonl", "--to", "pairs"), "conversations cannot become pairs"),
        (("convert", "BAD", "DIR/out.jsonl"), "line 2"),
        (("split", "ROWS", "DIR/parts", "--train-frac", "1"), "leaves none for evaluation"),
        (("split", "SPLIT", "DIR/parts"), "it is split already"),
        (("split", "ROWS", "DIR/none/parts"), "there is no directory"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    names = {
        "ROWS": str(write(tmp_path / "rows.jsonl", PAIRS)),
        "CHATS": str(write(tmp_path / "chats.jsonl", CHATS)),
        "BAD": str(tmp_path / "bad.jsonl"),
        "SPLIT": str(tmp_path / "split"),
    }
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "split").mkdir()
    for name in ("train", "test"):
        write(tmp_path / "split" / f"{name}.jsonl", PAIRS)
    before = sorted(tmp_path.rglob("*"))
    said = refused(*(names.get(a, a.replace("DIR", str(tmp_path))) for a in arguments))
    assert words in said
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_overwrite(tmp_path: Path) -> None:
    source, output = write(tmp_path / "rows.jsonl", PAIRS), tmp_path / "out.jsonl"
    output.write_text("mine")
    assert "is there already" in refused("convert", source, output)
    assert output.read_text() == "mine"
    done("convert", source, output, "--overwrite")
    assert len(output.read_text().splitlines()) == 5

"""Data sets by name: built-in ones from their bundled rows, files and a stand-in hub, and registered ones."""

from __future__ import annotations

import json
import re

import datasets
import pytest
from toy_tokenizers import byte_tokenizer

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune import QEffConfig, QEffDataManager, register_dataset
from QEfficient.finetune.data import named


@pytest.fixture(autouse=True)
def _forget_registered(monkeypatch):
    monkeypatch.setattr(named, "_registered", {})


def prepare(home, name, tokenizer=None, **options):
    """(manager, training rows, evaluation rows)."""
    config = QEffConfig("m", name, **{"max_ctx_len": 512, **options})
    manager = QEffDataManager(config, tokenizer or byte_tokenizer(), cache_home_dir=home)
    return manager, *manager.prepare_dataset()


def decoded(rows, tokenizer, index=0):
    """(whole text, trained text) of a row."""
    ids, labels = rows[index]["input_ids"], rows[index]["labels"]
    return tokenizer.decode(ids), tokenizer.decode(labels[labels != -100])


# ---------------------------------------------------------------------------------------------- built in


@pytest.mark.parametrize("suffix", ["", "_dataset"])
@pytest.mark.parametrize(
    ("name", "format_name", "rows", "options"),
    [
        ("gsm8k", "prompt_completion", 12, {}),
        ("alpaca", "alpaca", 12, {}),
        ("grammar", "prompt_completion", 12, {}),
        ("imdb", "classification", 16, {"task": "seq_classification"}),
    ],
)
def test_each_has_rows_without_a_network(tmp_path, name, format_name, rows, options, suffix):
    manager, train, held = prepare(tmp_path, name + suffix, dataset_config="mini", train_frac=0.75, **options)
    assert len(train) + len(held) == rows
    assert manager.audit.format == format_name
    assert manager.label_names == ({"0": 0, "1": 1} if "task" in options else None)


#: What the hub has, column by column, a row or two of each split: the data sets' cards.
HUB = {
    ("openai/gsm8k", "main"): {
        "train": [{"question": "How many?", "answer": "2+2 = <<2+2=4>>4\n#### 4"}],
        "test": [{"question": "And now?", "answer": "3+1 = <<3+1=4>>4\n#### 4"}],
    },
    ("tatsu-lab/alpaca", None): {
        "train": [{"instruction": f"Say {n}.", "input": "", "output": f"{n}", "text": "all of it"} for n in range(4)]
    },
    ("stanfordnlp/imdb", None): {
        "train": [{"text": "bad", "label": 0}, {"text": "good", "label": 1}],
        "test": [{"text": "fine", "label": 1}],
        "unsupervised": [{"text": "unknown", "label": -1}],
    },
    ("jhu-clsp/jfleg", None): {
        "validation": [{"sentence": "He go .", "corrections": ["He goes .", "He went ."]}],
        "test": [{"sentence": "She go .", "corrections": ["She goes ."]}],
    },
}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub that knows these four."""

    def load_dataset(name, subset=None, streaming=False):
        if (name, subset) not in HUB:
            raise FileNotFoundError(f"{name} {subset} is not on the stand-in hub")
        return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in HUB[name, subset].items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize(
    ("name", "counts", "options"),
    [
        ("gsm8k", (1, 1), {}),
        ("alpaca", (3, 1), {}),
        ("imdb", (2, 1), {"task": "seq_classification"}),
        ("grammar", (2, 1), {}),
    ],
)
def test_the_hub_s_splits_and_columns(hub, tmp_path, name, counts, options):
    _, train, held = prepare(tmp_path, name, **options)
    assert (len(train), len(held)) == counts


def test_a_hub_out_of_reach_says_what_else_there_is(hub, tmp_path):
    with pytest.raises(InputError, match=r"dataset_config='mini' for a few rows.*custom_dataset_config=\{'file'"):
        prepare(tmp_path, "gsm8k", dataset_config="socratic")


def test_a_file_of_one_s_own(tmp_path):
    rows = [{"question": f"{n}+1?", "answer": f"{n}+1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(8)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_tokenizer()
    _, train, held = prepare(
        tmp_path, "gsm8k", tokenizer, custom_dataset_config={"file": str(path)}, train_frac=0.5, seed=1
    )
    assert len(train) == len(held) == 4
    numbers = sorted(int(row) - 1 for part in (train, held) for row in part.numbers)
    assert numbers == list(range(8))
    assert decoded(train, tokenizer)[1].endswith(f"#### {int(train.numbers[0])}</s>")


def test_calculations_without_their_results(tmp_path):
    """The trained text is the answer without what stands between = and >>, found in the text by an expression."""
    tokenizer = byte_tokenizer()
    options = {"dataset_config": "mini", "train_frac": 1.0, "custom_dataset_config": {"mask_results": True}}
    _, train, _ = prepare(tmp_path, "gsm8k", tokenizer, **options)
    plain = [json.loads(line) for line in (named_file("gsm8k")).read_text().splitlines()]
    for index, row in enumerate(plain):
        whole, trained = decoded(train, tokenizer, index)
        assert whole == f"{row['question']}\n{row['answer']}</s>"
        assert trained == re.sub(r"(<<[^=]*=)[^>]*(>>)", r"\1\2", row["answer"]) + "</s>"


def named_file(name):
    from pathlib import Path

    import QEfficient.finetune

    return Path(QEfficient.finetune.__file__).parent / "samples" / f"{name}.jsonl"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gsm8k", {"custom_dataset_config": {"mask_result": True}}, ["mask_result", "Did you mean 'mask_results'"]),
        ("alpaca", {"custom_dataset_config": {"file": "x.jsonl"}, "dataset_config": "mini"}, ["both say where"]),
        ("imdb", {"dataset_config": "mini"}, ["task='seq_classification'"]),
        ("custom_dataset", {}, ["preproc_file"]),
    ],
)
def test_bad_options(tmp_path, name, options, words):
    with pytest.raises(OptionError) as error:
        prepare(tmp_path, name, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_grammar_row_without_its_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"input": "He go.", "target": "He goes."}\n{"input": "She go."}\n{"input": "I goes.", "target": "I go."}\n'
    )
    with pytest.raises(InputError, match="Row 2 has the columns input"):
        prepare(tmp_path, "grammar", custom_dataset_config={"file": str(path)})


# ------------------------------------------------------------------------------- efficient-transformers' contract

PREPROC = """
def rows(dataset_config, tokenizer, split, context_length=None):
    ids = [tokenizer(f"{dataset_config.greeting} {split} {n}").input_ids[:context_length] for n in range(3)]
    return [{"input_ids": i, "attention_mask": [1] * len(i), "labels": [-100] * 4 + i[4:]} for i in ids]
"""


@pytest.mark.parametrize("as_file", [False, True])
def test_custom_dataset(tmp_path, as_file):
    (tmp_path / "own.py").write_text(PREPROC)
    settings = {"preproc_file": f"{tmp_path}/own.py:rows", "train_split": "tr", "test_split": "te", "greeting": "hey"}
    if as_file:
        (tmp_path / "settings.json").write_text(json.dumps(settings))
    given = str(tmp_path / "settings.json") if as_file else settings
    tokenizer = byte_tokenizer()
    _, train, held = prepare(tmp_path, "custom_dataset", tokenizer, custom_dataset_config=given, max_ctx_len=20)
    assert [decoded(train, tokenizer, n) for n in range(3)] == [(f"hey tr {n}", f"tr {n}") for n in range(3)]
    assert [decoded(held, tokenizer, n)[0] for n in range(3)] == [f"hey te {n}" for n in range(3)]


def test_custom_dataset_without_evaluation_rows_is_split(tmp_path):
    (tmp_path / "own.py").write_text(PREPROC)
    settings = {"preproc_file": f"{tmp_path}/own.py:rows", "greeting": "hello"}
    _, train, held = prepare(tmp_path, "custom_dataset", custom_dataset_config=settings, train_frac=0.7)
    assert (len(train), len(held)) == (2, 1)


def test_an_error_in_the_user_s_function_is_theirs(tmp_path):
    (tmp_path / "own.py").write_text("def rows(dataset_config, tokenizer, split, context_length=None):\n    1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        prepare(tmp_path, "custom_dataset", custom_dataset_config={"preproc_file": f"{tmp_path}/own.py:rows"})


# ---------------------------------------------------------------------------------------------- registered


def test_a_function_gets_values_by_name(tmp_path):
    @register_dataset("squares")
    def squares(count, seed, tokenizer):
        assert tokenizer.eos_token == "</s>"
        return [{"prompt": f"{n}*{n}=", "completion": f"{n * n + seed - seed}"} for n in range(count)]

    tokenizer = byte_tokenizer()
    _, train, _ = prepare(tmp_path, "squares", tokenizer, custom_dataset_config={"count": 5}, train_frac=1.0)
    assert [decoded(train, tokenizer, n) for n in range(5)] == [
        (f"{n}*{n}={n * n}</s>", f"{n * n}</s>") for n in range(5)
    ]


def test_a_function_and_a_class_may_return_splits(tmp_path):
    rows = [{"text": f"row {n}"} for n in range(4)]
    register_dataset("parts", lambda: {"train": rows[:3], "test": rows[3:]})

    class Parts:
        def load_data(self):
            return {"train": rows[:3], "dev": rows[3:]}

        def preprocess(self, row):
            return None if row["text"] == "row 1" else row

    register_dataset("class parts", Parts)
    assert [len(part) for part in prepare(tmp_path, "parts")[1:]] == [3, 1]
    assert [len(part) for part in prepare(tmp_path, "class parts")[1:]] == [2, 1]


def test_splits_and_a_split_method_contradict_each_other(tmp_path):
    class Both:
        def load_data(self):
            return {"train": [{"text": "a"}]}

        def split(self, rows):
            return rows, None

    register_dataset("both", Both())
    with pytest.raises(OptionError, match=r"Both\.load_data returns splits"):
        prepare(tmp_path, "both")


@pytest.mark.parametrize(
    ("name", "dataset", "words"),
    [
        ("gsm8k", list, "comes with this library"),
        ("imdb_dataset", list, "comes with this library"),
        ("sample", list, "comes with this library"),
        ("", list, "non-empty string"),
        (3, list, "non-empty string"),
        ("rows", [{"text": "a"}], "must be a function or have load_data"),
    ],
)
def test_what_cannot_be_registered(name, dataset, words):
    with pytest.raises(OptionError, match=words):
        register_dataset(name, dataset)


def test_a_name_that_is_nearly_known(tmp_path, hub):
    register_dataset("squares", lambda: [{"text": "a"}])
    with pytest.raises(InputError, match="Did you mean 'squares'"):
        prepare(tmp_path, "sqares")

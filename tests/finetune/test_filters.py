"""Filters: what each removes, in which order, and that what it removed is counted and never trained."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_tokenizers import byte_tokenizer

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.filters import apply_filters, read_filters
from QEfficient.finetune.data_manager import QEffDataManager


def left(specs, rows):
    kept, removed = apply_filters(read_filters(specs), list(enumerate(rows)))
    return kept, {name: count for name, count in removed.items() if count}


def texts(*values):
    return [{"text": value} for value in values]


def test_duplicates_in_spite_of_case_signs_and_spaces():
    rows = texts("Hello, world!", "hello   WORLD", "hello there", "ﬁne", "fine", "Hello, world!")
    assert left("dedupe", rows) == ([0, 2, 3], {"dedupe": 3})
    ids = [{"input_ids": [1, 2]}, {"input_ids": [1, 2]}, {"input_ids": [2, 1]}]
    assert left("dedupe", ids) == ([0, 2], {"dedupe": 1})


def test_names_of_columns_do_not_make_rows_equal():
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "b", "completion": "a"}]
    assert left("dedupe", rows)[0] == [0, 1]


def jaccard(one: str, other: str, size: int = 8) -> float:
    a, b = ({text[i : i + size] for i in range(max(1, len(text) - size + 1))} for text in (one, other))
    return len(a & b) / len(a | b)


def test_near_duplicates_are_those_of_the_exact_measure():
    """Against the similarity itself, for pairs that are not so near the threshold that an estimate may err."""
    draw = random.Random(0)
    vocabulary = [f"word{n}" for n in range(200)]
    wrong = checked = 0
    for _ in range(60):
        base, share = draw.choices(vocabulary, k=60), draw.choice((0.0, 0.01, 0.3))
        other = [draw.choice(vocabulary) if draw.random() < share else word for word in base]
        one, two = " ".join(base), " ".join(other)
        exact = jaccard(one, two)
        if abs(exact - 0.8) < 0.12:
            continue
        checked += 1
        wrong += (len(left("near_duplicates:0.8", texts(one, two))[0]) == 1) != (exact >= 0.8)
    assert checked > 25
    assert wrong <= 1


def test_near_duplicates_without_spaces():
    base = "这是一个用于测试近似重复检测的句子,它没有空格,但有很多字符,足以比较两个几乎相同的文本。" * 2
    changed = base[:-6] + "内容。"
    assert left("near_duplicates:threshold=0.7", texts(base, changed, "完全不同的内容,没有任何共同之处。")) == (
        [0, 2],
        {"near_duplicates": 1},
    )


QUALITY = {
    "A plain sentence about three apples and a pear.": True,
    "Один простой текст о трёх яблоках и груше.": True,
    "一个关于三个苹果和一个梨的简单句子。": True,
    "=== --- *** ||| ### !!! ??? ... ;;; ///": False,
    "": False,
    "same line\n" * 9: False,
    "buy now " * 40: False,
    "data " + "A1b2" * 40: False,
}


@pytest.mark.parametrize(("text", "stays"), QUALITY.items(), ids=range(len(QUALITY)))
def test_quality(text, stays):
    assert bool(left("quality", texts(text))[0]) is stays


def test_lengths():
    rows = texts("one", "one two", "one two three")
    assert left(["min_words:2"], rows)[0] == [1, 2]
    assert left(["max_words:most=2"], rows)[0] == [0, 1]


def test_the_order_counts(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def keep(row):\n    return 'x' not in row['text']\n")
    rows = texts("a b", "a b", "x b", "c")
    assert left(["dedupe", f"{own}:keep", "min_words:2"], rows) == (
        [0],
        {"dedupe": 1, "own.py:keep": 1, "min_words": 1},
    )


@given(st.lists(st.text(max_size=6), max_size=30))
def test_what_stays_is_a_subsequence_without_duplicates(values):
    kept, removed = left(["dedupe"], texts(*values))
    assert kept == sorted(kept)
    assert len(kept) + sum(removed.values()) == len(values)
    assert left(["dedupe"], [texts(*values)[n] for n in kept])[0] == list(range(len(kept)))


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ("dedup", ["no filter 'dedup'", "Did you mean 'dedupe'"]),
        ("min_words", ["needs a number"]),
        ("min_words:few", ["must be a number"]),
        ("near_duplicates:2", ["at most 1"]),
        ("near_duplicates:treshold=0.5", ["Did you mean 'threshold'"]),
        ("dedupe:3", ["no parameters"]),
        (3, ["must be a list"]),
        ([3], ["a filter must be"]),
        ("missing.py:keep", ["no file missing.py"]),
    ],
)
def test_what_is_refused(specs, words):
    with pytest.raises(OptionError) as error:
        read_filters(specs)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_run_counts_what_filters_removed(tmp_path):
    rows = texts(*(f"row number {n}" for n in range(10)), "row number 3", "no")
    config = QEffConfig(
        model_id="m", dataset_name=rows, train_frac=0.5, max_ctx_len=64, filters=["dedupe", "min_words:2"]
    )
    manager = QEffDataManager(config, byte_tokenizer(), cache_home_dir=tmp_path)
    train, held = manager.prepare_dataset()
    assert (len(train), len(held)) == (5, 5)
    assert manager.audit.filtered == {"dedupe": 1, "min_words": 1}
    assert "filtered: dedupe 1, min_words 1" in manager.audit.to_text()
    found = [manager.tokenizer.decode(row["input_ids"]) for part in (train, held) for row in part]
    assert len({text.removesuffix("</s>") for text in found}) == 10
    assert not any(text.startswith("no") for text in found)


def test_filters_that_leave_nothing(tmp_path):
    config = QEffConfig(model_id="m", dataset_name=texts("a", "b"), max_ctx_len=8, filters=["min_words:9"])
    with pytest.raises(InputError, match=r"leave no row \(2 × min_words"):
        QEffDataManager(config, byte_tokenizer(), cache_home_dir=tmp_path).prepare_dataset()


def test_a_changed_filter_is_another_data_set(tmp_path):
    own = tmp_path / "own.py"
    keys = []
    for body in ("return True", "return 'a' in row['text']"):
        own.write_text(f"def keep(row):\n    {body}\n")
        config = QEffConfig(
            model_id="m", dataset_name=texts("a", "b"), train_frac=1.0, max_ctx_len=8, filters=[f"{own}:keep"]
        )
        manager = QEffDataManager(config, byte_tokenizer(), cache_home_dir=tmp_path)
        train, _ = manager.prepare_dataset()
        keys.append((manager.fingerprint, len(train)))
    assert keys[0][0] != keys[1][0]
    assert [count for _, count in keys] == [2, 1]

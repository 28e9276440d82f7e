"""Functions over rows and augmentation: which rows they see, what becomes of them, and that seeds decide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_tokenizers import CHATML, byte_tokenizer

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.augment import augmented, read_augmentations
from QEfficient.finetune.data_manager import QEffDataManager


def prepare(home, rows, template=None, **options):
    config = QEffConfig("m", rows, **{"max_ctx_len": 256, "train_frac": 1.0, **options})
    manager = QEffDataManager(config, byte_tokenizer(template=template), cache_home_dir=home)
    train, held = manager.prepare_dataset()
    return manager, texts(manager, train), texts(manager, held)


def texts(manager, rows):
    return [] if rows is None else [manager.tokenizer.decode(row["input_ids"]) for row in rows]


def chat(*contents, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


# ---------------------------------------------------------------------------------------------- functions over rows


def test_of_one_row_and_of_all(tmp_path):
    def shout(row):
        return None if "no" in row["text"] else {"text": row["text"].upper()}

    def backwards(rows):
        return list(rows)[::-1]

    rows = [{"text": "one"}, {"text": "no"}, {"text": "two"}]
    _, train, _ = prepare(tmp_path, rows, preprocess=[shout, backwards])
    assert train == ["TWO</s>", "ONE</s>"]


def test_they_run_before_filters_and_the_split_and_on_evaluation_rows_too(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def first(example):\n    return {'text': example['text'].split()[0]}\n")
    data = {"train": [{"text": "a x"}, {"text": "a y"}], "test": [{"text": "b z"}]}
    manager, train, held = prepare(
        tmp_path, data, preprocess=[f"{own}:first"], filters=["dedupe"], train_frac=0.85, eval_split="test"
    )
    assert (train, held) == (["a</s>"], ["b</s>"])
    assert manager.audit.filtered == {"dedupe": 1}


def test_a_function_that_returns_no_row(tmp_path):
    def wrong(row):
        return 3

    with pytest.raises(InputError, match=r"wrong must return a row or None, and made 3 of row 1"):
        prepare(tmp_path, [{"text": "a"}], preprocess=[wrong])

    def nothing(rows):
        return []

    with pytest.raises(InputError, match=r"no rows in what .*nothing returned"):
        prepare(tmp_path, [{"text": "a"}], preprocess=nothing)


# ---------------------------------------------------------------------------------------------- augmentation


def test_only_training_rows_and_their_numbers(tmp_path):
    def twice(row, rng):
        return [row, {"text": row["text"] + "!"}]

    data = {"train": [{"text": "a"}, {"text": "b"}], "test": [{"text": "c"}]}
    manager, train, held = prepare(tmp_path, data, augment=[twice], train_frac=0.85, eval_split="test")
    assert train == ["a</s>", "a!</s>", "b</s>", "b!</s>"]
    assert held == ["c</s>"]
    assert manager.audit.splits["train"].rows_in == 4
    assert any("augmentation made 4 training rows of 2" in note for note in manager.audit.notes)


def test_system_dropout_drops_its_share_and_nothing_else(tmp_path):
    rows = [chat(f"q{n}", f"a{n}", system="Be brief.") for n in range(400)]
    _, train, _ = prepare(tmp_path, rows, CHATML, augment=["system_dropout:0.25"])
    without = sum("Be brief." not in text for text in train)
    assert 70 <= without <= 130, "a quarter of 400, give or take three standard deviations"
    whole = [text.replace("<|im_start|>system\nBe brief.<|im_end|>\n", "") for text in train]
    _, plain, _ = prepare(tmp_path, [chat(f"q{n}", f"a{n}") for n in range(400)], CHATML)
    assert whole == plain


def test_turn_prefixes_train_every_answer_as_the_last(tmp_path):
    rows = [chat("q1", "a1", "q2", "a2", "q3", "a3"), chat("q4", "a4")]
    config = QEffConfig("m", rows, max_ctx_len=256, train_frac=1.0, train_on="last", augment=["turn_prefixes"])
    manager = QEffDataManager(config, byte_tokenizer(template=CHATML), cache_home_dir=tmp_path)
    train, _ = manager.prepare_dataset()
    trained = [manager.tokenizer.decode(row["labels"][row["labels"] != -100]) for row in train]
    assert [text.split("<|im_end|>")[0] for text in trained] == ["a1", "a2", "a3", "a4"]
    assert train.numbers.tolist() == [1, 1, 1, 2]


@given(st.integers(0, 2**31), st.integers(1, 10**6), st.integers(0, 5))
def test_the_same_seed_and_row_give_the_same_whatever_came_before(seed, number, others):
    def noisy(row, rng):
        return {"text": f"{row['text']} {rng.random()}"}

    found = read_augmentations([noisy])
    row = {"text": "a"}
    expected = augmented(found, row, seed, number)
    for other in range(others):
        augmented(found, row, seed, number + 1 + other)
    assert augmented(found, row, seed, number) == expected
    assert augmented(found, row, seed, number + 1) != expected
    assert augmented(found, row, seed + 1, number) != expected


def test_a_row_that_is_dropped_or_broken(tmp_path):
    def drop(row, rng):
        return None if row["text"] == "a" else row

    assert prepare(tmp_path, [{"text": "a"}, {"text": "b"}], augment=[drop])[1] == ["b</s>"]

    def broken(row, rng):
        return [row, 3]

    with pytest.raises(InputError, match="broken must return a row, a list of rows or None"):
        prepare(tmp_path, [{"text": "a"}], augment=[broken])


def test_the_cache_tells_augmentations_apart(tmp_path):
    rows = [chat("q", "a", system="S") for _ in range(3)]
    counts = []
    for share in ("1", "0.0001"):
        _, train, _ = prepare(tmp_path, rows, CHATML, augment=[f"system_dropout:{share}"])
        counts.append(sum("system" in text for text in train))
    assert counts == [0, 3]


def test_functions_that_were_typed_in_are_told_apart(tmp_path):
    """As at a prompt, where there is no source: the cache must not answer for another function of the same name."""
    found = []
    for word in ("one", "two"):
        space = {}
        exec(f"def change(row, rng):\n    return {{'text': '{word}'}}\n", space)
        found += prepare(tmp_path, [{"text": "a"}], augment=[space["change"]])[1]
    assert found == ["one</s>", "two</s>"]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("augment", "system_dropout:2", "at most 1"),
        ("augment", ["system_drop"], "Did you mean 'system_dropout'"),
        ("augment", ["turn_prefixes:3"], "no parameters"),
        ("augment", 3, "must be a list"),
        ("augment", [3], "an augmentation must be"),
        ("preprocess", ["lower"], "a preprocessing function must be a callable"),
        ("preprocess", ["missing.py:f"], "no file missing.py"),
        ("preprocess", 3, "must be a list"),
    ],
)
def test_what_is_refused(option, value, words):
    with pytest.raises(OptionError, match=words):
        QEffConfig("m", "sample", **{option: value})

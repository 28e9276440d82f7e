"""Streams: the tokens of the plain path, read lazily, the same for any number of ranks, and from any position."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import sqlite3

import datasets
import numpy as np
import pytest
from toy_tokenizers import byte_tokenizer, word_classifier_tokenizer

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune import generate_dataset_config, get_preprocessed_dataset
from QEfficient.finetune.arguments import QEffTrainingArgs
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data import stream_prepare
from QEfficient.finetune.data.files import stream_file
from QEfficient.finetune.data.stream_loader import NumberedBatches
from QEfficient.finetune.data_manager import QEffDataManager

ROWS = [{"prompt": f"say {n}", "completion": "yes " * (n % 4 + 1)} for n in range(23)]


class Counting:
    """Rows that are made when they are asked for, and how far each reading went."""

    def __init__(self, rows=None):
        self.rows, self.read = rows, []

    def __iter__(self):
        self.read.append(0)
        place = len(self.read) - 1
        endless = ({"prompt": f"say {n}", "completion": f"{n}"} for n in itertools.count())
        for row in endless if self.rows is None else self.rows:
            self.read[place] += 1
            yield row


def manager(home, data, args=None, **options):
    config = QEffConfig("m", data, **{"max_ctx_len": 64, **options})
    return QEffDataManager(config, byte_tokenizer(), args=args, cache_home_dir=home)


def streamed(home, data, args=None, **options):
    found = manager(home, data, args, streaming=True, **options)
    return found, found.prepare_dataset()[0]


def ordered():
    """Training arguments that shuffle nothing."""
    return QEffTrainingArgs("out", max_steps=5, train_sampling_strategy="sequential")


def ids(batches):
    """The rows of batches without their padding."""
    return [
        tuple(row[mask != 0].tolist())
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------------------------------------- the same tokens


def make_source(kind, place):
    """The rows in a source of a kind; (name, options)."""
    data = datasets.Dataset.from_list(ROWS)
    path = place / f"rows.{kind}"
    if kind in ("jsonl", "jsonl.gz"):
        (gzip.open if kind.endswith("gz") else open)(path, "wt").write("\n\n".join(map(json.dumps, ROWS)))
    elif kind == "csv":
        data.to_pandas().to_csv(path, index=False)
    elif kind == "parquet":
        data.to_parquet(path, batch_size=7)  # four row groups
    elif kind == "arrow":
        with datasets.arrow_writer.ArrowWriter(path=str(path), features=data.features) as writer:
            for row in ROWS:
                writer.write(row)
            writer.finalize()
    elif kind == "database":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, prompt TEXT, completion TEXT)")
            connection.executemany("INSERT INTO rows VALUES (?, ?, ?)",
                                   [(n, *row.values()) for n, row in enumerate(ROWS)])  # fmt: skip
        return f"sqlite:///{path}", {"dataset_table": "rows"}
    elif kind in ("directory", "pattern"):
        (place / kind).mkdir()
        for part, start in enumerate(range(0, 23, 8)):
            write(place / kind / f"part-{part}.jsonl", ROWS[start : start + 8])
        return str(place / kind) + ("/*.jsonl" if kind == "pattern" else ""), {}
    elif kind == "saved folders":
        (place / kind / "data").mkdir(parents=True)
        data.to_parquet(place / kind / "data" / "train-00000.parquet")
        return str(place / kind), {}
    elif kind == "saved by datasets":
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(path)
    elif kind == "datasets":
        return data.to_iterable_dataset(), {}
    return str(path), {}


@pytest.mark.parametrize(
    "kind",
    [
        *("jsonl", "jsonl.gz", "csv", "parquet", "arrow", "database", "directory", "pattern", "saved folders"),
        *("saved by datasets", "datasets"),
    ],
)
def test_every_source_gives_the_batches_of_the_plain_path(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    name, options = make_source(kind, tmp_path)
    plain = manager(tmp_path, ROWS, ordered(), train_frac=1.0)
    expected = list(plain.get_dataloader(plain.prepare_dataset()[0], 4))
    found, rows = streamed(tmp_path, name, ordered(), shuffle_buffer_size=5, **options)
    loader = found.get_dataloader(rows, 4)
    for _ in range(2):  # the second pass reads anew
        for batch, wanted in zip(loader, expected, strict=True):
            same(batch, wanted)
    # From any row on, as a resumed run reads.
    for skip in (0, 1, 7, 8, 20, 22):
        rest = [row.row["prompt"] for row in rows.stream.read(skip)]
        assert rest == [row["prompt"] for row in ROWS[skip:]], skip


def test_lines_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\u2028three\n", encoding="utf-8")
    assert list(stream_file(tmp_path / "a.txt")) == [{"text": "one"}, {"text": "two"}, {"text": "three"}]


def test_filters_functions_and_augmentation_do_what_they_do_otherwise(tmp_path):
    def shout(row):
        return None if row["prompt"].endswith("3") else {**row, "completion": row["completion"].upper()}

    def some(row, rng):
        return [row] * rng.randrange(3)

    options = {"preprocess": [shout], "filters": ["min_words:4"], "system_prompt": "S", "truncation": "drop"}
    plain = manager(tmp_path, ROWS, ordered(), train_frac=1.0, **options)
    expected = plain.get_dataloader(plain.prepare_dataset()[0], 3)
    found, rows = streamed(tmp_path, ROWS, ordered(), shuffle_buffer_size=4, **options)
    assert ids(found.get_dataloader(rows, 3)) == ids(expected)
    assert rows.left_out == {"preprocess": 2, "filter min_words": 6}
    # Augmentation depends on the seed and the number of a row, so it is the same in any order.
    plain = manager(tmp_path, ROWS, train_frac=1.0, augment=[some])
    expected = ids(plain.get_dataloader(plain.prepare_dataset()[0], 3))
    found, rows = streamed(tmp_path, ROWS, augment=[some], shuffle_buffer_size=4)
    assert sorted(ids(found.get_dataloader(rows, 3))) == sorted(expected)
    assert len(expected) != len(ROWS)


def test_packed_rows(tmp_path):
    plain = manager(tmp_path, ROWS, train_frac=1.0, packing=True)
    packed, _ = plain.prepare_dataset()
    found, rows = streamed(tmp_path, ROWS, packing=True)
    assert sorted(ids(found.get_dataloader(rows, 2))) == sorted(ids(plain.get_dataloader(packed, 2)))
    assert found.audit.splits["train"].packed_rows == len(packed) == len(rows.sample)
    # With a buffer of eight rows, rows share a packed row with others of their buffer only.
    found, rows = streamed(tmp_path, ROWS, packing=True, shuffle_buffer_size=8)
    single = ids(manager_batches(tmp_path, ROWS))
    cut = []
    for batch in found.get_dataloader(rows, 2):
        for row, segment in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            parts = [tuple(row[segment == number].tolist()) for number in range(1, segment.max() + 1)]
            assert len({single.index(part) // 8 for part in parts}) == 1
            cut += parts
    assert sorted(cut) == sorted(single)


def manager_batches(home, rows):
    plain = manager(home, rows, ordered(), train_frac=1.0)
    return plain.get_dataloader(plain.prepare_dataset()[0], 4)


def test_classes(tmp_path):
    rows = [{"text": f"good film {n}", "label": "yes" if n % 2 else "no"} for n in range(9)]
    config = QEffConfig("m", rows, task="seq_classification", streaming=True)
    found = QEffDataManager(config, word_classifier_tokenizer(), args=ordered(), cache_home_dir=tmp_path)
    train, _ = found.prepare_dataset()
    assert found.label_names == {"no": 0, "yes": 1}
    labels = [int(label) for batch in found.get_dataloader(train, 4) for label in batch["labels"]]
    assert labels == [n % 2 for n in range(9)]


# ---------------------------------------------------------------------------------------------- order


def test_rows_are_shuffled_within_the_buffer(tmp_path):
    found, rows = streamed(tmp_path, ROWS, shuffle_buffer_size=10)
    plain = ids(manager_batches(tmp_path, ROWS))
    loader = found.get_dataloader(rows, 4)
    first, second = ids(loader), ids(loader)
    for one in (first, second):
        for start in range(0, 23, 10):
            assert sorted(one[start : start + 10]) == sorted(plain[start : start + 10])
            assert one[start : start + 10] != plain[start : start + 10]
    assert first != second, "every pass has its own order"
    assert first == ids(found.get_dataloader(rows, 4)), "the order depends on nothing but seed and pass"
    other, rows = streamed(tmp_path, ROWS, shuffle_buffer_size=10, seed=7)
    assert ids(other.get_dataloader(rows, 4)) != first


@pytest.mark.parametrize(("count", "world"), [(23, 2), (21, 2), (25, 3), (24, 2)])
def test_ranks_share_the_batches_of_one(tmp_path, count, world):
    """Rows that fill a place in the last batch train nothing."""
    data = [*ROWS, *ROWS][:count]
    found, rows = streamed(tmp_path, data, shuffle_buffer_size=6)
    whole = list(found.get_dataloader(rows, 2 * world))
    parts = [list(found.get_dataloader(rows, 2, rank=rank, world_size=world)) for rank in range(world)]
    assert {len(part) for part in parts} == {len(whole)}
    for number, batch in enumerate(whole):
        wanted = ids([batch])
        for rank, part in enumerate(parts):
            mine, trained = ids([part[number]]), (part[number]["labels"] != -100).sum()
            expected = wanted[rank::world]
            assert mine == expected or (not expected and len(mine) == 1 and trained == 0)


def test_an_evaluation_split_and_rows_held_out(tmp_path):
    (tmp_path / "d").mkdir()
    for part in range(2):
        write(tmp_path / "d" / f"train-{part:05}-of-00002.jsonl", ROWS[part * 8 : part * 8 + 8])
    write(tmp_path / "d" / "validation.jsonl", ROWS[16:])
    plain = ids(manager_batches(tmp_path, ROWS))
    for options, count in (({}, 7), ({"eval_rows": 3}, 3)):
        found = manager(tmp_path, tmp_path / "d", ordered(), streaming=True, **options)
        train, held = found.prepare_dataset()
        assert [tuple(row["input_ids"].tolist()) for row in held] == plain[16 : 16 + count]
        assert ids(found.get_dataloader(train, 4)) == plain[:16]
    found = manager(tmp_path, ROWS, ordered(), streaming=True, eval_rows=5, shuffle_buffer_size=4)
    train, held = found.prepare_dataset()
    assert [tuple(row["input_ids"].tolist()) for row in held] == plain[:5]
    assert ids(found.get_dataloader(train, 4)) == plain[5:]
    report = found.audit
    assert (report.splits["train"].rows, report.splits["eval"].rows, report.first_rows) == (18, 5, 18)
    assert "the figures are of its first 18 rows" in report.to_text()
    assert "row 6, trained tokens" in report.to_text()
    assert manager(tmp_path, tmp_path / "d", streaming=True, train_frac=1.0).prepare_dataset()[1] is None


# ---------------------------------------------------------------------------------------------- memory and position


def test_an_endless_source_is_read_as_far_as_it_is_needed(tmp_path):
    source = Counting()
    found, rows = streamed(tmp_path, source, shuffle_buffer_size=50, eval_rows=10)
    assert source.read == [stream_prepare.AUDITED + 10]
    batches = list(itertools.islice(found.get_dataloader(rows, 4), 25))
    # A hundred rows are two buffers, after the ten that are held out.
    assert source.read[1:] == [110]
    assert len(ids(batches)) == 100
    next(iter(found.get_dataloader(rows, 4)))
    assert source.read[2:] == [60]


def test_a_position_in_the_middle_gives_the_rest(tmp_path):
    found, rows = streamed(tmp_path, ROWS, shuffle_buffer_size=7)
    loader = found.get_dataloader(rows, 4)
    whole = [*ids(loader), *ids(loader)]
    for stop in range(1, 6):
        loader = found.get_dataloader(rows, 4)
        given = ids(itertools.islice(loader, stop))
        state = json.loads(json.dumps(loader.state_dict()))
        again = found.get_dataloader(rows, 4)
        again.load_state_dict(state)
        assert [*given, *ids(again), *ids(again)] == whole, stop
    with pytest.raises(OptionError, match="rows_of_all_ranks"):
        found.get_dataloader(rows, 2).load_state_dict(state)
    other, more = streamed(tmp_path, [*ROWS, *ROWS], shuffle_buffer_size=7)
    with pytest.raises(OptionError, match="saved position is for data="):
        other.get_dataloader(more, 4).load_state_dict(state)


@pytest.mark.parametrize("packing", [False, True])
def test_numbered_batches_go_on_at_a_saved_position(tmp_path, packing):
    source = Counting([*ROWS, *ROWS])
    found, rows = streamed(tmp_path, source, shuffle_buffer_size=6, packing=packing)

    def numbered(saved=None):
        return NumberedBatches(found.get_dataloader(rows, 3), 50, saved)

    def taken(batches, number):
        return [tuple(row["input_ids"].tolist()) for row in batches.__getitems__([number])]

    first = numbered()
    whole = [taken(first, number) for number in range(50)]  # several passes
    for stop in (1, 7, 15, 16, 31):
        batches = numbered()
        assert taken(batches, stop - 1) == whole[stop - 1], "batches before it are skipped"
        saved = json.loads(json.dumps(batches.state()))
        assert saved["batch"] == stop
        source.read.clear()
        again = numbered(saved)
        assert [taken(again, number) for number in range(stop, stop + 5)] == whole[stop : stop + 5]
        assert taken(again, 0) == whole[0], "and those before it are still there"
        assert taken(again, stop + 1) == whole[stop + 1]
    # Another batch size: the position does not fit, so the stream is read from its beginning.
    other = NumberedBatches(found.get_dataloader(rows, 2), 50, saved)
    fresh = NumberedBatches(found.get_dataloader(rows, 2), 50)
    assert taken(other, 33) == taken(fresh, 33)


def test_going_on_encodes_one_buffer_again_and_no_more(tmp_path):
    calls = []

    def noted(row):
        calls.append(row["prompt"])
        return row

    found, rows = streamed(tmp_path, ROWS, shuffle_buffer_size=6, preprocess=[noted])
    batches = NumberedBatches(found.get_dataloader(rows, 3), 50)
    batches.__getitems__([4])
    saved = batches.state()
    calls.clear()
    NumberedBatches(found.get_dataloader(rows, 3), 50, saved).__getitems__([5])
    assert len(calls) == 6
    assert set(calls) == {f"say {n}" for n in range(12, 18)}


# ---------------------------------------------------------------------------------------------- bad rows


@pytest.fixture
def early(monkeypatch):
    """Only four rows are looked at before training."""
    monkeypatch.setattr(stream_prepare, "AUDITED", 4)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"prompt": ', "Line 3 of .*b.jsonl is not JSON"),
        ("[1]", "Line 3 of .*b.jsonl is .*a row must be an object"),
        ({"prompt": "a", "completion": 3}, "Row 3 of .*b.jsonl holds a number in 'completion', and others a string"),
        ({"text": "a"}, "Row 3 of .*b.jsonl has the columns text"),
        ({"prompt": "a", "completion": "\ud800"}, "Row 3 of .*b.jsonl has .*surrogate"),
    ],
)
def test_bad_rows_are_named_by_file_and_number(tmp_path, early, caplog, bad, words):
    write(tmp_path / "a.jsonl", ROWS[:5])
    write(tmp_path / "b.jsonl", [*ROWS[5:7], bad, *ROWS[7:]])
    data = str(tmp_path / "*.jsonl")
    found, rows = streamed(tmp_path, data, ordered())
    with pytest.raises(InputError, match=words):
        list(found.get_dataloader(rows, 4))
    found, rows = streamed(tmp_path, data, ordered(), on_bad_row="skip")
    with caplog.at_level(logging.WARNING, logger="QEfficient.finetune"):
        assert ids(found.get_dataloader(rows, 4)) == ids(manager_batches(tmp_path, ROWS))
    assert rows.left_out == {"malformed": 1}
    (record,) = caplog.records
    assert record.getMessage().startswith("left out (on_bad_row='skip'): ")


def test_bad_rows_at_the_beginning_have_the_same_names(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:5])
    write(tmp_path / "b.jsonl", [*ROWS[5:7], {"text": "a"}, *ROWS[7:]])
    data = str(tmp_path / "*.jsonl")
    with pytest.raises(InputError, match=r"Row 3 of .*b.jsonl has the columns text .* such as row 1 of .*a.jsonl"):
        streamed(tmp_path, data)
    found = manager(tmp_path, data, streaming=True, eval_rows=6, on_bad_row="skip")
    found.prepare_dataset()
    assert "Row 3 of" in found.audit.bad_rows[0]
    assert "b.jsonl" in found.audit.bad_rows[0]
    assert found.audit.splits["train"].dropped == {"malformed": 1}


def test_answers_that_do_not_fit_and_classes_that_are_new(tmp_path, early):
    data = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": "a", "completion": "b" * 99}])
    for options in ({}, {"on_bad_row": "skip"}):
        found, rows = streamed(tmp_path, data, **options)
        with pytest.raises(InputError, match=r"Row 24 of .*a.jsonl needs 10\d tokens, more than max_ctx_len=64"):
            list(found.get_dataloader(rows, 4))
    found, rows = streamed(tmp_path, data, truncation="drop")
    assert len(ids(found.get_dataloader(rows, 4))) == 23
    labels = [{"text": f"a film {n}", "label": label} for n, label in enumerate(["no", "yes"] * 4 + ["maybe"])]
    config = QEffConfig("m", labels, task="seq_classification", streaming=True)
    found = QEffDataManager(config, word_classifier_tokenizer(), cache_home_dir=tmp_path)
    rows, _ = found.prepare_dataset()
    with pytest.raises(
        InputError, match=r"Row 9 of .* has the label 'maybe', and the rows at the beginning have no, yes"
    ):
        list(found.get_dataloader(rows, 4))


def test_a_stream_of_which_nothing_is_left(tmp_path, early):
    changing = Counting(ROWS)
    found, rows = streamed(tmp_path, changing, filters=["min_words:1"])
    changing.rows = [{"prompt": "a", "completion": ""}] * 9
    with pytest.raises(InputError, match=r"has no batch of 4 rows that can be trained on \(9 × empty\)"):
        list(found.get_dataloader(rows, 4))


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_frac": 0.9}, "train_frac=0.9 needs the number of rows"),
        ({"sample_size": 9}, "sample_size draws from all rows"),
        ({"filters": ["dedupe"]}, "dedupe compares a row with all before it"),
        ({"preprocess": [lambda rows: rows]}, "takes all rows at once"),
        ({"datasets": ["a"], "dataset_name": None}, "streaming is of one source"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size must be an integer of at least 1"),
        ({"eval_rows": 0}, "eval_rows must be an integer of at least 1"),
        ({"streaming": False, "eval_rows": 5}, "eval_rows is for streaming"),
        ({"streaming": "yes"}, "streaming must be True or False"),
    ],
)
def test_options_that_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        QEffConfig("m", **{"dataset_name": "a", "streaming": True, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "set max_steps, not num_train_epochs"),
        ({"max_steps": 3, "group_by_length": True}, "group_by_length sorts all rows"),
        ({"max_steps": 3, "epoch_decay": 0.5}, "epoch_decay counts epochs"),
    ],
)
def test_arguments_that_are_refused(tmp_path, options, words):
    with pytest.raises(OptionError, match=words):
        manager(tmp_path, ROWS, QEffTrainingArgs("out", **options), streaming=True)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ("rows.json", InputError, "cannot be streamed.*write it as .jsonl"),
        ("missing.jsonl", InputError, "There is no data at missing.jsonl"),
        ("none/*.jsonl", InputError, "No file has a name like"),
        ("empty.jsonl", InputError, "There are no rows in"),
        (iter(ROWS), OptionError, "data that can be read again"),
        (3, OptionError, "data that can be read again"),
        ("gsm8k", OptionError, "made by a function"),
        (ROWS[:3], InputError, "has 3 rows, which eval_rows=4 holds out"),
        ({"a": ROWS, "b": ROWS}, OptionError, "choose one with train_split"),
    ],
)
def test_data_that_is_refused(tmp_path, monkeypatch, data, error, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(error, match=words):
        manager(tmp_path, data, streaming=True, eval_rows=4).prepare_dataset()


def test_functions_and_classes_that_need_all_rows(tmp_path):
    config = QEffConfig("m", ROWS, streaming=True)
    with pytest.raises(OptionError, match="custom dataset class gives all rows at once"):
        QEffDataManager(config, byte_tokenizer(), Counting, cache_home_dir=tmp_path).prepare_dataset()
    made = generate_dataset_config(ROWS, custom_config={"tokenizer": byte_tokenizer(), "streaming": True})
    with pytest.raises(OptionError, match="a stream has not"):
        get_preprocessed_dataset(byte_tokenizer(), made)

"""Mixtures of sources: exact counts, the tokens each source has by itself, an audit by source, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_tokenizers import CHATML, byte_tokenizer, word_classifier_tokenizer

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.mixing import draw, row_counts, shares
from QEfficient.finetune.data_manager import QEffDataManager

PAIRS = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(12)]
TEXTS = [{"text": f"a text with number {n}"} for n in range(6)]
CHATS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}", "weight": 0.5}]}
    for n in range(4)
]


def manager(home, **options):
    config = QEffConfig("m", **{"max_ctx_len": 64, "train_frac": 1.0, **options})
    return QEffDataManager(config, byte_tokenizer(template=CHATML), cache_home_dir=home)


def plain(rows):
    return [tuple(tuple(row[name].tolist()) for name in ("input_ids", "labels")) for row in rows]


def alone(home, rows, **options):
    return plain(manager(home, dataset_name=rows, **options).prepare_dataset()[0])


# ---------------------------------------------------------------------------------------------- how many rows


@pytest.mark.parametrize(
    ("sizes", "weights", "temperature", "upsample", "rows", "counts"),
    [
        ([12, 6, 4], None, 1, False, None, [12, 6, 4]),  # everything
        ([12, 6, 4], None, 1, True, None, [12, 6, 4]),
        ([12, 6, 4], [1, 1, 1], 1, False, None, [4, 4, 4]),
        ([12, 6, 4], [1, 1, 1], 1, True, None, [12, 12, 12]),
        ([12, 6, 4], [0.5, 0.3, 0.2], 1, False, None, [10, 6, 4]),
        ([12, 6, 4], [0.5, 0.3, 0.2], 1, True, None, [12, 7, 5]),  # 24 rows: 12, 7.2, 4.8
        ([12, 6, 4], [3, 1, 1], 1, False, 5, [3, 1, 1]),
        ([12, 6, 4], [1, 1, 1], 1, False, 10, [4, 3, 3]),
        ([12, 6, 4], [1, 1, 1], 1, True, 30, [10, 10, 10]),
        ([100, 25], None, 2, False, None, [50, 25]),  # 10 : 5
        ([100, 25], None, 2, True, None, [100, 50]),
        ([7], [3], 1, False, None, [7]),
    ],
)
def test_counts(sizes, weights, temperature, upsample, rows, counts):
    parts = shares(sizes, weights, temperature)
    assert sum(parts) == 1
    assert row_counts(["a", "b", "c"][: len(sizes)], sizes, parts, upsample, rows) == counts


def test_large_temperatures_make_sources_equal():
    assert [float(part) for part in shares([10_000, 10], None, 1e9)] == pytest.approx([0.5, 0.5])
    with pytest.raises(InputError, match="none of b, whose share is too small"):
        row_counts(["a", "b"], [10_000, 10], shares([10_000, 10], None, 1e-4), False, None)
    assert shares([10_000, 10], None, 1) == [Fraction(1000, 1001), Fraction(1, 1001)]


@given(st.lists(st.tuples(st.integers(20, 300), st.integers(1, 4)), min_size=2, max_size=5), st.booleans())
def test_counts_are_the_most_without_repeats_or_the_least_with_all_rows(sources, upsample):
    sizes, weights = zip(*sources, strict=True)
    parts = shares(sizes, weights, 1)
    counts = row_counts([f"s{n}" for n in range(len(sizes))], sizes, parts, upsample, None)
    total, weight = sum(counts), sum(weights)
    for size, count, own in zip(sizes, counts, weights, strict=True):
        assert abs(count - total * own / weight) < 1
        assert count >= size if upsample else count <= size
    # One row more, or one less, and a share would be past the rows that there are.
    shares_of = [(total + (-1 if upsample else 1)) * own / weight - size
                 for size, own in zip(sizes, weights, strict=True)]  # fmt: skip
    assert any(excess < 1e-9 for excess in shares_of) if upsample else any(excess > -1e-9 for excess in shares_of)


def test_rows_are_drawn_once_or_equally_often():
    once = draw(10, 7, seed=1, place=0)
    assert len(set(once.tolist())) == 7
    assert sorted(Counter(draw(10, 37, seed=1, place=0).tolist()).values()) == [3] * 3 + [4] * 7
    assert draw(10, 7, 1, 0).tolist() == once.tolist()
    assert draw(10, 7, 2, 0).tolist() != once.tolist()
    assert draw(10, 7, 1, 1).tolist() != once.tolist()


# ---------------------------------------------------------------------------------------------- which rows


def test_all_rows_of_three_formats_as_each_source_has_them(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    found = manager(tmp_path, datasets=[path, {"path": TEXTS}, {"dataset_name": CHATS}])
    train, held = found.prepare_dataset()
    assert held is None
    assert plain(train) == alone(tmp_path, PAIRS) + alone(tmp_path, TEXTS) + alone(tmp_path, CHATS)
    assert train.lengths.tolist() == [len(row["input_ids"]) for row in train]
    assert train.trained.tolist() == [int((row["labels"] != -100).sum()) for row in train]
    # Rows without weights of their own stand beside rows with some.
    assert {float(w) for w in np.unique(train[-1]["weights"])} == {0.0, 0.5}
    np.testing.assert_array_equal(train[0]["weights"], train[0]["labels"] != -100)
    with pytest.raises(IndexError):
        train[len(train)]


def test_weights_draw_from_every_source(tmp_path):
    sources = [{"dataset_name": PAIRS, "weight": 2}, {"dataset_name": TEXTS, "weight": 1}]
    rows = {seed: plain(manager(tmp_path, datasets=sources, mixing_rows=9, seed=seed).prepare_dataset()[0])
            for seed in (1, 1, 2)}  # fmt: skip
    pairs, texts = set(alone(tmp_path, PAIRS)), set(alone(tmp_path, TEXTS))
    for found in rows.values():
        assert len(set(found)) == 9, "no row is repeated"
        assert [len(set(found) & each) for each in (pairs, texts)] == [6, 3]
    assert rows[1] != rows[2]


def test_upsampling_repeats_rows_of_small_sources(tmp_path):
    sources = [{"dataset_name": PAIRS, "weight": 1}, {"dataset_name": TEXTS[:5], "weight": 1}]
    train, _ = manager(tmp_path, datasets=sources, mixing="all_exhausted").prepare_dataset()
    times = Counter(plain(train))
    assert [times[row] for row in alone(tmp_path, PAIRS)] == [1] * 12
    assert sorted(times[row] for row in alone(tmp_path, TEXTS[:5])) == [2, 2, 2, 3, 3]


def test_what_a_source_says_counts_for_it_and_the_rest_for_all(tmp_path):
    renamed = [{"frage": row["prompt"], "antwort": row["completion"]} for row in PAIRS]
    sources = [
        {"path": renamed, "columns": {"prompt": "frage", "completion": "antwort"}, "filters": ["dedupe"]},
        {"path": [*PAIRS, PAIRS[0]], "system_prompt": "Be brief.", "sample_size": 5},
    ]
    found = manager(tmp_path, datasets=sources, system_prompt="Be exact.")
    train, _ = found.prepare_dataset()
    assert plain(train)[:12] == alone(tmp_path, PAIRS, system_prompt="Be exact.")
    assert set(plain(train)[12:]) <= set(alone(tmp_path, PAIRS, system_prompt="Be brief."))
    assert len(train) == 17


def test_evaluation_rows_are_all_that_sources_hold_out(tmp_path):
    sources = [{"dataset_name": PAIRS, "weight": 1}, {"dataset_name": TEXTS, "weight": 1, "train_frac": 1.0}]
    train, held = manager(tmp_path, datasets=sources, train_frac=0.75).prepare_dataset()
    own = manager(tmp_path, dataset_name=PAIRS, train_frac=0.75).prepare_dataset()
    assert plain(held) == plain(own[1])
    assert len(train) == 12
    assert not set(plain(train)) & set(plain(held))


def test_packed_rows_of_a_mixture_hold_every_row_once(tmp_path):
    found = manager(tmp_path, datasets=[PAIRS, CHATS], packing=True, max_ctx_len=128)
    packed, _ = found.prepare_dataset()
    single, _ = manager(tmp_path, datasets=[PAIRS, CHATS], max_ctx_len=128).prepare_dataset()
    cut = []
    for row in packed:
        for number in range(1, row["attention_mask"].max() + 1):
            cut.append(tuple(row["input_ids"][row["attention_mask"] == number].tolist()))
    assert sorted(cut) == sorted(ids for ids, _ in plain(single))
    assert found.audit.splits["train"].packed_rows == len(packed) < len(single)


def test_the_key_of_a_mixture_depends_on_how_it_is_mixed(tmp_path):
    keys = set()
    for options in ({}, {"mixing_temperature": 2}, {"mixing": "upsample"}, {"mixing_rows": 4}, {"seed": 7}):
        found = manager(tmp_path, datasets=[PAIRS, TEXTS], **options)
        found.prepare_dataset()
        keys.add(found.fingerprint)
    assert len(keys) == 5


# ---------------------------------------------------------------------------------------------- the audit


def test_the_audit_tells_sources_apart(tmp_path):
    sources = [{"dataset_name": PAIRS, "weight": 3, "filters": ["min_words:1", "dedupe"]},
               {"dataset_name": [*TEXTS, {"text": ""}], "weight": 1}]  # fmt: skip
    found = manager(tmp_path, datasets=sources, mixing_rows=8)
    train, _ = found.prepare_dataset()
    report = json.loads(found.write_report(tmp_path).read_text())
    first, second = report["sources"]
    assert (first["rows"], first["available"], first["share"]) == (6, 12, 0.75)
    assert (second["rows"], second["available"], second["dropped"]) == (2, 6, {"empty": 1})
    assert first["tokens"] + second["tokens"] == report["splits"]["train"]["tokens"] == int(train.lengths.sum())
    assert first["token_share"] + second["token_share"] == pytest.approx(1, abs=1e-5)
    assert report["splits"]["train"]["rows"] == 8
    assert report["splits"]["train"]["dropped"] == {"empty": 1, "not drawn": 10}
    said = found.audit.to_text()
    assert "format prompt_completion: 6 of 12 rows (75.0%)" in said
    assert "format text: 2 of 6 rows (25.0%)" in said
    # One row of every source is shown, for each has its own format.
    assert said.count("trained tokens between [[ and ]]:") == 2
    assert "[[it is 0<|im_end|>]]" in said
    assert "[[ text with number 0</s>]]" in said
    assert found.audit.to_rich().plain.count("trained tokens in green:") == 2
    assert type(found.audit).from_dict(report).to_dict() == report


# ---------------------------------------------------------------------------------------------- classes


def test_classes_of_several_sources(tmp_path):
    def prepared(*rows):
        config = QEffConfig("m", datasets=[list(r) for r in rows], task="seq_classification", train_frac=1.0)
        found = QEffDataManager(config, word_classifier_tokenizer(), cache_home_dir=tmp_path)
        return found, found.prepare_dataset()[0]

    films = [{"text": f"good film {n}", "label": "yes" if n % 2 else "no"} for n in range(4)]
    plots = [{"sentence": f"bad plot {n}", "label": "no" if n % 2 else "yes"} for n in range(4)]
    found, train = prepared(films, plots)
    assert found.label_names == {"no": 0, "yes": 1}
    assert [int(row["labels"]) for row in train] == [0, 1, 0, 1, 1, 0, 1, 0]
    more = [{"text": f"very bad {n}", "label": n % 3} for n in range(6)]
    fewer = [{"text": f"very good {n}", "label": n % 2} for n in range(6)]
    assert prepared(more, fewer)[0].label_names == {"0": 0, "1": 1, "2": 2}
    with pytest.raises(InputError, match=r"do not have the same classes \(no, yes and maybe, yes\)"):
        prepared(films, [{"text": "a film", "label": label} for label in ("maybe", "yes")])


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"datasets": []}, "must be a list of at least one source"),
        ({"datasets": 5}, "must be a list of at least one source"),
        ({"datasets": "a.jsonl"}, "must be a list of at least one source"),
        ({"datasets": [{"dataset_name": "a", "wieght": 1}]}, "has no option 'wieght'.*Did you mean 'weight'"),
        ({"datasets": [{"dataset_name": "a", "packing": True}]}, r"datasets\[0\] has no option 'packing'"),
        ({"datasets": [{"path": "a", "dataset_name": "b"}]}, "says dataset_name twice"),
        ({"datasets": ["a", {"weight": 1}]}, r"datasets\[1\] needs dataset_name"),
        ({"datasets": [{"path": "a", "weight": 0}]}, r"weight of datasets\[0\] must be a number above 0, got 0"),
        ({"datasets": [{"path": "a", "weight": -1}]}, "must be a number above 0, got -1"),
        ({"datasets": [{"path": "a", "weight": "2"}]}, "must be a number above 0, got '2'"),
        ({"datasets": [{"path": "a", "weight": 1}, "b"]}, r"datasets\[0\] has a weight and datasets\[1\] has none"),
        ({"datasets": [{"path": "a", "filters": ["dedup"]}]}, r"datasets\[0\]: there is no filter 'dedup'"),
        ({"datasets": ["a"], "dataset_name": "b"}, "dataset_name is for one source"),
        ({"datasets": ["a"], "sample_size": 3}, "mixing_rows for all, or sample_size of a source"),
        ({"datasets": ["a"], "mixing": "upsampled"}, "Did you mean 'upsample'"),
        ({"datasets": ["a"], "mixing_temperature": 0}, "mixing_temperature must be a number above 0"),
        ({"datasets": [{"path": "a", "weight": 1}], "mixing_temperature": 2}, "the sources have weights: give one"),
        ({"datasets": ["a"], "mixing_rows": 0}, "mixing_rows must be an integer of at least 1"),
        ({"dataset_name": "a", "mixing_rows": 5}, "mixing_rows says how sources are mixed"),
        ({"dataset_name": "a", "mix_strategy": "interleave_under"}, "mixing says how sources are mixed"),
    ],
)  # fmt: skip
def test_options_that_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        QEffConfig("m", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"datasets": [PAIRS, {"path": TEXTS, "filters": ["min_words:99"]}]},
         r"datasets\[1\]: The filters leave no row \(6 × min_words\)"),
        ({"datasets": [PAIRS, "missing.jsonl"]}, r"datasets\[1\]: There is no data at missing.jsonl"),
        ({"datasets": [PAIRS, [{"text": ""}]]}, r"datasets\[1\]: No row of the train data can be trained on"),
        ({"datasets": [PAIRS, TEXTS], "mixing_rows": 40}, "needs 27 of .*12.*: lower mixing_rows to 18, or repeat"),
        ({"datasets": [{"path": PAIRS, "weight": 500}, {"path": TEXTS, "weight": 1}]}, "none of .*raise its weight"),
    ],
)  # fmt: skip
def test_data_that_is_refused(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        manager(tmp_path, **options).prepare_dataset()


def test_a_custom_class_and_a_mixture(tmp_path):
    config = QEffConfig("m", datasets=[PAIRS])
    with pytest.raises(OptionError, match="custom dataset class has no place"):
        QEffDataManager(
            config, byte_tokenizer(), custom_dataset_class=object, cache_home_dir=tmp_path
        ).prepare_dataset()


def test_saved_and_loaded(tmp_path):
    config = QEffConfig(
        "m",
        datasets=[
            {"path": "a.jsonl", "split": "train", "weight": 2},
            {"dataset_name": "sqlite://me:secret@host/db", "dataset_table": "rows", "weight": 1},
        ],
    )
    config.save(tmp_path / "config.yaml")
    assert "secret" not in (tmp_path / "config.yaml").read_text()
    loaded = QEffConfig.load(tmp_path / "config.yaml")
    assert loaded.datasets[0] == {"dataset_name": "a.jsonl", "train_split": "train", "weight": 2}
    (tmp_path / "wrong.yaml").write_text("model_id: m\ndatasets: 5\n")
    with pytest.raises(OptionError, match="must be a list"):
        QEffConfig.load(tmp_path / "wrong.yaml")
    QEffConfig("m", datasets=[PAIRS]).save(tmp_path / "memory.yaml")
    with pytest.raises(OptionError, match="saved from data in memory"):
        QEffConfig.load(tmp_path / "memory.yaml")

"""Rows that say which answers are better: what is read from each form of them, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import CHATML, byte_tokenizer

from QEfficient.errors import InputError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.collate import collate
from QEfficient.finetune.data.preference_readers import judged, preference
from QEfficient.finetune.data_manager import QEffDataManager

ASK = [{"role": "user", "content": "Q?"}]
GOOD, BAD = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]


def prepared(rows: Any, template: str | None = CHATML, **what: Any) -> tuple[QEffDataManager, Any]:
    config = QEffConfig("m", rows, **{"method": "dpo", "train_frac": 1.0, "max_ctx_len": 128, **what})
    manager = QEffDataManager(config, byte_tokenizer(template=template))
    return manager, manager.prepare_dataset()[0]


def texts(manager: QEffDataManager, item: Any) -> tuple[str, str]:
    """(what is not trained, what is) of a row."""
    ids, trained = np.asarray(item["input_ids"]), np.asarray(item["labels"]) != -100
    return manager.tokenizer.decode(ids[~trained]), manager.tokenizer.decode(ids[trained])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?", "chosen": "yes", "rejected": "no"},
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"prompt": "Q?", "chosen": GOOD, "rejected": BAD},
        {"chosen": ASK + GOOD, "rejected": ASK + BAD},
        {"conversations": [{"from": "human", "value": "Q?"}], "chosen": {"from": "gpt", "value": "yes"},
         "rejected": {"from": "gpt", "value": "no"}},
        {"instruction": "Q?", "input": "", "chosen": "yes", "rejected": "no"},
        {"question": "Q?", "chosen_response": "yes", "rejected_response": "no"},
        {"input": "Q?", "chosen": "yes", "rejected": "no"},
        # As HuggingFaceH4/ultrafeedback_binarized: the prompt once more beside whole conversations.
        {"prompt": "Q?", "chosen": ASK + GOOD, "rejected": ASK + BAD, "messages": ASK + GOOD},
    ],
)  # fmt: skip
def test_every_form_says_the_same(row):
    """With a chat template all of them are one conversation."""
    manager, rows = prepared([row, {**row, "extra": 1}])
    for pair in rows:
        for name, answer in (("chosen", "yes"), ("rejected", "no")):
            before, trained = texts(manager, pair[name])
            assert before == "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n\n"
            assert trained == f"{answer}<|im_end|>"


def test_texts_that_hold_their_prompt_are_learned_as_they_are():
    """No template goes around them: they may hold one of their own."""
    manager, (pair,) = prepared([{"chosen": "Human: Q? Bot: yes", "rejected": "Human: Q? Bot: no"}])
    assert texts(manager, pair["chosen"]) == ("Human: Q? Bot:", " yes</s>")
    assert texts(manager, pair["rejected"]) == ("Human: Q? Bot:", " no</s>")


def test_without_a_template_the_texts_are_joined_as_prompt_and_completion_are():
    manager, (pair,) = prepared([{"prompt": "Q?", "chosen": " yes", "rejected": " no"}], template=None)
    assert texts(manager, pair["chosen"]) == ("Q?", " yes</s>")
    assert texts(manager, pair["rejected"]) == ("Q?", " no</s>")


def test_earlier_answers_of_the_prompt_are_not_trained():
    history = [*ASK, {"role": "assistant", "content": "earlier"}, {"role": "user", "content": "R?"}]
    manager, (pair,) = prepared([{"prompt": history, "chosen": GOOD, "rejected": BAD}])
    assert texts(manager, pair["chosen"])[1] == "yes<|im_end|>"


def test_both_answers_follow_the_same_shortened_prompt():
    """The longer answer decides; it stands second here."""
    row = {"prompt": "abcdefghij" * 8, "chosen": "x", "rejected": "y" * 30}
    manager, (pair,) = prepared([row], template=None, max_ctx_len=60)
    before = {texts(manager, pair[name])[0] for name in ("chosen", "rejected")}
    assert len(pair["rejected"]["input_ids"]) == 60
    assert len(before) == 1
    assert row["prompt"].endswith(before.pop())
    assert manager.audit.splits["train"].marks == {"prompt shortened": 1}
    assert manager.audit.splits["train"].rows == 1


def test_answers_that_are_equal_once_cut_are_left_out():
    row = {"prompt": "p", "chosen": "z" * 50 + "a", "rejected": "z" * 50 + "b"}
    fine = {"prompt": "p", "chosen": "a", "rejected": "b"}
    manager, rows = prepared([row, fine], template=None, max_ctx_len=40, truncation="cut_answer")
    assert len(rows) == 1
    assert manager.audit.splits["train"].dropped == {"answers equal after the cut": 1}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": GOOD}, "are the same"),
        ({"chosen": "abc", "rejected": "xyz"}, "add a column prompt"),
        ({"chosen": "abc", "rejected": "abc d"}, "add a column prompt"),
        ({"chosen": "abc", "rejected": ASK + BAD}, "both be texts"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "must be a string"),
        ({"prompt": "a", "chosen": ["x"], "rejected": ["y"]}, "must have role and content"),
    ],
)
def test_pairs_that_cannot_be_used_are_said_with_their_row(row, wanted):
    with pytest.raises(InputError, match=f"Row 1 .*{wanted}"):
        prepared([row])


def test_empty_answers_are_empty_rows():
    for value in (None, "", " ", []):
        assert preference({"prompt": "a", "chosen": value, "rejected": "b"}) is None
        assert judged({"prompt": "a", "completion": value, "label": True}) is None
        assert value is None or preference({"prompt": value, "chosen": "a b", "rejected": "a c"}) is None
    assert judged({"prompt": "a", "completion": "b", "label": None}) is None


@pytest.mark.parametrize(("label", "good"), [(True, True), (0, False), ("true", True), ("False", False), ("1", True)])
def test_verdicts(label, good):
    found = judged({"prompt": "a", "completion": "b", "label": label})
    assert found is not None
    assert found.desirable is good
    talk = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "yes"}]
    for row in ({"messages": ASK + GOOD}, {"conversations": talk}):
        tagged = judged({**row, "kto_tag": label})
        assert tagged is not None
        assert tagged.desirable is good


@pytest.mark.parametrize("label", ["good", 2, [True], {"a": 1}, 0.5])
def test_other_verdicts_are_refused(label):
    with pytest.raises(InputError, match="must be true or false"):
        judged({"prompt": "a", "completion": "b", "label": label})


def test_judged_answers_stand_beside_the_answer_before():
    rows = [{"prompt": f"p{n}", "completion": f" answer{n}", "label": n == 1} for n in range(3)]
    manager, found = prepared(rows, template=None, method="kto")
    assert [bool(item["desirable"]) for item in found] == [False, True, False]
    assert [texts(manager, item["answer"])[1] for item in found] == [f" answer{n}</s>" for n in range(3)]
    assert [texts(manager, item["mismatched"]) for item in found] == [
        (f"p{n}", f" answer{(n - 1) % 3}</s>") for n in range(3)
    ]
    cut = prepared([{**row, "prompt": "p" * 30} for row in rows], template=None, method="kto", max_ctx_len=40)[1]
    assert max(len(item["mismatched"]["input_ids"]) for item in cut) <= 40


def test_a_batch_of_pairs_is_the_first_rows_then_the_second():
    rows = [{"prompt": "p", "chosen": "a" * n, "rejected": "b" * (n + 2)} for n in (1, 4)]
    _, found = prepared(rows, template=None)
    batch = collate([{**pair, "reference": [n, -n]} for n, pair in enumerate(found)], pad_token_id=7)
    wanted = [pair[name]["input_ids"] for name in ("chosen", "rejected") for pair in found]
    assert batch["input_ids"].shape == (4, max(map(len, wanted)))
    for row, ids in enumerate(wanted):
        np.testing.assert_array_equal(batch["input_ids"][row, : len(ids)], ids)
        assert (batch["input_ids"][row, len(ids) :] == 7).all()
        assert batch["attention_mask"][row].sum() == len(ids)
    np.testing.assert_array_equal(batch["reference"], [[0, 0], [1, -1]])


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=6) | st.sampled_from([ASK, GOOD]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner, max_size=3)
    ),
    max_leaves=4,
)


def outcome(reader: Any, row: Any) -> tuple[Any, str]:
    """(what was read or None, the sentence that refuses it or nothing)."""
    try:
        return reader(row), ""
    except InputError as error:
        return None, str(error)


@given(st.fixed_dictionaries({"chosen": _ANY, "rejected": _ANY}, optional={"prompt": _ANY, "messages": _ANY}))
@settings(max_examples=300, deadline=None)
def test_pairs_of_anything_are_read_or_refused(row):
    """What is read has two different answers; everything else is one sentence, or an empty row."""
    found, sentence = outcome(preference, row)
    assert found is None or found.chosen != found.rejected
    assert not sentence or (sentence.endswith(".") and "\n" not in sentence)


@given(st.fixed_dictionaries({"completion": _ANY, "label": _ANY}, optional={"prompt": _ANY}))
@settings(max_examples=300, deadline=None)
def test_judged_answers_of_anything_are_read_or_refused(row):
    found, sentence = outcome(judged, row)
    good = str(row["label"]).strip().lower() in ("1", "1.0", "true")
    assert found is None or found.desirable is good
    assert not sentence or (sentence.endswith(".") and "\n" not in sentence)

"""Stopping against transformers' own criteria: end tokens, strings inside and across tokens, callables."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MaxLengthCriteria, PreTrainedTokenizerFast, StoppingCriteriaList, StopStringCriteria

from QEfficient.engine.settings import GenerationSettings
from QEfficient.engine.stopping import FinishReason, Stopping
from QEfficient.engine.tokenizer import as_tokenizer
from QEfficient.errors import InputError, OptionError


@pytest.fixture(scope="session")
def hf():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words = "stop stopper opera last topper sto st op pped the hello world nonstop stops opening é 中"
    tokenizer.train_from_iterator([words] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<pad>")


@pytest.fixture(scope="session")
def metaspace():
    """A SentencePiece-like tokenizer, whose decoder drops the first space of a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<|end|>", "<pad>"])
    tokenizer.train_from_iterator(["stop stopper opera the hello world nonstop stops abcdef"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<pad>")


def pieces(hf, *parts: str) -> list[int]:
    """Ids of the parts, each encoded alone, so that the token borders are where the test wants them."""
    return [i for part in parts for i in hf(part, add_special_tokens=False).input_ids]


def stops_after(hf, strings, prompt: list[int], new: list[int]) -> tuple[int | None, Stopping]:
    """Feeds tokens one by one; the number of new tokens when our rule stops, or None."""
    stopping = Stopping(GenerationSettings(stop_strings=tuple(strings)), 1, len(prompt), tokenizer=as_tokenizer(hf))
    for n in range(1, len(new) + 1):
        if stopping.update(np.array([prompt + new[:n]]))[0]:
            return n, stopping
    return None, stopping


def hf_stops_after(hf, strings, prompt: list[int], new: list[int]) -> int | None:
    criterion = StopStringCriteria(hf, list(strings))
    for n in range(1, len(new) + 1):
        if criterion(torch.tensor([prompt + new[:n]]), None)[0]:
            return n
    return None


CASES = [
    (["stop"], "hello", ("st", "op", " the")),
    (["stop"], "hello", ("stop", "s")),
    (["stop"], "hello", ("st", "opera", "x")),
    (["stop"], "hello", ("sto", "pper")),
    (["stop"], "hello", ("las", "topper")),
    (["stop"], "hello", ("s", "to", "pped")),
    (["stop"], "hello", ("st", "ip", "sto", "q")),
    (["stop", "hello"], "x", ("the", "hel", "lo")),
    (["\n\n"], "a\n", ("\n", "b")),
    ([" world"], "hello", (" wor", "ld")),
    (["é中"], "x", ("aé", "中b")),
    (["中"], "x", ("中",)),
    (["<|end|>"], "x", ("hello", "<|end|>")),
    (["a"], "a", ("b", "c", "a")),
    (["nothing"], "nothing", ("no", "thin")),
    (["🦙🦙"], "x", ("🦙🦙",)),  # eight tokens of one byte for two characters
]


@pytest.mark.parametrize(("strings", "prompt", "parts"), CASES, ids=range(len(CASES)))
def test_stop_strings_are_hfs(hf, strings, prompt, parts):
    prompt_ids, new = pieces(hf, prompt), pieces(hf, *parts)
    assert stops_after(hf, strings, prompt_ids, new)[0] == hf_stops_after(hf, strings, prompt_ids, new)


def test_the_cases_do_stop(hf):
    found = [stops_after(hf, s, pieces(hf, p), pieces(hf, *parts))[0] for s, p, parts in CASES]
    assert [n is None for n in found] == [False] * 6 + [True] + [False] * 7 + [True, False]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_tokens(hf, data):
    ids = st.sampled_from(sorted({*pieces(hf, "stop opera topper st s t o p é 中 hello"), *range(2, 60, 7)}))
    prompt = data.draw(st.lists(ids, min_size=1, max_size=4))
    new = data.draw(st.lists(ids, min_size=1, max_size=10))
    strings = data.draw(st.lists(st.sampled_from(["stop", "op", "p s", "é", "中", " h", "t"]), min_size=1, max_size=2))
    assert stops_after(hf, strings, prompt, new)[0] == hf_stops_after(hf, strings, prompt, new)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_tokens_with_dropped_spaces(metaspace, data):
    ids = st.integers(3, len(metaspace) - 1)
    prompt = data.draw(st.lists(ids, min_size=6, max_size=8))
    new = data.draw(st.lists(ids, min_size=1, max_size=8))
    strings = [data.draw(st.sampled_from(["stop", " s", "o w", "p", " "]))]
    assert stops_after(metaspace, strings, prompt, new)[0] == hf_stops_after(metaspace, strings, prompt, new)


def test_text_is_cut_and_ids_are_kept(hf):
    new = pieces(hf, "hello non", "stop", "per")
    count, stopping = stops_after(hf, ["stop"], pieces(hf, "x"), new)
    assert stopping.reasons == [FinishReason.STOP_STRING]
    assert hf.decode(new[:count]).startswith("hello nonstop")
    assert stopping.cut(0, hf.decode(new[:count])) == "hello non"


def test_cut_when_the_string_began_in_the_prompt(hf):
    new = pieces(hf, "\n")
    count, stopping = stops_after(hf, ["\n\n"], pieces(hf, "a\n"), new)
    assert count == 1
    assert stopping.cut(0, hf.decode(new)) == ""


def test_cut_leaves_text_alone_when_a_special_token_was_the_string(hf):
    new = pieces(hf, "hello", "<|end|>")
    count, stopping = stops_after(hf, ["<|end|>"], pieces(hf, "a"), new)
    assert count == len(new)
    assert stopping.cut(0, hf.decode(new, skip_special_tokens=True)) == "hello"


def test_cut_takes_the_earliest_and_only_where_a_string_ended_the_row(hf):
    new = pieces(hf, "ab", "cd")
    _, stopping = stops_after(hf, ["d", "cd"], [2], new)
    assert stopping.cut(0, "abcd") == "ab"
    other = Stopping(GenerationSettings(stop_strings=("b",)), 1, 1, limit=1, tokenizer=as_tokenizer(hf))
    other.update(np.array([[2, pieces(hf, "x")[0]]]))
    assert other.reasons == ["length"]
    assert other.cut(0, "abc") == "abc"


def test_rows_end_on_their_own_and_keep_their_first_reason(hf):
    config = GenerationSettings(eos_token_id=(0, 9), stop_strings=("stop",))
    stopping = Stopping(config, 4, 2, limit=3, tokenizer=as_tokenizer(hf))
    a, stop, nine = pieces(hf, "a")[0], pieces(hf, "stop"), 9
    assert len(stop) == 1
    steps = [[a, a, nine, a], [a, stop[0], 1, 0], [a, 0, 0, 1]]
    ids = np.full((4, 2), a)
    expected = [[False, False, True, False], [False, True, True, True], [True] * 4]
    for tokens, finished in zip(steps, expected, strict=True):
        ids = np.concatenate([ids, np.array(tokens)[:, None]], axis=1)
        assert stopping.update(ids).tolist() == finished
        assert stopping.finished.tolist() == finished
    assert stopping.reasons == ["length", "stop_string", "eos", "eos"]


def test_ignore_eos_and_limits_per_row():
    stopping = Stopping(GenerationSettings(eos_token_id=(5,), ignore_eos=True), 2, 1, limit=[1, 2])
    assert stopping.update(np.array([[1, 5], [1, 5]])).tolist() == [True, False]
    assert stopping.update(np.array([[1, 5, 5], [1, 5, 5]])).tolist() == [True, True]
    assert stopping.reasons == ["length", "length"]


def test_no_limit_never_ends():
    stopping = Stopping(GenerationSettings(), 1, 1)
    assert not stopping.update(np.arange(500)[None])[0]


def test_reasons_take_precedence(hf):
    a = pieces(hf, "a")[0]
    config = GenerationSettings(eos_token_id=(a,), stop_strings=("a",))
    stopping = Stopping(config, 1, 1, limit=1, tokenizer=as_tokenizer(hf), stopping_criteria=lambda ids, scores: True)
    stopping.update(np.array([[a, a]]))
    assert stopping.reasons == ["eos"]
    stopping = Stopping(GenerationSettings(), 1, 1, limit=1, stopping_criteria=lambda ids, scores: True)
    stopping.update(np.array([[a, a]]))
    assert stopping.reasons == ["criteria"]


def test_criteria_get_what_hf_gives_them():
    seen = []

    def criterion(input_ids, scores):
        seen.append((input_ids.clone(), scores))
        return input_ids[:, -1] == 7

    stopping = Stopping(GenerationSettings(), 2, 1, stopping_criteria=criterion, to_user=torch.from_numpy)
    assert stopping.update(np.array([[1, 7], [2, 3]])).tolist() == [True, False]
    assert torch.equal(seen[0][0], torch.tensor([[1, 7], [2, 3]]))
    assert seen[0][1] is None


def test_hf_criteria_list_with_tensors(hf):
    both = StoppingCriteriaList([MaxLengthCriteria(4), StopStringCriteria(hf, ["stop"])])
    stopping = Stopping(GenerationSettings(), 2, 1, stopping_criteria=both, to_user=torch.from_numpy)
    stop, a = pieces(hf, "stop")[0], pieces(hf, "a")[0]
    assert stopping.update(np.array([[a, stop], [a, a]])).tolist() == [True, False]
    assert stopping.update(np.array([[a, stop, a], [a, a, a]])).tolist() == [True, False]
    assert stopping.update(np.array([[a, stop, a, a], [a, a, a, a]])).tolist() == [True, True]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (True, [True, True]),
        (np.bool_(False), [False, False]),
        (np.array([False, True]), [False, True]),
        (np.array([[True], [False]]), [True, False]),
        ([True, False], [True, False]),
    ],
)
def test_criterion_answers(answer, expected):
    stopping = Stopping(GenerationSettings(), 2, 1, stopping_criteria=[lambda ids, scores: answer])
    assert stopping.update(np.array([[1, 2], [3, 4]])).tolist() == expected


@pytest.mark.parametrize("answer", [None, 1, 0.5, "yes", np.array([True] * 3), np.zeros((2, 2), bool), []])
def test_bad_criterion_answers(answer):
    stopping = Stopping(GenerationSettings(), 2, 1, stopping_criteria=lambda ids, scores: answer)
    with pytest.raises(InputError, match="must return a bool or one for each of 2 rows"):
        stopping.update(np.array([[1, 2], [3, 4]]))


@pytest.mark.parametrize("bad", [3, "stop", [print, None]])
def test_criteria_must_be_callable(bad):
    with pytest.raises(OptionError, match="stopping_criteria must be functions"):
        Stopping(GenerationSettings(), 1, 1, stopping_criteria=bad)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(OptionError, match="stop_strings need a tokenizer"):
        Stopping(GenerationSettings(stop_strings=("x",)), 1, 1)


@pytest.mark.parametrize("shape", [(2,), (3, 4), (2, 3), (2, 2, 5)])
def test_wrong_sequences(shape):
    with pytest.raises(InputError, match="Sequences must have the shape"):
        Stopping(GenerationSettings(), 2, 3).update(np.zeros(shape, np.int64))

"""Sampler against transformers' own logits processors, and its random streams."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import LogitsProcessorList

from QEfficient.engine.sampling import Sampler, candidates
from QEfficient.engine.settings import GenerationSettings
from QEfficient.errors import InputError


def hf_processors(options: dict, prompt_length: int) -> LogitsProcessorList:
    """The list transformers itself would build, in its order."""
    config = GenerationConfig(**options)
    config._eos_token_tensor = torch.tensor(options["eos_token_id"]) if options.get("eos_token_id") else None
    model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=False),
        _merge_criteria_processor_list=lambda default, custom: default,
    )
    return GenerationMixin._get_logits_processor(model, config, input_ids_seq_length=prompt_length, device="cpu")


def hf_scores(logits: np.ndarray, options: dict, ids: np.ndarray, prompt_length: int) -> np.ndarray:
    processors = hf_processors(options, prompt_length)
    return processors(torch.from_numpy(ids), torch.from_numpy(logits.astype(np.float32)).clone()).numpy()


def hf_probabilities(logits: np.ndarray, options: dict) -> np.ndarray:
    """[vocab] probabilities HF would draw one row from."""
    scores = hf_scores(logits[None], {"top_k": 0, **options, "do_sample": True}, np.zeros((1, 1), np.int64), 1)
    return torch.softmax(torch.from_numpy(scores[0]).double(), -1).numpy()


def our_probabilities(logits: np.ndarray, options: dict) -> np.ndarray:
    ids, weights = candidates(logits, GenerationSettings(**{"top_k": 0, **options, "do_sample": True}))
    assert (np.diff(ids) > 0).all()
    dense = np.zeros(len(logits))
    dense[ids] = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    return dense


WARPS = [
    {},
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.1},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("warp", WARPS, ids=str)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("vocab", [7, 300, 9000, 70_000])
def test_distribution_is_hfs(warp, spread, vocab):
    logits = (np.random.default_rng(vocab).standard_normal(vocab) * spread).astype(np.float32)
    np.testing.assert_allclose(our_probabilities(logits, warp), hf_probabilities(logits, warp), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("warp", WARPS, ids=str)
@pytest.mark.parametrize("vocab", [8, 300, 9000])
def test_ties_are_hfs(warp, vocab, monkeypatch):
    """Few distinct values, so that k-th place and nucleus fall inside ties.

    Which of equal tokens torch's default sort puts first depends on the size and the processor, so HF itself
    fixes only how many of them stay; the very ids are compared with HF on torch's stable sort.
    """
    logits = np.random.default_rng(1).integers(-2, 3, vocab).astype(np.float32)
    ours, theirs = our_probabilities(logits, warp), hf_probabilities(logits, warp)
    assert np.sort(logits[ours > 0]).tolist() == np.sort(logits[theirs > 0]).tolist()
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda scores, descending: sort(scores, descending=descending, stable=True))
    theirs = hf_probabilities(logits, warp)
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
def test_all_equal_keeps_the_higher_ids_in_the_nucleus(top_p):
    """Powers of two are exact: of 8 equal tokens precisely 8 * top_p stay, and they are the last ones."""
    kept = np.flatnonzero(our_probabilities(np.zeros(8, np.float32), {"top_p": top_p}))
    assert kept.tolist() == list(range(8))[-int(8 * top_p) :]
    assert kept.tolist() == np.flatnonzero(hf_probabilities(np.zeros(8, np.float32), {"top_p": top_p})).tolist()


def test_masked_tokens_never_come_back():
    logits = np.array([-np.inf, 1.0, -np.inf, 2.0], np.float32)
    for warp in WARPS:
        ours = our_probabilities(logits, warp)
        assert ours[0] == ours[2] == 0
        np.testing.assert_allclose(ours, hf_probabilities(logits, warp), rtol=1e-6)


finite = st.floats(-20, 20, width=32)


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(finite | st.sampled_from([0.0, 1.0]), min_size=1, max_size=40),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_drawn_token_is_one_hf_could_draw(logits, temperature, top_k, top_p, min_p, seed):
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    values = np.array(logits, np.float32)
    # The reference is loosened by a hair: where a sum meets the limit, rounding may decide either way.
    loose = options | {
        "top_p": min(1.0, top_p + 1e-5),
        "min_p": None if min_p is None else max(0.0, min_p - 1e-5),
    }
    # Which of several equal scores top-p keeps is up to torch's unstable sort: any as likely as a kept one is fine.
    least = values[hf_probabilities(values, loose) > 0].min()
    sampler = Sampler(GenerationSettings(do_sample=True, seed=seed, **options), 1)
    for _ in range(5):
        assert values[int(sampler.sample(values[None])[0])] >= least


def test_frequencies_follow_the_distribution():
    logits = np.array([2.0, 1.0, 0.0, -1.0, -4.0], np.float32)
    rows = 20_000
    for warp in ({}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        sampler = Sampler(GenerationSettings(**{"do_sample": True, "seed": 3, "top_k": 0, **warp}), rows)
        drawn = sampler.sample(np.tile(logits, (rows, 1)))
        expected = hf_probabilities(logits, warp)
        found = np.bincount(drawn, minlength=5) / rows
        # Four standard deviations of a binomial share.
        assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / rows)).all()


@pytest.mark.parametrize("penalty", [1.3, 0.7])
@pytest.mark.parametrize("do_sample", [False, True])
def test_penalty_and_minimum_over_a_whole_generation(penalty, do_sample):
    """Token by token beside HF: its scores from the ids so far, ours from the sampler's own memory."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 60, (3, 5))  # the vocabulary has 50: ids 50..59 cannot be penalised
    options = {
        "repetition_penalty": penalty,
        "min_new_tokens": 4,
        "eos_token_id": [3, 7],
        "do_sample": do_sample,
    }
    warp = {"top_k": 4, "temperature": 0.8} if do_sample else {}
    ours = Sampler(GenerationSettings(**{**options, "eos_token_id": (3, 7)}, **warp, seed=1), 3, list(prompts))
    ids = prompts
    processors = hf_processors(options | warp, prompts.shape[1])
    for step in range(8):
        logits = rng.standard_normal((3, 50)).astype(np.float32) * 2
        logits[:, 3] += 3  # an end-of-sequence token is wanted at every step
        before = logits.copy()
        tokens = ours.sample(logits)
        np.testing.assert_array_equal(logits, before)
        assert tokens.dtype == np.int64
        expected = processors(torch.from_numpy(ids), torch.from_numpy(logits.copy())).numpy()
        if do_sample:
            assert np.isfinite(expected[np.arange(3), tokens]).all()
        else:
            np.testing.assert_array_equal(tokens, expected.argmax(-1))
        if step < 4:
            assert not np.isin(tokens, [3, 7]).any()
        ids = np.concatenate([ids, tokens[:, None]], axis=1)
    if not do_sample:
        assert np.isin(ids[:, 9:], [3, 7]).any()


def test_penalty_scores_are_exactly_hfs():
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((2, 30)).astype(np.float32)
    prompts = rng.integers(0, 30, (2, 9))
    sampler = Sampler(GenerationSettings(repetition_penalty=1.37), 2, list(prompts))
    expected = hf_scores(logits, {"repetition_penalty": 1.37}, prompts, 9)
    np.testing.assert_array_equal(sampler._process(logits, np.arange(2)), expected)


def test_greedy_takes_the_first_maximum_like_torch():
    logits = np.array([[0.0, 5.0, 5.0], [2.0, 2.0, 2.0], [np.nan, 1.0, np.inf]], np.float32)
    got = Sampler(GenerationSettings(), 3).sample(logits)
    assert got.tolist() == torch.from_numpy(logits).argmax(-1).tolist() == [1, 0, 0]
    assert Sampler(GenerationSettings(do_sample=True, temperature=0.0), 3).sample(logits).tolist() == [
        1,
        0,
        0,
    ]


def test_neutral_greedy_does_not_copy_the_logits():
    sampler = Sampler(GenerationSettings(eos_token_id=(1,)), 1)
    logits = np.zeros((1, 4), np.float32)
    assert sampler._process(logits, np.arange(1)) is logits


@pytest.mark.parametrize("warp", [{}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
def test_a_row_does_not_depend_on_the_others(warp):
    logits = np.random.default_rng(0).standard_normal((6, 5, 6000)).astype(np.float32) * 3
    options = GenerationSettings(**{"do_sample": True, "seed": 11, "top_k": 0, **warp})
    together, small = Sampler(options, 5), Sampler(options, 2)
    separate = Sampler(options, 5)
    for step in logits:
        all_rows = together.sample(step)
        np.testing.assert_array_equal(small.sample(step[:2]), all_rows[:2])
        for row in (4, 0, 2):
            assert separate.sample(step[row : row + 1], [row])[0] == all_rows[row]


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (1 - 2**-53, 2)])
def test_the_extremes_of_a_draw_fall_on_tokens_with_weight(number, token):
    sampler = Sampler(GenerationSettings(do_sample=True, top_k=0), 1)
    sampler._streams = [SimpleNamespace(random=lambda: number)]
    assert sampler.sample(np.array([[-np.inf, 0.0, 0.0, -np.inf]], np.float32))[0] == token


def test_seeds():
    logits = np.zeros((2, 1000), np.float32)

    def draw(seed):
        sampler = Sampler(GenerationSettings(do_sample=True, seed=seed, top_k=0), 2)
        return np.stack([sampler.sample(logits) for _ in range(8)])

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
    assert (draw(None) != draw(None)).any()
    assert (draw(0)[:, 0] != draw(0)[:, 1]).any()


def test_restart_gives_a_slot_to_a_new_text():
    options = GenerationSettings(do_sample=True, seed=4, repetition_penalty=50.0, min_new_tokens=1, eos_token_id=(0,))
    logits = np.random.default_rng(2).standard_normal((2, 40)).astype(np.float32)
    fresh = Sampler(options, 3, [[1], [2], [5, 6]])
    used = Sampler(options, 2, [[1], [2]])
    used.sample(logits)
    used.restart(1, [5, 6], stream=2)
    for _ in range(5):
        assert used.sample(logits[1:], [1])[0] == fresh.sample(logits[1:], [2])[0]
    with pytest.raises(InputError, match="no row 2"):
        used.restart(2, [1])


@pytest.mark.parametrize(
    "logits",
    [
        [[1.0, 2.0]],
        np.zeros((1, 3), np.int64),
        np.zeros(3, np.float32),
        np.zeros((2, 3), np.float32),
        np.zeros((1, 0), np.float32),
        torch.zeros(1, 3),
    ],
)
def test_wrong_logits(logits):
    with pytest.raises(InputError, match="Logits must"):
        Sampler(GenerationSettings(), 1).sample(logits)


@pytest.mark.parametrize("rows", [[2], [-1], [0.0], [[0]]])
def test_wrong_rows(rows):
    with pytest.raises(InputError, match="rows must be"):
        Sampler(GenerationSettings(), 2).sample(np.zeros((1, 3), np.float32), rows)


@pytest.mark.parametrize("rows", [0, True, 1.0])
def test_wrong_row_count(rows):
    with pytest.raises(InputError, match="at least one row"):
        Sampler(GenerationSettings(), rows)


def test_penalty_needs_all_prompts():
    with pytest.raises(InputError, match="needs the prompts"):
        Sampler(GenerationSettings(repetition_penalty=1.1), 1)
    with pytest.raises(InputError, match="1 prompts for 2 rows"):
        Sampler(GenerationSettings(repetition_penalty=1.1), 2, [[1]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("warp", [{"top_k": 0}, {"top_k": 2}, {"top_k": 0, "top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_broken_logits_are_reported_not_drawn(value, warp):
    logits = np.zeros((1, 4), np.float32)
    logits[0, :] = value if value == -np.inf else 0
    logits[0, 1] = value
    with pytest.raises(InputError, match="row 0 are NaN"):
        Sampler(GenerationSettings(do_sample=True, seed=0, **warp), 1).sample(logits)


def test_half_precision():
    logits = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float16)
    assert Sampler(GenerationSettings(), 1).sample(logits)[0] == logits.argmax()
    a = Sampler(GenerationSettings(do_sample=True, seed=1), 1).sample(logits)
    assert a == Sampler(GenerationSettings(do_sample=True, seed=1), 1).sample(logits.astype(np.float32))

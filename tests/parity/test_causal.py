"""Compiled causal models give what Hugging Face gives: every architecture, ragged batches, chunks, the last slot.

The reference is always Hugging Face on one row alone, without padding. Prompts of 12 tokens enter in chunks of 5.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_models import (
    CAUSAL_TYPES,
    VOCAB_SIZE,
    greedy_reference,
    sample_prompt,
    tiny_causal_lm,
    tiny_tokenizer,
)
from transformers import PreTrainedModel

from QEfficient import QEFFAutoModelForCausalLM, load
from QEfficient.errors import ContextLengthError
from QEfficient.targets.host_session import HostSession

#: So many experts that their products become a loop over those that were chosen.
MANY_EXPERTS = "qwen3_moe of 40 experts"
TYPES = (*CAUSAL_TYPES, "mamba", "falcon", "gpt_oss", "qwen3_next", "lfm2", "llama_tied", MANY_EXPERTS)
#: Built of parts that another of them has, and run by tests of other modules too.
LIKE_OTHERS = ("qwen2", "qwen3", "gemma2", "mixtral", "mamba")
BATCHED_TYPES = ("llama", "mistral", "deepseek_v3", "mamba2", "jamba")
CTX, CHUNK = 32, 5
TOLERANCE = 1e-4  # of the largest reference logit
LENGTHS = (12, 7, 3)
#: Tokens that fit after the longest of them: the last one is never stored.
MOST = CTX - LENGTHS[0] + 1


def prompt(length: int, seed: int = 0) -> list[int]:
    return sample_prompt(length, 100 * length + seed)


@dataclass
class Case:
    """A model, its package and what Hugging Face makes of a prompt."""

    reference: PreTrainedModel
    compiled: QEFFAutoModelForCausalLM
    fused: bool = True
    _known: dict[tuple[int, ...], tuple[list[int], np.ndarray]] = field(default_factory=dict)

    def expected(self, ids: Sequence[int], count: int) -> tuple[list[int], np.ndarray]:
        """The first ``count`` greedy tokens of Hugging Face and their logits [count, vocab]."""
        key = tuple(ids)
        if key not in self._known or len(self._known[key][0]) < count:
            self._known[key] = greedy_reference(self.reference, list(ids), max(count, 10))
        tokens, logits = self._known[key]
        return tokens[:count], logits[:count]

    def unfused(self) -> Case:
        compiled = QEFFAutoModelForCausalLM(self.reference)
        compiled.compile(ctx_len=CTX, prefill_seq_len=CHUNK, fuse=False)
        return Case(self.reference, compiled, False, self._known)

    @property
    def session(self) -> HostSession:
        return self.compiled._ready().session


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.sweep) if n in LIKE_OTHERS else n for n in TYPES]
)
def case(request: pytest.FixtureRequest) -> Case:
    """As users get it: with the host's fusions, each prompt on a row of its own."""
    if request.param == MANY_EXPERTS:
        reference = tiny_causal_lm("qwen3_moe", num_local_experts=40)
        assert reference.config.num_experts == 40
    else:
        reference = tiny_causal_lm(request.param)
    compiled = QEFFAutoModelForCausalLM(reference)
    compiled.compile(ctx_len=CTX, prefill_seq_len=CHUNK)
    return Case(reference, compiled)


@pytest.fixture(params=[True, False], ids=["fused", "as exported"])
def either(request: pytest.FixtureRequest, case: Case) -> Case:
    """The case, and the graph as it was exported, whose prompts run side by side."""
    return case if request.param else case.unfused()


@pytest.fixture(scope="module", params=BATCHED_TYPES)
def batched(request: pytest.FixtureRequest) -> Case:
    reference = tiny_causal_lm(request.param)
    compiled = QEFFAutoModelForCausalLM(reference)
    compiled.compile(ctx_len=CTX, prefill_seq_len=CHUNK, full_batch_size=2)
    return Case(reference, compiled)


@pytest.fixture(scope="module", params=["llama", "mamba2"])
def pairs(request: pytest.FixtureRequest) -> Case:
    """At most two rows per call."""
    reference = tiny_causal_lm(request.param)
    compiled = QEFFAutoModelForCausalLM(reference)
    compiled.compile(ctx_len=CTX, prefill_seq_len=CHUNK, batch_size=2)
    return Case(reference, compiled)


def padded(rows: Sequence[Sequence[int]], side: str, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, attention_mask), int64 [batch, longest]."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), pad, np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


class ByHand:
    """Feeds rows of Hugging Face's own tokens into a session, some at a time, and checks every result.

    Nothing of the library's token loop takes part. Row r's tokens go to slot ``slots[r]`` of an indexed package.
    """

    def __init__(self, case: Case, prompts: Sequence[Sequence[int]], count: int) -> None:
        self.session = case.session
        self.prompts = [list(p) for p in prompts]
        counts = [min(count, CTX - len(p) + 1) for p in prompts]
        expected = [case.expected(p, n) for p, n in zip(prompts, counts, strict=True)]
        self.sequences = [p + tokens for p, (tokens, _) in zip(self.prompts, expected, strict=True)]
        self.logits = [logits for _, logits in expected]
        self.fed = [0] * len(prompts)
        self.indexed = any(spec.name == "batch_index" for spec in self.session.manifest.inputs)
        if self.indexed:
            self.rows = self.session.manifest.specialization("Prefill").symbols["full_batch_size"].exact
            self.session.begin({"full_batch_size": self.rows, "ctx_len": CTX})
        else:
            self.rows = len(prompts)
            self.session.begin({"batch_size": self.rows, "ctx_len": CTX})

    def states(self) -> dict[str, np.ndarray]:
        return {spec.input: self.session.state(spec.input) for spec in self.session.manifest.states}

    def feed(self, counts: Sequence[int], width: int = 0, order: Sequence[int] | None = None) -> int:
        """Feeds ``counts[i]`` more tokens of row ``order[i]`` (0: idle), in ``width`` columns padded on the right.

        Returns how many rows had logits to compare.
        """
        order = list(range(len(counts))) if order is None else list(order)
        width = max(width, *counts, 1)
        ids = np.full((len(order), width), VOCAB_SIZE - 1, np.int64)
        positions = np.full((len(order), width), -1, np.int64)
        before = {name: state.copy() for name, state in self.states().items()}
        for i, (row, count) in enumerate(zip(order, counts, strict=True)):
            start = self.fed[row]
            ids[i, :count] = self.sequences[row][start : start + count]
            positions[i, :count] = np.arange(start, start + count)
            self.fed[row] += count
        logits = self._run(ids, positions, counts, order)
        assert logits.shape == (len(order), 1, VOCAB_SIZE)
        assert np.isfinite(logits).all()
        compared = 0
        for i, (row, count) in enumerate(zip(order, counts, strict=True)):
            step = self.fed[row] - len(self.prompts[row])
            if count and step >= 0:
                assert_close(logits[i, 0], self.logits[row][step])
                compared += 1
        self._check_states(before, {row for row, count in zip(order, counts, strict=True) if count})
        return compared

    def _run(self, ids: np.ndarray, positions: np.ndarray, counts: Sequence[int], order: list[int]) -> np.ndarray:
        feeds = {"input_ids": ids, "position_ids": positions}
        if self.indexed:
            feeds["batch_index"] = np.array(order, np.int64)[:, None]
        if ids.shape[1] == 1:
            return self.session.run(feeds, "Decode")["logits"]
        if not self.session.manifest.specialization("Prefill").by_row:
            return self.session.run(feeds, "Prefill")["logits"]
        logits = np.zeros((len(order), 1, VOCAB_SIZE), np.float32)
        for i, (row, count) in enumerate(zip(order, counts, strict=True)):
            if count:
                own = {name: array[i : i + 1, :count] for name, array in feeds.items()}
                logits[i] = self.session.run(own, "Prefill", row=row)["logits"][0]
        return logits

    def _check_states(self, before: dict[str, np.ndarray], fed: set[int]) -> None:
        """Everything is finite, and rows that were not fed are as they were (K/V: all but the spare last slot)."""
        after = self.states()
        for spec in self.session.manifest.states:
            assert np.isfinite(after[spec.input]).all(), spec.input
            for row in set(range(self.rows)) - fed:
                old, new = before[spec.input][row], after[spec.input][row]
                if spec.kind == "kv":
                    axis = spec.shape.index("ctx_len") - 1
                    old, new = (np.delete(state, CTX - 1, axis) for state in (old, new))
                np.testing.assert_array_equal(new, old, err_msg=spec.input)


# ---------------------------------------------------------------------------------- every architecture


def test_graph_is_standard_onnx(case: Case, tmp_path: Path) -> None:
    # A copy: the checker refuses weights that are hard links, and in the cache they are.
    path = case.compiled.export(tmp_path / "copy")
    onnx.checker.check_model(path)
    graph = onnx.load(path, load_external_data=False).graph
    states = [spec.input for spec in case.session.manifest.states]
    assert [v.name for v in graph.output] == ["logits", *(f"{name}_RetainedState" for name in states)]
    assert {v.name for v in graph.input} == {"input_ids", "position_ids", *states}


def test_one_prompt(case: Case) -> None:
    ids = prompt(12)
    tokens, _ = case.expected(ids, 10)
    out = case.compiled.generate(input_ids=torch.tensor([ids]), max_new_tokens=10)
    assert out.tolist() == [ids + tokens]


@pytest.mark.parametrize("chunks", [[5, 5, 2], [1] * 12, [4, 3, 5], [2, 5, 5]], ids=str)
def test_logits_of_every_step(case: Case, chunks: list[int]) -> None:
    """However the prompt is cut, up to and including the last slot."""
    steps = ByHand(case, [prompt(12)], MOST)
    compared = sum(steps.feed([n]) for n in chunks)
    compared += sum(steps.feed([1]) for _ in range(CTX - 12))
    assert compared == MOST
    assert steps.fed == [CTX]


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batch(case: Case, side: str) -> None:
    rows = [prompt(n) for n in LENGTHS]
    expected = [case.expected(row, 9)[0] for row in rows]
    ids, mask = padded(rows, side)
    out = case.compiled.generate(
        input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=9
    )
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.int64
    assert tuple(out.shape) == (3, 12 + 9)
    np.testing.assert_array_equal(out[:, :12].numpy(), ids)
    assert out[:, 12:].tolist() == expected
    same = case.compiled.generate(input_ids=ids, attention_mask=mask, max_new_tokens=9)
    assert isinstance(same, np.ndarray)
    assert same.dtype == np.int64
    np.testing.assert_array_equal(same, out.numpy())


def test_order_of_rows_does_not_matter(case: Case) -> None:
    rows = [prompt(n) for n in (3, 12, 1, 7, 5, 12)]
    ids, mask = padded(rows, "left")
    out = case.compiled.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
    assert out[:, 12:].tolist() == [case.expected(row, 4)[0] for row in rows]


def test_up_to_the_last_slot(case: Case) -> None:
    ids, full = prompt(12), prompt(CTX)
    out = case.compiled.generate(input_ids=np.array([ids]), max_new_tokens=MOST)
    assert out[0, 12:].tolist() == case.expected(ids, MOST)[0]
    out = case.compiled.generate(input_ids=np.array([full]), max_new_tokens=1)
    assert out.shape == (1, CTX + 1)
    assert out[0, CTX:].tolist() == case.expected(full, 1)[0]
    # Beside rows whose padding and idle columns must not touch the last slot of the full one.
    rows = [prompt(3), full, prompt(CTX - 1)]
    batch, mask = padded(rows, "left")
    out = case.compiled.generate(input_ids=batch, attention_mask=mask, max_new_tokens=1)
    assert out[:, CTX:].tolist() == [case.expected(row, 1)[0] for row in rows]


@pytest.mark.parametrize(("length", "new"), [(CTX + 1, 1), (12, MOST + 1), (CTX, 2)])
def test_one_token_too_many(case: Case, monkeypatch: pytest.MonkeyPatch, length: int, new: int) -> None:
    """Refused before anything runs, also when another row would fit."""
    monkeypatch.setattr(case.session, "run", lambda *args: pytest.fail("the program ran"))
    ids, mask = padded([prompt(3), prompt(length)], "left")
    with pytest.raises(ContextLengthError, match=f"ctx_len={CTX}"):
        case.compiled.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new)


def test_default_length_stops_at_the_end_of_the_context(case: Case) -> None:
    """Nobody said how long: Hugging Face's 20 tokens, or what fits."""
    ids = prompt(20)
    out = case.compiled.generate(input_ids=np.array([ids]))
    assert out[0, 20:].tolist() == case.expected(ids, CTX - 20 + 1)[0]


def test_idle_rows_change_nothing(either: Case) -> None:
    steps = ByHand(either, [prompt(n) for n in LENGTHS], MOST)
    chunks = [[5, 5, 3], [5, 2, 0], [2, 0, 0]]
    decode = [[1, 0, 1], [1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1], *([[1, 0, 0]] * 17), [0, 1, 1]]
    compared = sum(steps.feed(counts) for counts in chunks + decode)
    assert steps.fed == [CTX, 10, 8]
    assert compared == MOST + 4 + 6


def test_padding_columns_change_nothing(case: Case) -> None:
    """The same, with every call as wide as a compiled chunk."""
    steps = ByHand(case.unfused(), [prompt(n) for n in LENGTHS], 12)
    calls = [[5, 1, 3], [3, 5, 1], [4, 1, 1], [1, 0, 1], [0, 1, 0], [2, 2, 1]]
    assert sum(steps.feed(counts, width=CHUNK) for counts in calls) == 1 + 1 + 3 + 2 + 1 + 3


def test_what_a_row_held_before_does_not_matter(either: Case) -> None:
    """A slot is free as soon as a prompt starts at position 0, whatever its state holds."""
    random = np.random.default_rng(0)
    first = ByHand(either, [prompt(12), prompt(7)], 5)
    first.feed([5, 5])
    for state in first.states().values():
        state[...] = 30 * random.standard_normal(state.shape)
    second = ByHand(either, [prompt(3), prompt(12)], 5)
    compared = second.feed([3, 5]) + second.feed([0, 5]) + second.feed([1, 2]) + second.feed([1, 1])
    assert compared == 1 + 0 + 2 + 2


# ---------------------------------------------------------------------------------- the comparison itself


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_the_comparison_notices_one_changed_weight(name: str) -> None:
    reference = tiny_causal_lm(name)
    compiled = QEFFAutoModelForCausalLM(copy.deepcopy(reference))
    compiled.compile(ctx_len=CTX, prefill_seq_len=CHUNK)
    with torch.no_grad():
        matrix = next(p for n, p in reference.named_parameters() if "layers.0" in n and p.dim() == 2)
        matrix[0, 0] += 1.0
    case = Case(reference, compiled)
    with pytest.raises(AssertionError):
        ByHand(case, [prompt(5)], 1).feed([5])
    steps = ByHand(case, [prompt(5)], 1)
    steps.logits[0] = steps.logits[0] + np.float32(np.nan)
    with pytest.raises(AssertionError):
        steps.feed([5])


# ---------------------------------------------------------------------------------- static batches


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_more_prompts_than_rows(pairs: Case, count: int) -> None:
    """Every prompt is answered once, also when the last group is not full."""
    rows = [prompt(n) for n in (7, 12, 3, 9, 1)][:count]
    ids, mask = padded(rows, "left")
    out = pairs.compiled.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6)
    assert out[:, ids.shape[1] :].tolist() == [pairs.expected(row, 6)[0] for row in rows]


def test_padding_without_a_mask(pairs: Case) -> None:
    """As Hugging Face: the padding token is padding, unless it is an end token as well."""
    ids, _ = padded([prompt(7), prompt(3)], "left")
    for more in ({}, {"eos_token_id": 0}, {"pad_token_id": 2}):
        expected = pairs.reference.generate(torch.from_numpy(ids), max_new_tokens=5, do_sample=False, **more)
        found = pairs.compiled.generate(input_ids=ids, max_new_tokens=5, **more)
        assert found.tolist() == expected.tolist(), more


def test_rows_end_at_their_own_end_token(pairs: Case) -> None:
    rows = [prompt(n) for n in (12, 3, 7)]
    expected = [pairs.expected(row, 8)[0] for row in rows]
    ends = [expected[0][2], expected[1][5]]
    cut = [tokens[: min([tokens.index(e) for e in ends if e in tokens], default=7) + 1] for tokens in expected]
    assert len({len(tokens) for tokens in cut}) >= 2, "the rows must end at different steps"
    ids, mask = padded(rows, "left")
    out = pairs.compiled.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, eos_token_id=ends, pad_token_id=1
    )
    longest = max(map(len, cut))
    assert out[:, 12:].tolist() == [tokens + [1] * (longest - len(tokens)) for tokens in cut]


# ---------------------------------------------------------------------------------- continuous batching


def limits_of(rows: Sequence[Sequence[int]], limits: Sequence[int]) -> Callable[[Any, Any], bool]:
    """A stopping criterion that gives every prompt a limit of its own."""
    table = {tuple(row): limit for row, limit in zip(rows, limits, strict=True)}

    def ends(ids: Any, scores: Any) -> bool:
        sequence = tuple(ids[0].tolist())
        (limit,) = [limit for row, limit in table.items() if sequence[: len(row)] == row]
        return len(sequence) >= limit + len(next(row for row in table if sequence[: len(row)] == row))

    return ends


def test_five_prompts_through_two_slots(batched: Case) -> None:
    rows = [prompt(n) for n in (12, 3, 7, 1, 10)]
    limits = [4, 9, 1, 12, 6]
    ids, mask = padded(rows, "left")
    out = batched.compiled.generate(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=12,
        stopping_criteria=limits_of(rows, limits),
    )
    expected = [batched.expected(row, n)[0] for row, n in zip(rows, limits, strict=True)]
    assert tuple(out.shape) == (5, 12 + 12)
    assert out[:, 12:].tolist() == [tokens + [0] * (12 - len(tokens)) for tokens in expected]


def test_prompts_to_the_end_of_the_context(batched: Case, tmp_path: Path) -> None:
    """Without a limit each row has its own: what fits behind its prompt. Text in, in the order of the prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "tokenizer"))
    texts = ["the rest of it", "a", "there is no end", "we", "in the end, all"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    assert len({len(row) for row in rows}) >= 4
    result = batched.compiled.generate(prompts=texts, tokenizer=tokenizer)
    assert result.ids == [batched.expected(row, CTX - len(row) + 1)[0] for row in rows]
    assert result.finish_reasons == ["length"] * 5
    assert result.texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in result.ids]


def test_two_calls_do_not_see_each_other(batched: Case) -> None:
    """The second call finds both slots as the first one left them."""
    for rows in ([prompt(12), prompt(7)], [prompt(3), prompt(1), prompt(12)]):
        ids, mask = padded(rows, "left")
        out = batched.compiled.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5)
        assert out[:, 12:].tolist() == [batched.expected(row, 5)[0] for row in rows]


def test_slots_in_any_order_with_idle_ones_between(batched: Case) -> None:
    """Slot 1 alone, both swapped, slot 0 idle in the middle; then slot 0 is given away."""
    steps = ByHand(batched, [prompt(12), prompt(7)], 8)
    compared = sum(steps.feed([n], order=[1]) for n in (5, 2))
    compared += steps.feed([5], order=[0]) + steps.feed([1, 5], order=[1, 0]) + steps.feed([2, 0], order=[0, 1])
    compared += steps.feed([1, 1], order=[1, 0]) + steps.feed([0, 1], order=[0, 1]) + steps.feed([1], order=[0])
    assert compared == 1 + 1 + 1 + 2 + 1 + 1
    assert steps.fed == [14, 10]
    other = prompt(4)
    tokens, logits = batched.expected(other, 3)
    steps.prompts[0], steps.sequences[0], steps.logits[0], steps.fed[0] = other, other + tokens, logits, 0
    assert steps.feed([1, 4], order=[1, 0]) + steps.feed([1, 1], order=[0, 1]) + steps.feed([0, 1], order=[1, 0]) == 5


def test_garbage_in_a_free_slot_does_not_matter(batched: Case) -> None:
    random = np.random.default_rng(1)
    steps = ByHand(batched, [prompt(3), prompt(12)], 5)
    for state in steps.states().values():
        state[...] = 30 * random.standard_normal(state.shape)
    assert steps.feed([3, 5]) + steps.feed([0, 5]) + steps.feed([1, 2]) + steps.feed([1, 1]) == 1 + 0 + 2 + 2


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_more_state_rows_than_slots(name: str) -> None:
    reference = tiny_causal_lm(name)
    compiled = QEFFAutoModelForCausalLM(reference, continuous_batching=True)
    compiled.compile(ctx_len=CTX, prefill_seq_len=CHUNK, full_batch_size=2, kv_cache_batch_size=4)
    case = Case(reference, compiled)
    rows = [prompt(n) for n in (7, 12, 3)]
    ids, mask = padded(rows, "left")
    out = compiled.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5)
    assert out[:, 12:].tolist() == [case.expected(row, 5)[0] for row in rows]
    assert {state.shape[0] for state in ByHand(case, [prompt(3)], 1).states().values()} == {4}


def test_a_loaded_package_gives_the_same(batched: Case) -> None:
    """`QEfficient.load` on the directory alone."""
    rows = [prompt(n) for n in (12, 7, 3)]
    ids, mask = padded(rows, "left")
    with load(batched.compiled.qpc_path) as package:
        out = package.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5)
    assert out[:, 12:].tolist() == [batched.expected(row, 5)[0] for row in rows]

"""Packing: every token exactly once, segments apart, and the same loss and gradients as unpacked rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_causal_lm
from toy_tokenizers import byte_tokenizer

from QEfficient.errors import InputError
from QEfficient.finetune import QEffConfig, QEffDataManager
from QEfficient.finetune.data.encode import Encoded
from QEfficient.finetune.data.packing import PackedRows, pack
from QEfficient.finetune.data.token_rows import TokenRows

LENGTHS = st.integers(4, 40).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), min_size=1, max_size=40))
)


@given(LENGTHS)
@settings(deadline=None)
def test_every_row_is_in_one_bin_and_no_bin_overflows(case):
    capacity, lengths = case
    bins = pack(lengths, capacity)
    assert sorted(index for group in bins for index in group) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in group) for group in bins]
    assert max(loads) <= capacity
    # Best fit leaves at most one bin that is not more than half full, so it needs less than twice the room.
    assert sum(2 * load <= capacity for load in loads) <= 1
    assert pack(list(lengths), capacity) == bins


def test_packing_is_tight():
    assert sorted(map(sorted, pack([6, 4, 7, 3, 5, 5], 10))) == [[0, 1], [2, 3], [4, 5]]
    lengths = np.random.default_rng(0).integers(1, 200, 2000)
    assert len(pack(lengths, 512)) <= 1.01 * lengths.sum() / 512 + 1
    with pytest.raises(InputError, match="A row of 11 tokens does not fit into packed rows of 10"):
        pack([3, 11], 10)


TOKENS = st.lists(
    st.lists(st.tuples(st.integers(3, 90), st.sampled_from([0.0, 0.0, 1.0, 0.5])), min_size=1, max_size=12),
    min_size=1,
    max_size=15,
)


@given(TOKENS, st.sampled_from(["left", "right"]))
@settings(deadline=None)
def test_packed_batches_hold_every_token_and_label_once(rows, side):
    encoded = [Encoded([token for token, _ in row], [weight for _, weight in row]) for row in rows]
    tokens = TokenRows.from_encoded(enumerate(encoded, start=1))
    packed = PackedRows(tokens, 12)
    batch = QEffDataManager.collate(list(packed), padding_side=side, pad_to_multiple_of=8)
    found = []
    for index in range(len(packed)):
        segments = batch["attention_mask"][index]
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert batch["position_ids"][index, here].tolist() == list(range(here.sum()))
            labels = batch["labels"][index, here]
            assert labels[0] == -100
            weights = batch["weights"][index, here] if "weights" in batch else (labels != -100).astype(float)
            found.append(
                (tuple(batch["input_ids"][index, here].tolist()), tuple(labels.tolist()), tuple(weights.tolist()))
            )
    expected = []
    for row in rows:
        kept = [0.0, *(weight for _, weight in row[1:])]
        ids = tuple(token for token, _ in row)
        labels = tuple(token if weight else -100 for token, weight in zip(ids, kept, strict=True))
        expected.append((ids, labels, tuple(kept)))
    assert sorted(found) == sorted(expected)
    assert packed.lengths.sum() == tokens.lengths.sum()
    assert packed.trained.sum() == (batch["labels"] != -100).sum()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_loss_and_gradients_equal_unpacked_ones(tmp_path, family):
    # Rotary and absolute positions; torch, with a mask made from the segments, is the reference for the contract.
    rows = [{"prompt": "ab" * n, "completion": "c" * (n + 1)} for n in (1, 4, 2, 3, 5)]
    manager, results = None, []
    for packing in (False, True):
        config = QEffConfig("m", rows, train_frac=1.0, max_ctx_len=24, packing=packing)
        manager = QEffDataManager(config, byte_tokenizer(), cache_home_dir=tmp_path)
        train, _ = manager.prepare_dataset()
        batch = next(iter(manager.get_dataloader(train, len(train), shuffle=False)))
        results.append((len(train), *loss_and_gradients(family, batch)))
    assert results[1][0] < results[0][0]
    assert manager.audit.splits["train"].packed_rows == results[1][0]
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-12)
    for name, gradient in results[0][2].items():
        assert torch.allclose(gradient, results[1][2][name], rtol=1e-9, atol=1e-10), name


def loss_and_gradients(family, batch):
    # Double precision: what differs is then the data, not the order of additions.
    model = tiny_causal_lm(family).double()
    ids, segments, labels = (torch.from_numpy(batch[name]) for name in ("input_ids", "attention_mask", "labels"))
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    apart = (segments[:, :, None] == segments[:, None, :]) & causal
    mask = torch.where(apart, 0.0, torch.finfo(torch.float32).min).double()[:, None]
    logits = model(ids, attention_mask=mask, position_ids=torch.from_numpy(batch["position_ids"])).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def test_evaluation_rows_are_not_packed(tmp_path):
    rows = [{"prompt": "ab", "completion": "c"} for _ in range(10)]
    config = QEffConfig("m", rows, train_frac=0.5, max_ctx_len=24, packing=True)
    train, evaluation = QEffDataManager(config, byte_tokenizer(), cache_home_dir=tmp_path).prepare_dataset()
    assert (len(train), len(evaluation)) == (1, 5)

"""Batches: the contract of ``collate``, the order of rows, and loaders that continue in the middle of an epoch."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_causal_lm
from toy_tokenizers import byte_tokenizer

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune import QEffConfig, QEffDataManager, QEffTrainingArgs
from QEfficient.finetune.data.batching import GROUPED_BATCHES, BatchOrder, row_order

collate = QEffDataManager.collate
NAMES = ("input_ids", "attention_mask", "position_ids", "labels")


def test_the_batch_contract():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, -100, 7]},
        {"input_ids": [8, 9, 10, 11], "labels": [-100, 9, 10, 11], "attention_mask": [1, 1, 2, 2]},
    ]
    batch = collate(rows, pad_token_id=3)
    assert {name: array.tolist() for name, array in batch.items()} == {
        "input_ids": [[5, 6, 7, 3], [8, 9, 10, 11]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 2, 2]],
        "position_ids": [[0, 1, 2, 0], [0, 1, 0, 1]],
        "labels": [[-100, -100, 7, -100], [-100, 9, -100, 11]],
    }
    assert all(array.dtype == np.int64 and array.flags["C_CONTIGUOUS"] for array in batch.values())
    left = collate(rows, pad_token_id=3, padding_side="left")
    assert left["input_ids"].tolist() == [[3, 5, 6, 7], [8, 9, 10, 11]]
    assert left["attention_mask"][0].tolist() == [0, 1, 1, 1]
    assert left["position_ids"][0].tolist() == [0, 0, 1, 2]
    assert left["labels"][0].tolist() == [-100, -100, -100, 7]


def test_weights_and_lengths():
    rows = [
        {"input_ids": [5, 6], "labels": [5, 6], "weights": [9.0, 0.5]},
        {"input_ids": [7, 8, 9], "labels": [-100, -100, 9]},
    ]
    batch = collate(rows, pad_to_multiple_of=4)
    assert batch["weights"].dtype == np.float32
    assert batch["weights"].tolist() == [[0, 0.5, 0, 0], [0, 0, 1, 0]]
    assert collate(rows, pad_to_length=7)["input_ids"].shape == (2, 7)
    assert collate(rows, pad_to_length=2)["input_ids"].shape == (2, 3)
    assert "weights" not in collate(rows[1:])


def test_rows_may_be_tensors_and_bring_their_own_padding():
    row = {
        "input_ids": torch.tensor([[0, 5, 6, 0]]),
        "labels": torch.tensor([[-100, 5, 6, -100]]),
        "attention_mask": [0, 1, 1, 0],
    }
    batch = collate([row])
    assert batch["input_ids"].tolist() == [[5, 6]]
    assert batch["labels"].tolist() == [[-100, 6]]


def test_classes():
    rows = [{"input_ids": [5, 6], "labels": 1}, {"input_ids": [7], "labels": np.int64(0)}]
    batch = collate(rows)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == np.int64
    with pytest.raises(InputError, match="do not mix"):
        collate([rows[0], {"input_ids": [5], "labels": [5]}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows to make a batch of"),
        ([{"input_ids": []}], "must be integers"),
        ([{"input_ids": [1.5]}], "must be integers"),
        ([{"input_ids": [1, 2], "labels": [1]}], "labels of row 1 of the batch has 1 values for 2"),
        ([{"input_ids": [1, 2], "weights": [1]}], "1 weights and 2 tokens"),
        ([{"input_ids": [1]}, {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}], "Row 2 .* attention_mask"),
        ([{"input_ids": [1, 2], "attention_mask": [2, 1]}], "attention_mask"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "no token that is not padding"),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(InputError, match=message):
        collate(rows)


ROWS = st.lists(st.lists(st.tuples(st.integers(3, 50), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=6)


@given(ROWS, st.sampled_from(["left", "right"]), st.sampled_from([None, 4, 8]))
@settings(deadline=None)
def test_nothing_is_lost_added_or_moved(rows, side, multiple):
    items = [
        {"input_ids": [token for token, _ in row], "labels": [token if trained else -100 for token, trained in row]}
        for row in rows
    ]
    batch = collate(items, padding_side=side, pad_to_multiple_of=multiple)
    length = batch["input_ids"].shape[1]
    assert length >= max(map(len, rows))
    assert multiple is None or length % multiple == 0
    for index, row in enumerate(rows):
        real = batch["attention_mask"][index] == 1
        assert batch["input_ids"][index, real].tolist() == [token for token, _ in row]
        assert batch["position_ids"][index, real].tolist() == list(range(len(row)))
        # What is trained is what was asked for, except a first token, which nothing predicts.
        expected = [token if trained and place else -100 for place, (token, trained) in enumerate(row)]
        assert batch["labels"][index, real].tolist() == expected
        assert (batch["labels"][index, ~real] == -100).all()
        assert not batch["position_ids"][index, ~real].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_batch_is_the_loss_of_its_rows(side):
    model = tiny_causal_lm("llama")
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(5, 100, n), "labels": rng.integers(5, 100, n)} for n in (3, 9, 6)]
    for row in rows:
        row["labels"] = np.where(rng.random(row["labels"].size) < 0.5, row["input_ids"], -100)
        row["labels"][-1] = row["input_ids"][-1]

    def total(items, **options):
        batch = {name: torch.from_numpy(array) for name, array in collate(items, **options).items()}
        with torch.no_grad():
            logits = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        return losses.item()

    assert total(rows, padding_side=side, pad_to_multiple_of=8) == pytest.approx(
        sum(total([row]) for row in rows), rel=1e-5
    )


# ---------------------------------------------------------------------------------------------- order


@given(st.integers(1, 200), st.integers(0, 2**40), st.integers(0, 50), st.booleans())
@settings(deadline=None)
def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_only(count, seed, epoch, grouped):
    lengths = np.random.default_rng(count).integers(1, 30, count) if grouped else None
    np.random.seed(1)
    first = row_order(count, seed, epoch, lengths=lengths, batch_size=4)
    np.random.seed(2)
    assert sorted(first.tolist()) == list(range(count))
    assert np.array_equal(first, row_order(count, seed, epoch, lengths=lengths, batch_size=4))
    assert row_order(count, seed, epoch, shuffle=False).tolist() == list(range(count))


def test_orders_of_other_epochs_and_seeds_differ_and_stay_what_they_are():
    orders = {tuple(row_order(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    # Written down: a resumed run must see the same order with another numpy.
    assert row_order(8, 42, 0).tolist() == [6, 5, 0, 4, 3, 1, 7, 2]


def test_grouping_puts_like_lengths_together_and_the_longest_first():
    lengths = np.random.default_rng(0).integers(1, 500, 1000)

    def padding(order):
        batches = [lengths[order[i : i + 8]] for i in range(0, 1000, 8)]
        return sum(batch.max() * len(batch) - batch.sum() for batch in batches)

    grouped = row_order(1000, 1, 0, lengths=lengths, batch_size=8)
    assert padding(grouped) < 0.15 * padding(row_order(1000, 1, 0))
    assert lengths[grouped[0]] == lengths.max()
    # Not one sorted list: the groups are shuffled ones.
    group = GROUPED_BATCHES * 8
    assert lengths[grouped[group]] > lengths[grouped[group - 1]]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4))
@settings(deadline=None)
def test_ranks_share_every_batch(count, batch_size, world_size):
    ranks = [
        BatchOrder(count, batch_size, 7, rank=rank, world_size=world_size).batches(3) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    alone = BatchOrder(count, batch_size * world_size, 7).batches(3)
    for number, whole in enumerate(alone):
        shared = [index for batches in ranks for index in batches[number] if index >= 0]
        assert sorted(shared) == sorted(whole)
        assert all(batches[number] for batches in ranks)


def test_bad_orders():
    for options, message in (
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, "rank=2 does not exist"),
        ({"batch_size": 20, "drop_last": True}, "drop_last leaves no batch"),
        ({"batch_size": 2, "seed": -1}, "seed"),
    ):
        with pytest.raises(OptionError, match=message):
            BatchOrder(10, **options)
    assert len(BatchOrder(10, 4, drop_last=True)) == 2
    assert len(BatchOrder(10, 4)) == 3


# ---------------------------------------------------------------------------------------------- loader


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def make(home, count=11, args=None, **options):
    rows = [{"prompt": f"{i:02}", "completion": "x" * (i + 1)} for i in range(count)]
    config = QEffConfig("m", rows, train_frac=1.0, **options)
    manager = QEffDataManager(config, byte_tokenizer(), args=args, cache_home_dir=home)
    return manager, manager.prepare_dataset()[0]


def contents(batches):
    return [{name: array.tolist() for name, array in batch.items()} for batch in batches]


def test_a_loader_gives_every_row_once_an_epoch_and_another_order_in_the_next(home):
    manager, train = make(home)
    loader = manager.get_dataloader(train, 4)
    first, second = contents(loader), contents(loader)
    assert [len(batch["input_ids"]) for batch in first] == [4, 4, 3]
    assert len(loader) == 3
    seen = [sorted(tuple(row[:2]) for batch in epoch for row in batch["input_ids"]) for epoch in (first, second)]
    assert seen[0] == seen[1] == sorted(tuple(row["input_ids"][:2].tolist()) for row in train)
    assert first != second
    again = manager.get_dataloader(train, 4)
    again.set_epoch(1)
    assert contents(again) == second
    plain = manager.get_dataloader(train, 4, shuffle=False)
    assert contents(plain) == contents(plain)
    assert plain.dataset is train


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_a_loader_continues_where_it_stopped(home, count, batch_size, stop):
    manager, train = make(home, count)
    whole = manager.get_dataloader(train, batch_size)
    expected = contents(whole) + contents(whole) + contents(whole)

    def endless(loader):
        while True:
            yield from loader

    loader = manager.get_dataloader(train, batch_size)
    source = endless(loader)
    before = contents(next(source) for _ in range(min(stop, 2 * len(loader))))
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = manager.get_dataloader(train, batch_size)
    resumed.load_state_dict(state)
    source = endless(resumed)
    after = contents(next(source) for _ in range(len(expected) - len(before)))
    assert before + after == expected


def test_looking_at_one_batch_does_not_lose_it(home):
    manager, train = make(home)
    loader = manager.get_dataloader(train, 4)
    first = next(iter(loader))
    assert contents(loader)[0] == contents([first])[0]


def test_a_position_of_another_run_is_refused(home):
    manager, train = make(home)
    state = manager.get_dataloader(train, 4).state_dict()
    with pytest.raises(OptionError, match="batch_size=4 and this run has 5"):
        manager.get_dataloader(train, 5).load_state_dict(state)
    other, rows = make(home, seed=1)
    with pytest.raises(OptionError, match="resume with the data and options"):
        other.get_dataloader(rows, 4).load_state_dict(state)


def test_training_arguments_choose_the_order(home):
    manager, train = make(home, args=QEffTrainingArgs(group_by_length=True))
    first = next(iter(manager.get_dataloader(train, 4)))
    assert (first["attention_mask"].sum(1)[0]) == train.lengths.max()
    manager, train = make(home, args=QEffTrainingArgs(train_sampling_strategy="sequential"))
    assert contents(manager.get_dataloader(train, 4)) == contents(manager.get_dataloader(train, 4, shuffle=False))
    manager, train = make(home, args=QEffTrainingArgs(dataloader_drop_last=True))
    assert len(manager.get_dataloader(train, 4)) == 2
    assert len(manager.get_dataloader(train, 4, shuffle=False)) == 3
    manager, train = make(home, args=QEffTrainingArgs(data_seed=5))
    assert contents(manager.get_dataloader(train, 4)) != contents(make(home)[0].get_dataloader(train, 4))


def test_a_rank_without_rows_trains_nothing(home):
    manager, train = make(home, count=5)
    batches = [list(manager.get_dataloader(train, 2, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(rank) for rank in batches] == [1, 1, 1]
    manager, train = make(home, count=7)
    last = [list(manager.get_dataloader(train, 2, rank=rank, world_size=3))[-1] for rank in range(3)]
    assert [(batch["labels"] != -100).any() for batch in last] == [True, False, False]


def test_torchs_own_loader_takes_the_same_order(home):
    manager, train = make(home)
    ours = manager.get_dataloader(train, 4)
    theirs = torch.utils.data.DataLoader(train, batch_sampler=ours.batch_sampler, collate_fn=ours.collate_fn)
    assert contents(theirs) == contents(ours)

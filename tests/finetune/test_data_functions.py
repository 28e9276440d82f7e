"""The documented functions: configuration from steps, preprocessed rows, collators, loaders that work ahead."""

from __future__ import annotations

import copy
import json
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from toy_tokenizers import byte_tokenizer

from QEfficient.errors import InputError, OptionError, TargetUnavailableError
from QEfficient.finetune import (
    QEffTrainingArgs,
    device_aware_data_loading,
    generate_dataset_config,
    get_custom_data_collator,
    get_dataloader_kwargs,
    get_longest_seq_length,
    get_preprocessed_dataset,
    padding_dataset,
)
from QEfficient.finetune.data.device_loader import DeviceLoader

ROWS = [{"prompt": f"question {n}:", "completion": "yes " * (n % 5 + 1)} for n in range(23)]


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))


def made(steps=("tokenization",), rows=ROWS, **custom):
    custom = {"tokenizer": byte_tokenizer(), "max_ctx_len": 64, "batch_size": 4, **custom}
    return generate_dataset_config(dataset_name=rows, preprocessing_steps=steps, custom_config=custom)


# ---------------------------------------------------------------------------------------------- configuration


def test_the_documented_example():
    config = generate_dataset_config(
        dataset_name="sample",
        preprocessing_steps=["tokenization", "masking", "padding"],
        custom_config={"batch_size": 8, "tokenizer": byte_tokenizer(), "max_length": 256, "flavour": "sweet"},
    )
    assert (config.batch_size, config.fixed_length, config.flavour) == (8, True, "sweet")
    assert config.options == {"max_ctx_len": 256, "train_on": "completion"}
    collator = get_custom_data_collator(config, batch_size=8, padding=True)
    loader = device_aware_data_loading(config, collator, target_device="cpu")
    batch = next(iter(loader))
    assert batch["input_ids"].shape == (8, 256)
    assert batch["input_ids"].flags.c_contiguous


def test_own_settings_are_attributes_and_a_typo_is_not():
    config = made(flavour="sweet")
    assert copy.copy(config).flavour == "sweet"
    with pytest.raises(AttributeError, match="Did you mean 'flavour'"):
        _ = config.flavor


def test_settings_from_a_file(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"preproc_file": "f.py:rows", "greeting": "hey"}))
    config = generate_dataset_config("custom_dataset", str(path))
    assert (config.greeting, config.preproc_file) == ("hey", "f.py:rows")


def test_steps_become_options():
    def upper(row):
        return {**row, "completion": row["completion"].upper()}

    config = made([upper, "filtering", "sampling", "tokenization", "masking", "packing"], sample_size=7)
    wanted = {"filters": ["dedupe"], "train_on": "completion", "packing": True, "sample_size": 7}
    assert wanted.items() <= config.options.items()
    rows = get_preprocessed_dataset(byte_tokenizer(), made([upper]))
    assert "YES" in byte_tokenizer().decode(rows[0]["input_ids"])


@pytest.mark.parametrize(
    ("steps", "custom", "words"),
    [
        (["tokenisation"], {}, "Did you mean 'tokenization'"),
        (["packing", "tokenization"], {}, "tokenization cannot come after packing"),
        (["tokenization", "filtering"], {}, "filtering cannot come after tokenization"),
        (["tokenization", len], {}, "a function over rows cannot come after tokenization"),
        (["sampling"], {}, "needs sample_size"),
        (["augmentation"], {}, "needs augment"),
        ([3], {}, "no preprocessing step 3"),
        (3, {}, "must be a list"),
        ([], {"batch_size": 0}, "batch_size must be an integer"),
        ([], {"max_ctx_len": 1}, "max_ctx_len must be an integer"),
        ([], {"max_ctx_len": 64, "cutoff_len": 32}, "contradicts"),
    ],
)
def test_what_a_configuration_refuses(steps, custom, words):
    with pytest.raises(OptionError, match=words):
        generate_dataset_config("sample", preprocessing_steps=steps, custom_config=custom)


# ---------------------------------------------------------------------------------------------- rows


def test_splits_and_lengths():
    tokenizer, config = byte_tokenizer(), made(train_frac=0.7)
    train = get_preprocessed_dataset(tokenizer, config)
    held = get_preprocessed_dataset(tokenizer, config, split="validation")
    assert len(train) + len(held) == len(ROWS)
    sizes = [len(row["input_ids"]) for row in train]
    assert get_longest_seq_length(train) == (max(sizes), sizes.index(max(sizes)))
    short = get_preprocessed_dataset(tokenizer, made(truncation="cut_answer"), context_length=16)
    assert get_longest_seq_length(short)[0] == 16


def test_no_such_split():
    with pytest.raises(OptionError, match="Did you mean 'train'"):
        get_preprocessed_dataset(byte_tokenizer(), made(), split="trian")
    with pytest.raises(OptionError, match="no rows for evaluation"):
        get_preprocessed_dataset(byte_tokenizer(), made(train_frac=1.0), split="test")


# ---------------------------------------------------------------------------------------------- collators


def rows_of(*sizes):
    return [{"input_ids": list(range(1, size + 1)), "labels": list(range(1, size + 1))} for size in sizes]


@pytest.mark.parametrize(("padding", "width"), [(True, 5), ("longest", 5), ("max_length", 64), (8, 8)])
def test_padding(padding, width):
    batch = get_custom_data_collator(made(), padding=padding)(rows_of(3, 5))
    assert batch["input_ids"].shape == (2, width)
    assert batch["attention_mask"].sum(axis=1).tolist() == [3, 5]
    assert (batch["labels"][0, 3:] == -100).all()


def test_padding_that_must_not_be_needed():
    collator = get_custom_data_collator(made(), padding=False)
    assert collator(rows_of(4, 4))["input_ids"].shape == (2, 4)
    with pytest.raises(InputError, match="several lengths"):
        collator(rows_of(4, 3))


def test_too_many_rows_and_other_arguments():
    with pytest.raises(InputError, match="a batch of 3 rows is more than batch_size=2"):
        get_custom_data_collator(made(), 2)(rows_of(1, 2, 2))
    with pytest.raises(OptionError, match="Did you mean 'longest'"):
        get_custom_data_collator(made(), padding="longst")
    with pytest.raises(OptionError, match="pass what generate_dataset_config returns"):
        get_custom_data_collator("gsm8k")


def test_efficient_transformers_argument_order_and_collate_file(tmp_path):
    """Its collate function pads to the left with its own token; the arrays are then checked and padded as usual."""
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "def collate(tokenizer):\n"
        "    def batch(rows):\n"
        "        width = max(len(r['input_ids']) for r in rows) + 2\n"
        "        pad = lambda r, name, fill: [fill] * (width - len(r['input_ids'])) + list(r[name])\n"
        "        return {'input_ids': np.array([pad(r, 'input_ids', tokenizer.pad_token_id) for r in rows]),\n"
        "                'attention_mask': np.array([[0] * (width - len(r['input_ids'])) + [1] * len(r['input_ids'])\n"
        "                                            for r in rows]),\n"
        "                'labels': np.array([pad(r, 'labels', -100) for r in rows])}\n"
        "    return batch\n"
    )
    config = generate_dataset_config(
        "custom_dataset", {"collate_file": f"{tmp_path}/own.py:collate", "preproc_file": "x"}
    )
    collator = get_custom_data_collator(byte_tokenizer(), config)
    batch = collator(rows_of(3, 5))
    plain = get_custom_data_collator(made())(rows_of(3, 5))
    for name in ("input_ids", "attention_mask", "labels", "position_ids"):
        np.testing.assert_array_equal(batch[name], plain[name])


# ---------------------------------------------------------------------------------------------- loaders


def keys(batches):
    return [batch["input_ids"].tobytes() for batch in batches]


@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
def test_every_row_once_in_an_order_that_the_seed_decides(prefetch):
    config = made(train_frac=1.0)
    loader = device_aware_data_loading(config, seed=5, prefetch=prefetch)
    first, second = keys(loader), keys(loader)
    assert len(loader) == len(first) == 6
    assert first != second, "another epoch, another order"
    again = device_aware_data_loading(config, seed=5, prefetch=0)
    assert (keys(again), keys(again)) == (first, second)
    rows = sorted(bytes(row[:4]) for batch in again for row in batch["input_ids"][:, :4].astype(np.uint8))
    assert len(rows) == len(ROWS)


@pytest.mark.parametrize("after", [1, 3, 5])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_position_is_that_of_the_batches_handed_out(after, prefetch):
    config = made(train_frac=1.0)
    loader = device_aware_data_loading(config, prefetch=prefetch)
    batches = iter(loader)
    done = [next(batches)["input_ids"].tobytes() for _ in range(after)]
    state = json.loads(json.dumps(loader.state_dict()))
    rest = keys(batches)
    resumed = device_aware_data_loading(config, prefetch=2)
    resumed.load_state_dict(state)
    assert keys(resumed) == rest
    assert keys(resumed) == keys(loader), "and then the next epoch"
    assert len(done) + len(rest) == 6


def test_leaving_in_the_middle_ends_the_thread():
    loader = device_aware_data_loading(made(train_frac=1.0), prefetch=3)
    for _ in loader:
        break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_an_error_while_a_batch_is_made_reaches_the_caller():
    config = made(train_frac=1.0)
    loader = device_aware_data_loading(config, get_custom_data_collator(config, 2, padding=False), batch_size=2)
    with pytest.raises(InputError, match="several lengths"):
        list(loader)


def test_a_compiled_target_gets_one_shape():
    batches = list(device_aware_data_loading(made(train_frac=1.0), target_device="qaic"))
    assert {batch["input_ids"].shape for batch in batches} == {(4, 64)}
    assert len(batches) == 5, "a short last batch has another shape"


def test_devices_that_are_not_here_or_unknown():
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(TargetUnavailableError, match="no CUDA device"):
            device_aware_data_loading(made(), target_device="gpu")
    with pytest.raises(OptionError, match="Did you mean 'host'"):
        device_aware_data_loading(made(), target_device="hots")
    with pytest.raises(OptionError, match="names no tokenizer"):
        device_aware_data_loading(generate_dataset_config("sample"))
    with pytest.raises(OptionError, match="prefetch must be"):
        device_aware_data_loading(made(), prefetch=-1)


def test_evaluation_rows_keep_their_order():
    config = made(train_frac=0.5)
    loader = device_aware_data_loading(config, split="validation", batch_size=1)
    assert isinstance(loader, DeviceLoader)
    rows = get_preprocessed_dataset(byte_tokenizer(), config, split="validation")
    assert [batch["input_ids"][0].tolist() for batch in loader] == [row["input_ids"].tolist() for row in rows]


# ---------------------------------------------------------------------------------------------- keywords for torch


class Ranked(QEffTrainingArgs):
    """Arguments of one of several processes, without the processes."""

    rank, ranks = 0, 1

    @property
    def process_index(self):
        return self.rank

    @property
    def world_size(self):
        return self.ranks


def ranked(rank, ranks, **options):
    args = Ranked("out", **options)
    args.rank, args.ranks = rank, ranks
    return args


def real(batches):
    """Token ids of every row that trains something."""
    return [
        tuple(ids[mask != 0].tolist())
        for batch in batches
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        if (labels != -100).any()
    ]


def test_keywords_for_torch_give_the_batches_of_a_loader():
    tokenizer, rows = byte_tokenizer(), get_preprocessed_dataset(byte_tokenizer(), made())
    kwargs = get_dataloader_kwargs(ranked(0, 1, batch_size=4, seed=3), rows, tokenizer)
    loader = DataLoader(rows, **kwargs)
    assert sorted(real(loader)) == sorted(tuple(row["input_ids"].tolist()) for row in rows)
    first = real(loader)
    kwargs["batch_sampler"].set_epoch(1)
    assert real(loader) != first
    assert isinstance(next(iter(loader))["labels"], torch.Tensor)
    held = DataLoader(rows, **get_dataloader_kwargs(ranked(0, 1, batch_size=4), rows, tokenizer, "validation"))
    assert real(held) == [tuple(row["input_ids"].tolist()) for row in rows]


@pytest.mark.parametrize(("batch_size", "world"), [(2, 2), (3, 2), (2, 4)])
def test_padded_rows_are_shared_by_ranks_and_train_nothing(batch_size, world):
    tokenizer, rows = byte_tokenizer(), get_preprocessed_dataset(byte_tokenizer(), made(train_frac=1.0))
    padded = padding_dataset(ranked(0, world), rows, batch_size)
    assert len(padded) % (batch_size * world) == 0
    assert 0 <= len(padded) - len(rows) < batch_size * world
    assert [len(row["input_ids"]) for row in padded] == padded.lengths.tolist()
    assert all((padded[n]["labels"] == -100).all() for n in range(len(rows), len(padded)))
    parts = [
        list(DataLoader(padded, **get_dataloader_kwargs(ranked(rank, world, batch_size=batch_size), padded, tokenizer)))
        for rank in range(world)
    ]
    assert len({len(part) for part in parts}) == 1
    assert sorted(row for part in parts for row in real(part)) == sorted(tuple(r["input_ids"].tolist()) for r in rows)


def test_rows_that_leave_a_rank_without_one():
    rows = get_preprocessed_dataset(byte_tokenizer(), made(train_frac=1.0))  # 23
    with pytest.raises(OptionError, match="pass what padding_dataset returns"):
        get_dataloader_kwargs(ranked(0, 11, batch_size=1), rows, byte_tokenizer())

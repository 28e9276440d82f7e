"""The data pipeline as functions: preprocessed rows, a collator, and a loader for a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from QEfficient.errors import InputError, OptionError, TargetUnavailableError
from QEfficient.finetune.data import loader
from QEfficient.finetune.data.batching import BatchOrder
from QEfficient.finetune.data.builtin import custom_settings
from QEfficient.finetune.data.collate import Batch, collate, without_labels
from QEfficient.finetune.data.device_loader import DeviceLoader
from QEfficient.finetune.data.loader import BatchLoader
from QEfficient.finetune.data.sources import EVAL_NAMES, TRAIN_NAMES
from QEfficient.finetune.data.stream import StreamRows
from QEfficient.finetune.data_manager import QEffDataManager
from QEfficient.finetune.dataset_config import DatasetConfig
from QEfficient.finetune.keywords import boolean, integer, short
from QEfficient.finetune.user_code import load_function
from QEfficient.suggest import did_you_mean
from QEfficient.targets.registry import get_target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from QEfficient.finetune.arguments import QEffTrainingArgs
    from QEfficient.finetune.data.mixing import SingleRows
    from QEfficient.finetune.data.packing import PackedRows

#: Names of a device that torch itself computes on.
_CUDA = ("gpu", "cuda")


def get_preprocessed_dataset(
    tokenizer: PreTrainedTokenizerBase,
    dataset_config: DatasetConfig,
    split: str = "train",
    context_length: int | None = None,
) -> SingleRows | PackedRows:
    """The rows of one split, tokenized and labelled; read from the cache when they were before.

    Args:
        tokenizer: the model's.
        dataset_config: from `generate_dataset_config`.
        split: ``train``, or a name of the evaluation rows (``validation``, ``eval``, ``test``, …).
        context_length: most tokens of a row; None takes ``max_ctx_len`` of the configuration.

    Returns:
        Indexable rows of ``input_ids`` and ``labels``, int64 ``[L]``; labels are -100 where nothing is trained.

    Raises:
        OptionError: no such split, or a configuration that does not fit the data.
        InputError: data that is missing or malformed.
    """
    rows, _ = _prepared(tokenizer, dataset_config, split, context_length)
    return rows


def get_longest_seq_length(data: SingleRows | PackedRows) -> tuple[int, int]:
    """(tokens of the longest row, its index), from preprocessed rows."""
    index = int(np.argmax(data.lengths))
    return int(data.lengths[index]), index


@dataclass(frozen=True)
class Collator:
    """Rows to one batch of arrays ``[B, S]``; see `QEfficient.finetune.data.collate.collate`.

    Attributes:
        batch_size: most rows of a batch.
        pad_token_id: what fills batches; it is never attended to nor trained.
        multiple_of: batches are as long as a multiple of this.
        length: batches are at least this long.
        equal: rows must have one length, and nothing is padded.
        own: a function of the user's that makes a batch first; its arrays are then checked and padded as usual.
    """

    batch_size: int
    pad_token_id: int = 0
    multiple_of: int | None = None
    length: int | None = None
    equal: bool = False
    own: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """
        Raises:
            InputError: no rows, more than ``batch_size``, rows of several lengths where they must be equal, or arrays
                that do not fit each other.
        """
        if len(rows) > self.batch_size:
            raise InputError(f"a batch of {len(rows)} rows is more than batch_size={self.batch_size}.")
        if self.own is not None and len(rows):
            made = {name: np.asarray(value) for name, value in self.own(rows).items()}
            rows = _rows_of(made, len(rows))
        if self.equal and len({np.size(row["input_ids"]) for row in rows}) > 1:
            raise InputError("rows of a batch have several lengths, and padding=False asks for one: pass padding=True.")
        return collate(
            rows, pad_token_id=self.pad_token_id, pad_to_multiple_of=self.multiple_of, pad_to_length=self.length
        )


def get_custom_data_collator(
    dataset_config: Any, batch_size: int | DatasetConfig | None = None, padding: bool | str | int = True
) -> Collator:
    """What makes batches of a data set's rows.

    Args:
        dataset_config: from `generate_dataset_config`; or, as in efficient-transformers, a tokenizer, with the
            configuration as second argument.
        batch_size: most rows of a batch; None takes the configuration's.
        padding: True or ``"longest"``: to the longest row of the batch; ``"max_length"``: to ``max_ctx_len``; a
            number: to a multiple of it; False: rows must have one length. A configuration with the step ``padding``
            pads to ``max_ctx_len`` whatever is said here.

    Raises:
        OptionError: another kind of argument, or a ``collate_file`` that cannot be loaded.
    """
    tokenizer = None
    if not isinstance(dataset_config, DatasetConfig):
        dataset_config, tokenizer, batch_size = batch_size, dataset_config, None
    if not isinstance(dataset_config, DatasetConfig):
        raise OptionError(
            f"pass what generate_dataset_config returns, alone or after a tokenizer, got {short(dataset_config)}."
        )
    size = dataset_config.batch_size if batch_size is None else integer("batch_size", batch_size)
    length = dataset_config.config_length if padding == "max_length" or dataset_config.fixed_length else None
    multiple = integer("padding", padding) if isinstance(padding, int) and not isinstance(padding, bool) else None
    if isinstance(padding, str) and padding not in ("longest", "max_length"):
        raise OptionError(
            f"padding must be True, False, 'longest', 'max_length' or a number, got {padding!r}."
            f"{did_you_mean(padding, ('longest', 'max_length'))}"
        )
    own = None
    if dataset_config.own.get("collate_file") is not None:
        tokenizer = tokenizer or dataset_config.load_tokenizer()
        own = load_function(dataset_config.own["collate_file"], "collate_file").call(tokenizer)
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    equal = padding is False and not dataset_config.fixed_length
    return Collator(size, pad, multiple, length, equal, own)


class PaddedRows:
    """Rows, and after them copies of the first that train nothing, up to a number of rows."""

    def __init__(self, rows: loader.Rows, count: int) -> None:
        self.rows, self.count = rows, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(f"row {index} of {self.count}")
        return self.rows[index] if index < len(self.rows) else without_labels(self.rows[0])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, int64 ``[N]``."""
        lengths = np.asarray(self.rows.lengths)
        return np.concatenate([lengths, np.repeat(lengths[:1], self.count - len(lengths))])


def padding_dataset(train_config: QEffTrainingArgs, dataset: loader.Rows, batch_size: int) -> PaddedRows:
    """Rows whose number is a multiple of the rows in a batch of all ranks.

    What is added has labels of -100 only, so it changes neither loss nor gradients.

    Args:
        train_config: its ``world_size`` counts.
        dataset: preprocessed rows.
        batch_size: rows of a batch of one rank.
    """
    size = integer("batch_size", batch_size) * train_config.world_size
    return PaddedRows(dataset, -(-len(dataset) // size) * size)


def get_dataloader_kwargs(
    train_config: QEffTrainingArgs,
    dataset: loader.Rows,
    dataset_processer: PreTrainedTokenizerBase,
    split: str = "train",
) -> dict[str, Any]:
    """Keywords for ``torch.utils.data.DataLoader(dataset, …)``: this rank's batches, as the trainer cuts them.

    Args:
        train_config: batch sizes, seed, ``train_sampling_strategy``, ``dataloader_drop_last``, and which rank this is.
        dataset: preprocessed rows.
        dataset_processer: the tokenizer, for its padding token.
        split: ``train``; anything else is not shuffled and has ``per_device_eval_batch_size`` rows.

    Returns:
        ``batch_sampler`` (its ``set_epoch`` chooses the order) and ``collate_fn``, which gives torch tensors.

    Raises:
        OptionError: a rank would have no row in the last batch.
    """
    import torch

    train = split in TRAIN_NAMES
    strategy = train_config.train_sampling_strategy if train else "sequential"
    size = train_config.per_device_train_batch_size if train else train_config.per_device_eval_batch_size
    drop_last = train and train_config.dataloader_drop_last
    if not drop_last and 0 < len(dataset) % (size * train_config.world_size) < train_config.world_size:
        raise OptionError(
            f"{len(dataset)} rows leave a rank without a row in the last batch: pass what padding_dataset returns."
        )
    order = BatchOrder(
        len(dataset),
        size,
        train_config.seed if train_config.data_seed is None else train_config.data_seed,
        shuffle=strategy != "sequential",
        lengths=dataset.lengths if strategy == "group_by_length" else None,
        drop_last=drop_last,
        rank=train_config.process_index,
        world_size=train_config.world_size,
    )
    collator = Collator(size, dataset_processer.pad_token_id or 0)

    def tensors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {name: torch.from_numpy(array) for name, array in collator(rows).items()}

    return {"batch_sampler": order, "collate_fn": tensors}


def device_aware_data_loading(
    dataset_config: DatasetConfig,
    custom_data_collator: Callable[[Sequence[Mapping[str, Any]]], Batch] | None = None,
    target_device: str = "host",
    *,
    split: str = "train",
    batch_size: int | None = None,
    shuffle: bool = True,
    seed: int = 42,
    drop_last: bool = False,
    prefetch: int = 2,
) -> DeviceLoader:
    """Batches of a data set where the device that computes reads them, made in the background.

    Args:
        dataset_config: from `generate_dataset_config`, with a ``tokenizer`` or ``model_id`` in its ``custom_config``.
        custom_data_collator: from `get_custom_data_collator`, or any function of rows; None makes one.
        target_device: a target's name (``host``, ``cpu``: contiguous numpy arrays; ``qaic``: arrays of the one shape a
            package is compiled for), or ``cuda``, ``gpu``: torch tensors on that device, copied from pinned memory.
        split: ``train`` or a name of the evaluation rows, which are never shuffled.
        batch_size: rows of a batch; None takes the collator's, else the configuration's.
        shuffle, seed: the order is a function of the seed and the epoch.
        drop_last: leave out a short last batch.
        prefetch: batches made ahead.

    Raises:
        OptionError: an unknown device, or a configuration without a tokenizer.
        TargetUnavailableError: the device is not here.
        InputError: data that is missing or malformed.
    """
    boolean("shuffle", shuffle)
    place, fixed = _placing(target_device)
    collator = custom_data_collator or get_custom_data_collator(dataset_config)
    size = batch_size or getattr(collator, "batch_size", None) or dataset_config.batch_size
    rows, manager = _prepared(dataset_config.load_tokenizer(), dataset_config, split, None)
    length = manager.config.max_ctx_len

    def make(found: Sequence[Mapping[str, Any]]) -> Batch:
        batch = dict(collator(found))
        return _full(batch, length, manager.pad_token_id) if fixed else batch

    order = BatchOrder(len(rows), integer("batch_size", size), seed, shuffle=shuffle and split in TRAIN_NAMES,
                       drop_last=drop_last or fixed)  # fmt: skip
    return DeviceLoader(BatchLoader(rows, order, make, manager.fingerprint), place, prefetch)


def _prepared(
    tokenizer: PreTrainedTokenizerBase, dataset_config: DatasetConfig, split: str, context_length: int | None
) -> tuple[SingleRows | PackedRows, QEffDataManager]:
    settings = custom_settings(dataset_config.own)
    if split not in (*TRAIN_NAMES, *EVAL_NAMES, settings.train_split, settings.test_split):
        raise OptionError(
            f"split must be 'train' or a name of evaluation rows ({', '.join(EVAL_NAMES)}), got {short(split)}."
            f"{did_you_mean(str(split), (*TRAIN_NAMES, *EVAL_NAMES))}"
        )
    manager = QEffDataManager(dataset_config.config(tokenizer, context_length), tokenizer)
    if manager.config.streaming:
        raise OptionError("these functions give rows by number, which a stream has not: use QEffDataManager for it.")
    train, evaluation = manager.prepare_dataset()
    assert not isinstance(train, StreamRows)
    if split in (*TRAIN_NAMES, settings.train_split):
        return train, manager
    if evaluation is None:
        raise OptionError(f"the data has no rows for evaluation, which split={split!r} asks for: lower train_frac.")
    return evaluation, manager


def _placing(device: str) -> tuple[Callable[[Batch], Mapping[str, Any]], bool]:
    """What puts a batch on a device, and whether all batches have one shape there."""
    if device in _CUDA:
        import torch

        if not torch.cuda.is_available():
            raise TargetUnavailableError(
                f"torch finds no CUDA device for target_device={device!r}: use 'host', or install torch for CUDA."
            )

        def pinned(batch: Batch) -> Mapping[str, Any]:
            return {
                name: torch.from_numpy(array).pin_memory().to("cuda", non_blocking=True)
                for name, array in batch.items()
            }

        return pinned, False
    target = get_target(device)
    return lambda batch: {name: np.ascontiguousarray(array) for name, array in batch.items()}, target.name != "host"


def _full(batch: Batch, length: int, pad_token_id: int) -> Batch:
    """A batch padded to ``length``, which no row of it exceeds."""
    rows = _rows_of(batch, len(batch["input_ids"]))
    return collate(rows, pad_token_id=pad_token_id, pad_to_length=length)


def _rows_of(batch: Mapping[str, np.ndarray], count: int) -> list[dict[str, np.ndarray]]:
    return [{name: array[index] for name, array in batch.items()} for index in range(count)]

"""Rows of different length become one batch of arrays, as the compiled step takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from QEfficient.errors import InputError
from QEfficient.finetune.data.pairs import JUDGED, PREFERENCE
from QEfficient.finetune.data.token_rows import IGNORE
from QEfficient.finetune.keywords import short

#: name -> array; see ``collate``.
Batch = dict[str, np.ndarray]

#: What a teacher says of every token.
_TEACHER = ("teacher_ids", "teacher_logprobs")
_NONE = np.zeros(0)


def collate(
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int = 0,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
    pad_to_length: int | None = None,
) -> Batch:
    """Pads rows to one length.

    Args:
        rows: each with ``input_ids`` ``[L]``, ``labels`` ``[L]`` (-100 or the token at the same place; a scalar for
            classification; absent means every token), optionally ``attention_mask`` ``[L]`` (0 padding at an end, k ≥
            1 the k-th segment), ``weights`` ``[L]``, ``teacher_ids`` and ``teacher_logprobs`` ``[L, K]``. Lists, arrays
            or tensors, ``[L]`` or ``[1, L]``. Or pairs of such rows, as `PairRows` gives them.
        pad_token_id: any id; what is there is never attended to nor trained.
        padding_side: ``"right"`` or ``"left"``.
        pad_to_multiple_of: the batch length is a multiple of this.
        pad_to_length: the batch length is at least this.

    Returns:
        Contiguous arrays ``[B, S]``: ``input_ids`` int64; ``attention_mask`` int64, 0 on padding and k on the k-th
        segment; ``position_ids`` int64, from 0 in every segment, 0 on padding; ``labels`` int64, -100 on what is not
        trained and on the first token of every segment; ``weights`` float32 if a row has them. For classification
        ``labels`` is int64 ``[B]``. Teachers' arrays are ``[B, S, K]``. Of n pairs the first rows come first, then the
        second ones, ``B`` = 2n; what else a pair has is stacked ``[n, …]``.

    Raises:
        InputError: no rows, rows whose arrays disagree in length, or padding between real tokens.
    """
    if not len(rows):
        raise InputError("There are no rows to make a batch of: pass at least one.")
    if padding_side not in ("right", "left"):
        raise InputError(f"padding_side must be 'right' or 'left', got {short(padding_side)}.")
    stacked: Batch = {}
    if names := _pair_names(rows[0]):
        others = [name for name in rows[0] if name not in names]
        stacked = {name: np.stack([np.asarray(row[name]) for row in rows]) for name in others}
        rows = [row[name] for name in names for row in rows]
    parts = [_row(row, number) for number, row in enumerate(rows, start=1)]
    scalar = [part["labels"].ndim == 0 for part in parts]
    if len(set(scalar)) > 1:
        raise InputError("Some rows of the batch have one class and others a label per token: do not mix them.")
    length = max(max(part["input_ids"].size for part in parts), pad_to_length or 1)
    if pad_to_multiple_of:
        length += -length % pad_to_multiple_of
    fill = {"input_ids": pad_token_id, "labels": IGNORE}
    columns = ["input_ids", "attention_mask", "position_ids"]
    columns += [] if scalar[0] else ["labels"]
    columns += ["weights"] if any("weights" in part for part in parts) else []
    columns += [name for name in _TEACHER if name in parts[0]]
    batch: Batch = dict(stacked)
    for name in columns:
        kind = np.float32 if name in ("weights", "teacher_logprobs") else np.int64
        batch[name] = np.full((len(parts), length, *parts[0].get(name, _NONE).shape[1:]), fill.get(name, 0), kind)
        for index, part in enumerate(parts):
            values = part[name] if name in part else (part["labels"] != IGNORE)
            place = slice(0, len(values)) if padding_side == "right" else slice(length - len(values), length)
            batch[name][index, place] = values
    if scalar[0]:
        batch["labels"] = np.array([part["labels"] for part in parts], np.int64)
    return batch


def _pair_names(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """What the two rows of a pair are called; None for a plain row."""
    return next((names for names in (PREFERENCE, JUDGED) if names[0] in row), None)


def without_labels(item: Mapping[str, Any]) -> dict[str, Any]:
    """A row, or a pair, that fills a place in a batch and trains nothing: the same tokens, every label masked."""
    if names := _pair_names(item):
        return {**item, **{name: without_labels(item[name]) for name in names}}
    return {**item, "labels": np.full_like(item["labels"], IGNORE)}


def _row(row: Mapping[str, Any], number: int) -> Batch:
    """One row's arrays, without its padding, with positions, and with the first label of every segment masked."""
    ids = _vector("input_ids", row["input_ids"], number)
    segments = np.ones(ids.size, np.int64)
    if row.get("attention_mask") is not None:
        segments = _vector("attention_mask", row["attention_mask"], number, ids.size)
    labels = row.get("labels")
    labels = ids.copy() if labels is None else _labels(labels, number, ids.size)
    weights = row.get("weights")
    if weights is not None:
        weights = np.asarray(weights, np.float32).reshape(-1)
        if weights.size != ids.size:
            raise InputError(f"Row {number} of the batch has {weights.size} weights and {ids.size} tokens.")
    real = np.flatnonzero(segments)
    if not real.size:
        raise InputError(f"Row {number} of the batch has no token that is not padding.")
    keep = slice(real[0], real[-1] + 1)
    segments = segments[keep]
    # Segments follow each other: 1, 1, 2, 2, 2, …; anything else is padding in the middle or a jumbled mask.
    steps = np.diff(segments, prepend=0)
    if segments[0] != 1 or not np.isin(steps, (0, 1)).all():
        raise InputError(
            f"Row {number} of the batch has an attention_mask that is not 1 … 1 2 … 2 between padding at the ends."
        )
    starts = np.flatnonzero(steps)
    positions = np.arange(segments.size) - np.repeat(starts, np.diff(starts, append=segments.size))
    found = {"input_ids": ids[keep], "attention_mask": segments, "position_ids": positions, "labels": labels}
    if labels.ndim:
        labels = labels[keep].copy()
        labels[starts] = IGNORE
        found["labels"] = labels
    if weights is not None:
        found["weights"] = np.where(found["labels"] == IGNORE, 0, weights[keep])
    for name in _TEACHER:
        if name in row:
            found[name] = np.asarray(row[name])[keep]
    return found


def _labels(value: Any, number: int, size: int) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(np.int64) if array.ndim == 0 else _vector("labels", value, number, size)


def _vector(name: str, value: Any, number: int, size: int | None = None) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1 or array.dtype.kind not in "iub" or not array.size:
        raise InputError(f"{name} of row {number} of the batch must be integers [L], got {short(value)}.")
    if size is not None and array.size != size:
        raise InputError(f"{name} of row {number} of the batch has {array.size} values for {size} tokens.")
    return array.astype(np.int64)

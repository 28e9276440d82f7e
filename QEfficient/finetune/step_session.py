"""Runs a training package on batches; needs numpy and onnxruntime only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from QEfficient.engine.package import verify_files
from QEfficient.errors import InputError, OutOfMemoryError, PackageError, ShapeError, TrainingError
from QEfficient.targets.base import card_settings
from QEfficient.targets.manifest import Manifest
from QEfficient.targets.registry import get_target

#: HF's label of a position that is not trained.
IGNORED = -100
GRADIENT = "grad/"


@dataclass(frozen=True)
class StepResult:
    """What one call gives.

    Attributes:
        loss: minus the weighted sum of log-probabilities (plus the distillation term).
        logprobs: float32 [batch, seq], log p of each trained label at the label's own column, 0 elsewhere; for a
            classifier float32 [batch, classes], the logits.
        gradients: file name of a trained tensor -> float32 gradient of ``loss``. Views of buffers that the next call
            overwrites: copy what must stay. Empty for an evaluation package.
        trained_tokens: labels that counted.
    """

    loss: float
    logprobs: np.ndarray
    gradients: dict[str, np.ndarray]
    trained_tokens: int


class StepSession:
    """A loaded training or evaluation package."""

    def __init__(
        self,
        directory: str | Path,
        *,
        verify: bool = True,
        threads: int | None = None,
        device_ids: Sequence[int] | None = None,
    ) -> None:
        """Opens a package made by `build_step`.

        Args:
            device_ids: cards to load it on, as in `QEfficient.load`.

        Raises:
            PackageError: not a package, damaged, or not a training step.
            TargetUnavailableError: it needs an SDK or a device that is not here.
            OptionError: device ids that do not fit the package, or for one that runs on the host.
        """
        self.directory = Path(directory)
        self.manifest = Manifest.load(self.directory)
        verify_files(self.directory, self.manifest, digests=verify)
        if self.manifest.task != "training":
            raise PackageError(f"{directory} does {self.manifest.task!r}, it is not a training step.")
        self._session = get_target(self.manifest.target).load(
            self.directory, self.manifest, threads=threads, card=card_settings(device_ids)
        )
        #: Set anew before every call where the program does not read the arrays in place.
        self._sent: dict[str, np.ndarray] = {}
        self._inputs = {spec.name: spec for spec in self.manifest.inputs}
        self.is_classifier = "labels" in self._inputs
        self.teacher_top = next((int(s.shape[1]) for s in self.manifest.inputs if s.name == "teacher_ids"), 0)
        self._spec = self.manifest.specializations[0].name
        facts = self.manifest.model
        self._vocabulary: int | None = facts.get("vocab_size")
        self._classes: int | None = len(facts["labels"]) if facts.get("labels") else None

    def set_parameters(self, values: Mapping[str, np.ndarray]) -> None:
        """Sets trained tensors (and ``lora_scaling``) by file name; arrays are read in place at every call."""
        self._session.set_parameters(values)
        if self.manifest.target != "host":
            self._sent |= values

    def run(self, batch: Mapping[str, np.ndarray], normaliser: float | None = None) -> StepResult:
        """One forward (and backward) pass.

        Args:
            batch: ``input_ids`` [batch, seq]; ``labels`` [batch, seq] (-100 = not trained; the label at column t is
                the token at t) or [batch] for a classifier; optional ``attention_mask`` (0 = padding, k >= 1 = k-th
                packed segment), ``position_ids``, ``weights`` (of log p of each label, shaped as ``labels``) and,
                for distillation, ``teacher_ids``, ``teacher_logprobs`` [batch, seq, K], ``teacher_weights``
                [batch, seq], aligned with ``labels``.
            normaliser: weights are divided by it; None without ``weights`` divides by the number of trained labels,
                which makes the loss their mean.

        Raises:
            InputError: a wrong shape or dtype, or every label is masked and no weights say that is meant.
            ShapeError: larger than the package was compiled for.
            TrainingError: not enough memory.
        """
        ids = _integers(batch, "input_ids", 2)
        mask = _integers(batch, "attention_mask", 2, np.ones_like(ids))
        positions = _integers(batch, "position_ids", 2, None) if "position_ids" in batch else positions_of(mask)
        if mask.shape != ids.shape or positions.shape != ids.shape:
            raise InputError(f"attention_mask {mask.shape} and position_ids must have input_ids' shape {ids.shape}.")
        # What stands on padding is never read, but the graph looks it up.
        ids = np.where(mask != 0, ids, 0)
        _in_range("input_ids", ids, self._vocabulary)
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if self.is_classifier:
            return self._run_classifier(feeds, batch, normaliser)
        return self._run_tokens(feeds, batch, normaliser)

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the two kinds

    def _run_classifier(
        self, feeds: dict[str, np.ndarray], batch: Mapping[str, np.ndarray], normaliser: float | None
    ) -> StepResult:
        labels = _integers(batch, "labels", 1)
        counted = labels != IGNORED
        weights = _weights(batch, counted, normaliser)
        if labels.shape[0] != feeds["input_ids"].shape[0]:
            raise InputError(f"there are {labels.shape[0]} labels for {feeds['input_ids'].shape[0]} rows.")
        feeds["labels"] = np.where(counted, labels, 0)
        _in_range("labels", feeds["labels"], self._classes)
        feeds["weights"] = np.where(counted, weights, 0).astype(np.float32)
        outputs = self._call(feeds)
        return StepResult(
            float(outputs["loss"]), outputs["logits"].copy(), self._gradients(outputs), int(counted.sum())
        )

    def _run_tokens(
        self, feeds: dict[str, np.ndarray], batch: Mapping[str, np.ndarray], normaliser: float | None
    ) -> StepResult:
        labels, mask = _integers(batch, "labels", 2), feeds["attention_mask"]
        if labels.shape != mask.shape:
            raise InputError(f"labels have shape {labels.shape}, not input_ids' {mask.shape}.")
        counted = trained_places(labels, mask)
        weights = _weights(batch, counted, normaliser)
        if self.teacher_top and "teacher_weights" in batch:
            counted = counted | (predicted_places(mask) & (np.asarray(batch["teacher_weights"]) != 0))
        row, column = np.nonzero(counted)
        empty = row.size == 0
        if empty:  # a graph needs one row; its weight of 0 adds nothing
            row, column = np.zeros(1, np.int64), np.ones(1, np.int64)
        places = row * mask.shape[1] + column - 1
        chosen = labels[row, column] if mask.shape[1] > 1 else np.zeros(1, np.int64)
        trained = chosen != IGNORED
        feeds["rows"] = places.astype(np.int64)
        feeds["row_labels"] = np.where(trained, chosen, 0)
        _in_range("labels", feeds["row_labels"], self._vocabulary)
        own = weights[row, column] if not empty else np.zeros(1)
        feeds["row_weights"] = np.where(trained, own, 0).astype(np.float32)
        if self.teacher_top:
            self._teach(feeds, batch, row, column, empty)
        elif "teacher_ids" in batch:
            raise InputError("this step has no inputs for a teacher: build it with teacher_top.")
        outputs = self._call(feeds)
        logprobs = np.zeros(mask.shape, np.float32)
        if not empty:
            logprobs[row, column] = np.where(trained, outputs["token_logprobs"][: row.size], 0)
        return StepResult(
            float(outputs["loss"]), logprobs, self._gradients(outputs), 0 if empty else int(trained.sum())
        )

    def _teach(
        self,
        feeds: dict[str, np.ndarray],
        batch: Mapping[str, np.ndarray],
        row: np.ndarray,
        column: np.ndarray,
        empty: bool,
    ) -> None:
        wide = (*feeds["input_ids"].shape, self.teacher_top)
        if "teacher_ids" not in batch or empty:
            feeds["teacher_ids"] = np.zeros((row.size, self.teacher_top), np.int64)
            feeds["teacher_logprobs"] = np.zeros((row.size, self.teacher_top), np.float32)
            feeds["teacher_weights"] = np.zeros(row.size, np.float32)
            return
        if "teacher_logprobs" not in batch:
            raise InputError("teacher_ids need teacher_logprobs beside them.")
        ids, logprobs = np.asarray(batch["teacher_ids"]), np.asarray(batch["teacher_logprobs"])
        if ids.shape != wide or logprobs.shape != wide:
            raise InputError(f"teacher_ids and teacher_logprobs must have shape {wide}, got {ids.shape}.")
        feeds["teacher_ids"] = np.ascontiguousarray(ids[row, column], np.int64)
        _in_range("teacher_ids", feeds["teacher_ids"], self._vocabulary)
        feeds["teacher_logprobs"] = np.ascontiguousarray(logprobs[row, column], np.float32)
        given = np.asarray(batch.get("teacher_weights", np.ones(ids.shape[:2])))
        feeds["teacher_weights"] = np.ascontiguousarray(given[row, column], np.float32)

    def _call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        limits = self.manifest.specializations[0].symbols
        for name, size in zip(("batch_size", "seq_len"), feeds["input_ids"].shape, strict=True):
            if name in limits and not limits[name].accepts(size):
                raise ShapeError(f"{name}={size} does not fit the package, which takes {limits[name]}.")
        wanted = {name: self._filled(name, array) for name, array in feeds.items() if name in self._inputs}
        if self._sent:
            self._session.set_parameters(self._sent)
        try:
            return self._session.run(wanted, self._spec)
        except OutOfMemoryError:
            rows, length = feeds["input_ids"].shape
            raise TrainingError(
                f"there is not enough memory for a step of {rows} rows of {length} tokens: lower batch_size or "
                "max_ctx_len, or set recompute=True or base_weights='int4'."
            ) from None

    def _filled(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array with rows of weight 0 up to the number of rows a program was compiled for, where it is exact."""
        rows = self.manifest.specializations[0].symbols.get("rows")
        if rows is None or self._inputs[name].shape[0] != "rows":
            return array
        missing = (rows.pad_to(len(array)) or len(array)) - len(array)
        return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)]) if missing else array

    @staticmethod
    def _gradients(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n.removeprefix(GRADIENT): array for n, array in outputs.items() if n.startswith(GRADIENT)}


def predicted_places(segments: np.ndarray) -> np.ndarray:
    """bool [batch, seq]: columns whose token follows a token of the same segment, so that it can be predicted."""
    places = np.zeros(segments.shape, bool)
    places[:, 1:] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return places


def trained_places(labels: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """bool [batch, seq]: labels that count. The first token of a segment has nothing before it and never does."""
    return (labels != IGNORED) & predicted_places(segments)


def positions_of(segments: np.ndarray) -> np.ndarray:
    """int64 [batch, seq]: positions that start at 0 in every segment; 0 on padding."""
    columns = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    return np.ascontiguousarray(np.where(segments != 0, columns - starts, 0), dtype=np.int64)


def _in_range(name: str, values: np.ndarray, limit: int | None) -> None:
    """Raises InputError where an index does not exist; ``limit`` None means not known."""
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or (limit is not None and high >= limit):
        bound = "" if limit is None else f" and below {limit}"
        raise InputError(f"{name} must be at least 0{bound}, got {low if low < 0 else high}.")


def _weights(batch: Mapping[str, np.ndarray], counted: np.ndarray, normaliser: float | None) -> np.ndarray:
    if normaliser is not None and not 0 < normaliser < np.inf:
        raise InputError(f"normaliser must be a number above 0, got {normaliser}.")
    given = batch.get("weights")
    if given is None:
        count = int(counted.sum())
        if normaliser is None:
            if count == 0:
                raise InputError("every label of this batch is masked (-100): there is nothing to train on.")
            normaliser = count
        return np.full(counted.shape, 1.0 / normaliser)
    weights = np.asarray(given)
    if weights.shape != counted.shape or weights.dtype.kind != "f":
        raise InputError(f"weights must be floats of the labels' shape {counted.shape}, got {weights.shape}.")
    if not np.isfinite(weights).all():
        raise InputError("weights hold NaN or infinity.")
    return weights if normaliser is None else weights / normaliser


def _integers(batch: Mapping[str, np.ndarray], name: str, rank: int, default: np.ndarray | None = None) -> np.ndarray:
    value = batch.get(name, default)
    if value is None:
        raise InputError(f"the batch has no {name!r}; it has {sorted(batch)}.")
    array = np.asarray(value)
    if array.dtype.kind not in "iub" or array.ndim != rank:
        raise InputError(f"{name} must be whole numbers of rank {rank}, got {array.dtype} {array.shape}.")
    if array.size == 0:
        raise InputError(f"{name} is empty.")
    return np.ascontiguousarray(array, dtype=np.int64)

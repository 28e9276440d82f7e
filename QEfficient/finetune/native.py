"""Training without torch: a kit of compiled packages, driven by numpy and ONNX Runtime alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from QEfficient.errors import InputError, PackageError, TrainingError
from QEfficient.finetune.onnx_optimizer import OnnxAdamW
from QEfficient.finetune.step_session import StepSession, trained_places
from QEfficient.safetensors_io import SafetensorsWriter, read_header
from QEfficient.store.files import sync_tree

#: Files of a kit.
TRAIN, EVALUATE, OPTIMIZER, START = "train", "eval", "optimizer.onnx", "start"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
_SCALING = "lora_scaling"
_STATE = "optimizer.safetensors"


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: mean loss over its trained tokens, gradient norm before clipping, trained tokens."""

    loss: float
    grad_norm: float
    trained_tokens: int


class PackageTrainer:
    """Trains a kit that `CompiledStep.save_kit` wrote; needs neither torch nor transformers.

    Args:
        kit: the directory.
        weight_decay, no_decay, max_norm: as `OnnxAdamW`; ``no_decay`` takes file names of tensors.
        threads: of the step; None uses every core.

    Raises:
        PackageError: not a kit, incomplete or damaged.

    Example:
        >>> trainer = PackageTrainer("kit", max_norm=1.0)
        >>> for batch in batches:  # dicts of int64 arrays: input_ids, attention_mask, labels
        ...     report = trainer.step([batch], lr=1e-4)
        >>> trainer.save("tuned")
    """

    def __init__(
        self,
        kit: str | Path,
        *,
        weight_decay: float = 0.0,
        no_decay: Collection[str] = (),
        max_norm: float = 0.0,
        threads: int | None = None,
    ) -> None:
        self.directory = Path(kit)
        for name in (TRAIN, OPTIMIZER, START):
            if not (self.directory / name).exists():
                raise PackageError(f"{kit} has no {name}: it is not a training kit written by CompiledStep.save_kit.")
        self._threads = threads
        self._session = StepSession(self.directory / TRAIN, threads=threads)
        values = _read(_weights_in(self.directory / START))
        wanted = {spec.name: spec.shape for spec in self._session.manifest.parameters}
        for name, shape in wanted.items():
            if name not in values or values[name].shape != shape:
                raise PackageError(f"{self.directory / START} lacks {name} {shape}: the kit is incomplete.")
        self._scaling = {name: values.pop(name) for name in (_SCALING,) if name in values}
        self.optimizer = OnnxAdamW(
            self.directory / OPTIMIZER,
            {name: values[name] for name in wanted if name in values},
            weight_decay=weight_decay,
            no_decay=no_decay,
            max_norm=max_norm,
            threads=threads or 1,
        )
        self._session.set_parameters({**self.optimizer.parameters, **self._scaling})
        self._evaluate: StepSession | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self.optimizer.steps

    def step(self, batches: Sequence[Mapping[str, np.ndarray]], lr: float) -> StepReport:
        """One optimizer step over micro-batches, each weighted by its trained tokens.

        Raises:
            InputError: no batch, or every label is masked.
            TrainingError: the loss or the gradient norm is not finite; nothing was changed.
        """
        if isinstance(batches, Mapping) or not batches:
            raise InputError("step takes a list of at least one batch.")
        total = sum(self._trained(batch) for batch in batches)
        if total == 0:
            raise InputError("every label of this optimizer step is masked (-100): there is nothing to train on.")
        for gradient in self.optimizer.gradients.values():
            gradient.fill(0)
        loss = 0.0
        for batch in batches:
            result = self._session.run(batch, float(total))
            loss += result.loss
            for name, gradient in result.gradients.items():
                self.optimizer.gradients[name] += gradient
        if not np.isfinite(loss):
            raise TrainingError(f"the loss became {loss} after step {self.steps}: lower the learning rate.")
        return StepReport(loss, self.optimizer.step(self.optimizer.gradients, lr), total)

    def evaluate(self, batches: Iterable[Mapping[str, np.ndarray]]) -> float:
        """Mean loss over the trained tokens of all batches; runs no backward pass.

        Raises:
            InputError: no label counts. PackageError: the kit has no evaluation package.
        """
        if self._evaluate is None:
            self._evaluate = StepSession(self.directory / EVALUATE, threads=self._threads)
        self._evaluate.set_parameters({**self.optimizer.parameters, **self._scaling})
        loss, tokens = 0.0, 0
        for batch in batches:
            result = self._evaluate.run(batch, 1.0)
            loss, tokens = loss + result.loss, tokens + result.trained_tokens
        if tokens == 0:
            raise InputError("every label of the evaluation batches is masked: there is nothing to measure.")
        return loss / tokens

    def save(self, directory: str | Path) -> Path:
        """Writes the tuned tensors as they began: a PEFT adapter, or ``model.safetensors``; whole or not at all."""
        return self._publish(Path(directory), state=False)

    def save_checkpoint(self, directory: str | Path) -> Path:
        """Writes tensors, moments and the number of steps, so that `load_checkpoint` continues to the same bits."""
        return self._publish(Path(directory), state=True)

    def load_checkpoint(self, directory: str | Path) -> None:
        """Continues from `save_checkpoint`.

        Raises:
            PackageError: not such a directory. InputError: of another set of trained tensors.
        """
        place = Path(directory)
        if not (place / _STATE).is_file():
            raise PackageError(f"{directory} has no {_STATE}: it is not a checkpoint.")
        values = _read(_weights_in(place))
        for name, view in self.optimizer.parameters.items():
            if name not in values or values[name].shape != view.shape:
                raise InputError(f"{directory} is of another model or adapter: it lacks {name} {view.shape}.")
        self.optimizer.load_state_dict(_read(place / _STATE))
        for name, view in self.optimizer.parameters.items():
            view[...] = values[name]

    def close(self) -> None:
        """Frees the sessions' memory."""
        self._session.close()
        if self._evaluate is not None:
            self._evaluate.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _trained(self, batch: Mapping[str, np.ndarray]) -> int:
        labels = np.asarray(batch["labels"])
        if self._session.is_classifier:
            return int((labels != -100).sum())
        mask = np.asarray(batch.get("attention_mask", np.ones(labels.shape, np.int64)))
        return int(trained_places(labels, mask).sum())

    def _publish(self, directory: Path, *, state: bool) -> Path:
        if directory.exists() and any(directory.iterdir()) and not (directory / _STATE).is_file():
            raise PackageError(f"{directory} exists and is not empty: choose a new directory.")
        place = directory.with_name(f".saving-{directory.name}")
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.directory / START, place)
        weights = _weights_in(place)
        weights.unlink()
        kept = self._scaling if state else {}
        _write({**self.optimizer.parameters, **kept}, weights)
        if state:
            _write(self.optimizer.state_dict(), place / _STATE)
        sync_tree(place)
        if directory.exists():
            shutil.rmtree(directory)
        place.replace(directory)
        return directory


def write_kit(
    directory: Path,
    packages: Mapping[str, Path],
    tensors: Mapping[str, np.ndarray],
    adapter_config: dict[str, object] | None,
) -> None:
    """Writes the start values of a kit beside copies of its packages; ``directory`` is empty."""
    from QEfficient.store.copy import copy_tree

    for name, package in packages.items():
        copy_tree(package, directory / name)
    start = directory / START
    start.mkdir()
    _write(tensors, start / WEIGHTS[0 if adapter_config is not None else 1])
    if adapter_config is not None:
        text = json.dumps(adapter_config, indent=2, sort_keys=True, default=str) + "\n"
        (start / "adapter_config.json").write_text(text, encoding="utf-8")


def _weights_in(directory: Path) -> Path:
    for name in WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    raise PackageError(f"{directory} has neither {WEIGHTS[0]} nor {WEIGHTS[1]}.")


_DTYPES = {"F32": np.float32, "I64": np.int64}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def _read(path: Path) -> dict[str, np.ndarray]:
    found = {}
    with path.open("rb") as file:
        for name, ref in read_header(path).items():
            if ref.dtype not in _DTYPES:
                raise PackageError(f"{path}: {name} is stored as {ref.dtype}, a kit holds float32.")
            file.seek(ref.offset)
            found[name] = np.frombuffer(file.read(ref.length), _DTYPES[ref.dtype]).reshape(ref.shape).copy()
    return found


def _write(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    writer = SafetensorsWriter(path, [(n, _NAMES[a.dtype], a.shape) for n, a in tensors.items()])
    try:
        for name, array in tensors.items():
            writer.write(name, np.ascontiguousarray(array).tobytes())
    finally:
        writer.close()

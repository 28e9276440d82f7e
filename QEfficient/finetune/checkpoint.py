"""Checkpoint directories: trained tensors in the files everyone reads, and what a run must match to continue."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from QEfficient.errors import OptionError, PackageError
from QEfficient.store.files import sync_directory, sync_tree
from QEfficient.suggest import did_you_mean

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = "model.safetensors"
STATE = "trainer_state.json"
RUN = "run.json"
POSITION = "stream_position.json"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes copies of arrays as safetensors in PyTorch's flavour."""
    save_file({name: np.array(array) for name, array in tensors.items()}, path, metadata={"format": "pt"})


def load_tensors(directory: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The trained tensors of a checkpoint, checked against what this run trains.

    Raises:
        OptionError: the checkpoint is of another model, adapter rank or set of trained tensors.
        PackageError: the file is missing or damaged.
    """
    path = directory / (ADAPTER_WEIGHTS if (directory / ADAPTER_WEIGHTS).is_file() else MODEL_WEIGHTS)
    if not path.is_file():
        raise PackageError(f"{directory} has neither {ADAPTER_WEIGHTS} nor {MODEL_WEIGHTS}: it is not a checkpoint.")
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_tensors(directory, shapes, expected)
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise PackageError(f"{path} cannot be read ({error}): resume from an earlier checkpoint.") from None
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise PackageError(f"{name} in {path} holds values that are no numbers: resume from an earlier checkpoint.")
    return tensors


def _check_tensors(
    directory: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        raise OptionError(
            f"{directory} is of another model or adapter: it has no {missing[0]}{did_you_mean(missing[0], found)} "
            "Choose the matching directory or a new output_dir."
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise OptionError(
                f"{directory} is of another model or adapter: {name} has shape {found[name]}, this run trains {shape}."
            )


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; a directory without its state file is not one."""
    if not output_dir.is_dir():
        return []
    found = [(int(m[1]), p) for p in output_dir.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / STATE).is_file()]
    return [path for _, path in sorted(found)]


def staging(output_dir: Path, name: str) -> Path:
    """Where a directory called ``name`` is written before it appears under that name."""
    return output_dir / f".saving-{name}"


def publish(place: Path, final: Path) -> None:
    """Makes a staged directory appear under its name, whole and on disk; replaces an older one of that name."""
    sync_tree(place)
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(place, final)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(output_dir: Path) -> None:
    """Removes what a killed run left half-written."""
    if output_dir.is_dir():
        for path in output_dir.iterdir():
            if path.is_dir() and path.name.startswith((".saving-", ".old-")):
                shutil.rmtree(path, ignore_errors=True)


def resume_point(output_dir: Path, asked: str | bool | None, identity: Mapping[str, Any]) -> Path | None:
    """The checkpoint a run continues from, checked; None when it starts anew.

    Args:
        asked: a checkpoint's path, or True for the latest complete one in ``output_dir``.
        identity: what this run depends on.

    Raises:
        OptionError: there is none, or it is of another model or run.
        PackageError: it is damaged.
    """
    if not asked:
        return None
    if asked is True:
        found = checkpoints(output_dir)
        if not found:
            raise OptionError(
                f"there is no checkpoint in {output_dir} to resume from: leave resume_from_checkpoint out."
            )
        chosen = found[-1]
    else:
        chosen = complete(Path(asked))
    check_same_run(chosen, identity)
    _check_state(chosen)
    return chosen


def complete(checkpoint: Path) -> Path:
    """``checkpoint``; raises OptionError when it is not one, or not whole."""
    if not (checkpoint / STATE).is_file():
        raise OptionError(f"{checkpoint} is not a complete checkpoint: it has no {STATE}.")
    return checkpoint


def _check_state(directory: Path) -> None:
    try:
        step = json.loads((directory / STATE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, TypeError, KeyError):
        step = None
    if not isinstance(step, int):
        raise PackageError(f"{directory / STATE} is damaged: resume from an earlier checkpoint.")
    for name in (OPTIMIZER, SCHEDULER):
        if not (directory / name).is_file():  # transformers would begin with a fresh one and say nothing
            raise PackageError(f"{directory} has no {name}, so the run cannot continue as it was: use another one.")


def check_same_run(directory: Path, identity: Mapping[str, Any], allowed: bool = False) -> None:
    """Compares what a run depends on with what the checkpoint's run had.

    Raises:
        OptionError: something that changes the result differs; the message names it.
    """
    path = directory / RUN
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise PackageError(f"{path} is missing or damaged: resume from an earlier checkpoint.") from None
    for name, value in identity.items():
        if before.get(name) != value and not (allowed and name != "model"):
            what = {"model": "of another model or adapter", "data": "of a run on other data"}.get(
                name, f"of a run with another {name}"
            )
            shown = "" if name in ("model", "data") else f" ({before.get(name)!r}, now {value!r})"
            raise OptionError(f"{directory} is {what}{shown}: use its settings, or a new output_dir.")


def write_run(directory: Path, identity: Mapping[str, Any]) -> None:
    """Notes what a run depends on beside its checkpoint."""
    (directory / RUN).write_text(json.dumps(dict(identity), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_position(directory: Path, position: Mapping[str, Any]) -> None:
    """Notes where a stream of rows was beside its checkpoint."""
    (directory / POSITION).write_text(json.dumps(dict(position), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_position(directory: Path) -> dict[str, Any] | None:
    """What `write_position` wrote; None where there is none.

    Raises:
        PackageError: it is damaged.
    """
    path = directory / POSITION
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    numbers = ("batch", "epoch", "first", "taken")
    if not isinstance(found, dict) or any(type(found.get(name)) is not int or found[name] < 0 for name in numbers):
        raise PackageError(f"{path} is damaged: resume from an earlier checkpoint.")
    return found

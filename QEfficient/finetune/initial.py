"""What trained tensors that come from a checkpoint start as: its values, or a new head as transformers makes one."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from QEfficient.errors import ExportError
from QEfficient.finetune.step_model import is_classifier
from QEfficient.models.source import CheckpointSource
from QEfficient.safetensors_io import TensorRef

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Start:
    """What a tensor starts as: a parameter of the base model (float32), or what ``make`` makes of that."""

    base: str
    make: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if self.make is None else self.make(weight)


def initial_values(
    source: CheckpointSource, factory: str, wanted: Mapping[str, Start], new_head: bool = False
) -> dict[str, torch.Tensor]:
    """The content of tensors that train, float32; weights are read one at a time.

    Args:
        wanted: a name of the caller's -> what it starts as.
        new_head: draw a classifier's head anew, whatever the checkpoint has.

    Raises:
        ExportError: the checkpoint lacks a tensor that is not a classifier's head.
    """
    bare = source.ghost(factory)
    groups: dict[int, list[str]] = {}
    for name, parameter in bare.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    tied = {name: group for group in groups.values() for name in group}
    out: dict[str, torch.Tensor] = {}
    fresh: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        refs = source.weights(bare, Path(scratch))
        for name, start in wanted.items():
            base = start.base
            head = is_head(bare, base)
            found = next((refs[n] for n in tied[base] if n in refs), None)
            if found is not None and not (head and new_head):
                out[name] = start(read_tensor(found).float())
            elif head:
                fresh[name] = base
            else:
                raise ExportError(f"the checkpoint lacks {base}, which should train: it is incomplete.")
    drawn = _draw(bare, fresh.values())
    return out | {name: wanted[name](drawn[base]) for name, base in fresh.items()}


def is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a classifier's parameter is one that a checkpoint of another task has not."""
    inside = name.startswith(f"{model.base_model_prefix}.")
    return is_classifier(model) and (not inside or ".pooler." in name)


def _draw(model: PreTrainedModel, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Values from torch's generator, by the model's own rule for modules that a checkpoint lacks."""
    made: dict[str, nn.Module] = {}
    out = {}
    for name in names:
        place, _, leaf = name.rpartition(".")
        if place not in made:
            made[place] = copy.deepcopy(model.get_submodule(place))  # with storage of its own
            with torch.no_grad():
                model._init_weights(made[place])
        out[name] = made[place].get_parameter(leaf).detach()
    return out


def read_dtype(ref: TensorRef) -> torch.dtype:
    """torch's name for the precision a tensor of floats is stored in."""
    return _DTYPES[ref.dtype]


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """A tensor's content, in the precision it is stored in."""
    with ref.file.open("rb") as file:
        file.seek(ref.offset)
        return torch.frombuffer(bytearray(file.read(ref.length)), dtype=read_dtype(ref)).reshape(ref.shape)

"""LoRA layers in a weightless model: where they go, and the step that takes their scaling as an input."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from QEfficient.errors import UnsupportedModelError
from QEfficient.exporter.adapters import FILE_PREFIX, SCALING_INPUT, base_name, lora_modules, scaling_as_input
from QEfficient.exporter.twins import ghost_parameter
from QEfficient.suggest import did_you_mean
from QEfficient.targets.manifest import TensorSpec
from QEfficient.transforms.pytorch.state import StateLayout
from QEfficient.transforms.pytorch.wrappers import CausalStep

#: PEFT's short form for every linear layer but the head.
ALL_LINEAR = "all-linear"
#: The one adapter of an exported graph; its values come from outside.
_ADAPTER = "default"
_LORA_PART = re.compile(rf"\.(lora_[AB])\.{_ADAPTER}\.")


@dataclass(frozen=True)
class LoraGeometry:
    """Which adapters a graph can hold.

    Attributes:
        rank: the largest rank; smaller ones are padded with zeros.
        modules: full names of modules in the base model (``model.layers.0.self_attn.q_proj``).
        targets: last parts of module names (``q_proj``), as in PEFT's ``target_modules``, or ``all-linear``.
    """

    rank: int
    modules: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> LoraGeometry:
        return cls(body["rank"], tuple(body["modules"]), tuple(body["targets"]))


class AdaptedCausalStep(CausalStep):
    """`CausalStep` whose LoRA layers multiply by the elements of one parameter, ``lora_scaling`` float32 [modules]."""

    def __init__(self, model: PreTrainedModel, layout: StateLayout) -> None:
        super().__init__(model, layout)
        count = len(lora_modules(model))
        self.register_parameter(SCALING_INPUT, nn.Parameter(torch.zeros(count), requires_grad=False))

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        state: list[torch.Tensor],
        batch_index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        with scaling_as_input(self.model, _ADAPTER, getattr(self, SCALING_INPUT)):
            return super().forward(input_ids, position_ids, state, batch_index)


def inject_lora(ghost: PreTrainedModel, geometry: LoraGeometry) -> None:
    """Puts PEFT's own LoRA layers, without storage, around the modules of ``geometry``; ``ghost`` is changed.

    Raises:
        UnsupportedModelError: a name is not a module of the model, or the module is not linear.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = _target_names(ghost, geometry)
    config = LoraConfig(
        r=geometry.rank,
        # A regular expression, which PEFT matches in full: a list would also match other modules' last parts.
        target_modules="|".join(map(re.escape, names)),
        fan_in_fan_out=any(isinstance(ghost.get_submodule(name), Conv1D) for name in names),
    )
    with warnings.catch_warnings():
        # Notes about Conv1D layers and tied heads, which are both handled here.
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, ghost, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    for _, layer in lora_modules(ghost):
        for part in (layer.lora_A, layer.lora_B):
            linear = part.get_submodule(_ADAPTER)
            linear.weight = ghost_parameter(linear.get_parameter("weight"))
    ghost.eval()


def graph_name(name: str) -> str:
    """A parameter of an injected model as the graph calls it: its file key if it is LoRA's, else the checkpoint's."""
    if (match := _LORA_PART.search(name)) is not None:
        return f"{FILE_PREFIX}{name[: match.start()]}.{match[1]}.{name[match.end() :]}"
    return base_name(name)


def lora_specs(ghost: PreTrainedModel) -> tuple[TensorSpec, ...]:
    """The adapter tensors an injected model takes, under their file keys, and the scaling vector."""
    layers = lora_modules(ghost)
    specs = [
        TensorSpec(f"{FILE_PREFIX}{name}.{part}.weight", "float32", tuple(getattr(layer, part)[_ADAPTER].weight.shape))
        for name, layer in layers
        for part in ("lora_A", "lora_B")
    ]
    return (*specs, TensorSpec(SCALING_INPUT, "float32", (len(layers),)))


def _target_names(ghost: PreTrainedModel, geometry: LoraGeometry) -> list[str]:
    """Full names of the modules to adapt, sorted."""
    linear = {name for name, module in ghost.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    everything = {name for name, _ in ghost.named_modules()}
    found: set[str] = set()
    for name in geometry.modules:
        if name not in linear:
            raise UnsupportedModelError(_not_linear(name, name in everything, type(ghost).__name__, linear))
        found.add(name)
    head = ghost.get_output_embeddings()
    for target in geometry.targets:
        if target == ALL_LINEAR:
            matches = {name for name in linear if ghost.get_submodule(name) is not head}
        else:
            matches = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not matches:
            there = any(name.endswith(f".{target}") or name == target for name in everything)
            last_parts = {name.rpartition(".")[2] for name in linear}
            raise UnsupportedModelError(_not_linear(target, there, type(ghost).__name__, last_parts))
        found |= matches
    return sorted(found)


def _not_linear(name: str, exists: bool, model: str, linear: Iterable[str]) -> str:
    if exists:
        return f"the adapter target {name!r} of {model} is not a linear layer: only linear layers can be adapted."
    return (
        f"{model} has no module {name!r} to adapt: was the adapter made for another model?{did_you_mean(name, linear)}"
    )

"""PEFT adapters as an exporter sees them: tensors under their file keys, and LoRA's scaling as one vector."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

#: What `PeftModel` puts before the wrapped model's own names, and so before every key of an adapter file.
FILE_PREFIX = "base_model.model."
#: The graph input that holds every LoRA module's scaling: float32 [number of modules], in the order of `lora_modules`.
SCALING_INPUT = "lora_scaling"
#: Name parts that PEFT inserts between a module and the weights it had before.
_WRAPPED = re.compile(r"\.(?:(?:token_adapter\.)?base_layer|original_module)(?=\.)")


def adapter_parameters(peft_model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of one adapter under their keys in ``adapter_model.safetensors``.

    The parameters are the model's own objects, not copies; ``modules_to_save`` and biases that the adapter trains are
    among them, under the key PEFT saves them with.

    Raises:
        KeyError: the model has no adapter of this name.
    """
    from peft import get_peft_model_state_dict

    if adapter_name not in peft_model.peft_config:  # type: ignore[operator]  # a dict, which nn.Module cannot know
        raise KeyError(f"no adapter {adapter_name!r}; this model has {list(peft_model.peft_config)}")  # type: ignore[arg-type]
    # Parameters instead of a state dict's detached tensors; tied ones keep both names.
    own = dict(peft_model.named_parameters(remove_duplicate=False))
    found = get_peft_model_state_dict(
        peft_model, state_dict=own, adapter_name=adapter_name, save_embedding_layers=False
    )
    return dict(found)


def lora_modules(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """(name, module) of every LoRA layer, sorted by name: the order of the scaling vector.

    Names are those of ``model.named_modules()``; for a `PeftModel` they begin with `FILE_PREFIX`.
    """
    from peft.tuners.lora import LoraLayer

    return sorted(
        ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)),
        key=lambda pair: pair[0],
    )


def adapted_modules(model: nn.Module) -> list[str]:
    """Names of the modules that an adapter of any kind wraps, sorted."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sorted(name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def scaling_vector(peft_model: nn.Module, adapter_name: str = "default") -> np.ndarray:
    """float32 [number of LoRA modules]: what each multiplies its ``B A x`` by; 0 where the adapter has no tensors.

    PEFT computes the numbers, so that ``lora_alpha``, rank, ``use_rslora`` and the patterns are all in them.
    """
    scalings = [float(module.scaling.get(adapter_name, 0.0)) for _, module in lora_modules(peft_model)]
    return np.array(scalings, dtype=np.float32)


@contextlib.contextmanager
def scaling_as_input(model: nn.Module, adapter_name: str, tensor: torch.Tensor) -> Iterator[None]:
    """While open, LoRA module ``i`` of `lora_modules` multiplies by ``tensor[i]``, so that a trace sees an input.

    Args:
        tensor: float [number of LoRA modules].
    """
    changed: list[tuple[LoraLayer, Any]] = []
    try:
        for i, (_, module) in enumerate(lora_modules(model)):
            if adapter_name in module.scaling:
                changed.append((module, module.scaling[adapter_name]))
                module.scaling[adapter_name] = tensor[i]
                if hasattr(module, "get_delta_factors"):
                    vars(module)["get_delta_factors"] = _scaled_factors(module)
                if (dora := dora_layer(module, adapter_name)) is not None and adapter_name in module.lora_A:
                    vars(dora)["get_lora_weight"] = _product
        yield
    finally:
        for module, value in changed:
            module.scaling[adapter_name] = value
            vars(module).pop("get_delta_factors", None)
            if (dora := dora_layer(module, adapter_name)) is not None:
                vars(dora).pop("get_lora_weight", None)


def dora_layer(module: LoraLayer, adapter_name: str) -> Any:
    """What holds a LoRA module's magnitudes where the adapter is DoRA (arXiv:2402.09353), else None."""
    magnitudes = getattr(module, "lora_magnitude_vector", None)
    return magnitudes[adapter_name] if magnitudes is not None and adapter_name in magnitudes else None


def _product(lora_A: nn.Linear, lora_B: nn.Linear, adapter_name: str | None = None) -> torch.Tensor:
    """``B A`` of DoRA: PEFT sends an identity matrix through both, for the sake of FSDP, which a graph would store."""
    return lora_B.weight @ lora_A.weight


def _scaled_factors(module: Any) -> Callable[[str], tuple[torch.Tensor, torch.Tensor, float]]:
    """For stacked experts: PEFT hands the scaling to an operator that takes a Python number only."""
    factors = type(module).get_delta_factors

    def scaled(adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        left, right, scale = factors(module, adapter_name)
        return left * scale, right, 1.0

    return scaled


def base_name(name: str) -> str:
    """A base model's parameter as its checkpoint calls it: ``base_model.model.X.base_layer.weight`` -> ``X.weight``.

    A name without PEFT's parts comes back as it is, so that injected models without the prefix work as well.
    """
    return _WRAPPED.sub("", name.removeprefix(FILE_PREFIX))

"""PEFT models in memory: the base model inside one, its adapters as files, and a reference model made of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraModel, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from transformers import PreTrainedModel

from QEfficient.engine.adapter_file import WEIGHTS_FILE
from QEfficient.engine.adapters import check_name
from QEfficient.errors import UnsupportedModelError
from QEfficient.exporter.adapters import adapter_parameters
from QEfficient.transforms.pytorch.eager import sharing_weights


def without_adapters(peft_model: Any) -> PreTrainedModel:
    """The base model as it was before PEFT wrapped it: a copy of the module tree around the same parameters.

    Raises:
        UnsupportedModelError: not a `PeftModel`, an adapter is merged into the weights, or it is not LoRA.
        OptionError: an adapter has a name that cannot be a directory's.
    """
    if not isinstance(peft_model, PeftModel):
        raise UnsupportedModelError(f"{type(peft_model).__name__} has adapters but is no PeftModel: wrap it with peft.")
    for name, config in peft_model.peft_config.items():
        check_name(name)
        if config.peft_type != PeftType.LORA:
            kind = PeftType(config.peft_type).value
            raise UnsupportedModelError(
                f"the adapter {name!r} is of the kind {kind!r}: only LoRA adapters can be loaded."
            )
    for name, module in peft_model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise UnsupportedModelError(
                f"{name} is trained as a whole (modules_to_save or trainable tokens), which a compiled package has no "
                "inputs for: merge it into the base model with merge_and_unload() instead."
            )
        if isinstance(module, LoraLayer) and module.merged:
            raise UnsupportedModelError(f"an adapter is merged into {name}: call unmerge_adapter() first.")
    twin = sharing_weights(cast(PreTrainedModel, peft_model.get_base_model()))
    for name, module in list(twin.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, module.get_base_layer())
    return twin.eval()


def save_adapters(peft_model: PeftModel, directory: Path) -> dict[str, Path]:
    """Writes every adapter into a directory of its own, as PEFT would, and returns where: name -> directory."""
    places = {}
    for name, config in peft_model.peft_config.items():
        places[name] = directory / name
        places[name].mkdir(parents=True)
        tensors = {k: p.detach().to("cpu").contiguous() for k, p in adapter_parameters(peft_model, name).items()}
        save_file(tensors, places[name] / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(places[name]))
    return places


def active_adapter(peft_model: PeftModel) -> str | None:
    """The name of the active adapter, None when adapters are disabled.

    Raises:
        UnsupportedModelError: several are active at once.
    """
    status = peft_model.get_model_status()
    if status.enabled is False:
        return None
    if len(status.active_adapters) > 1:
        raise UnsupportedModelError(
            f"{len(status.active_adapters)} adapters are active at once: combine them with add_weighted_adapter() or "
            "activate one with set_adapter()."
        )
    return status.active_adapters[0] if status.active_adapters else None


def reference(base: PreTrainedModel, adapters: Mapping[str, Path], active: str | None) -> Any:
    """Hugging Face and PEFT's own model of a base model and adapter directories; ``base`` is not changed."""
    if not adapters:
        return base
    model: PeftModel | None = None
    for name, directory in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(sharing_weights(base), str(directory), adapter_name=name)
        else:
            model.load_adapter(str(directory), adapter_name=name)
    assert model is not None
    if active is None:
        cast(LoraModel, model.base_model).disable_adapter_layers()
    else:
        model.set_adapter(active)
    return model.eval()

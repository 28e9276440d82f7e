"""Installs our mask, attention, experts and scans in transformers for the duration of one trace, and takes them out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from QEfficient.transforms.pytorch.attention import attention_function
from QEfficient.transforms.pytorch.mask import additive_mask, boolean_mask
from QEfficient.transforms.pytorch.scans import SCANS

#: The name under which transformers finds our functions.
NAME = "qeff"


@contextlib.contextmanager
def registered(attention: Any, mask: Any, eager_mask: Any) -> Iterator[None]:
    """Registers attention and masks. 'eager' and 'sdpa' masks too: models with hard-coded attention ask for those."""
    masks = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    attentions = ALL_ATTENTION_FUNCTIONS._global_mapping
    saved = dict(masks), dict(attentions)
    masks.update({NAME: mask, "sdpa": mask, "eager": eager_mask})
    attentions[NAME] = attention
    try:
        yield
    finally:
        for table, before in zip((masks, attentions), saved, strict=True):
            table.clear()
            table.update(before)


@contextlib.contextmanager
def _scans_replaced(model: torch.nn.Module) -> Iterator[None]:
    """Replaces the recurrences by name: in the modelling modules and on module instances that hold them."""
    modelling = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and ".modeling_" in name
    ]
    undo = []
    for owner in [*modelling, *model.modules()]:
        for name, replacement in SCANS.items():
            if name in vars(owner):
                undo.append((owner, name, vars(owner)[name]))
                object.__setattr__(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in reversed(undo):
            object.__setattr__(owner, name, original)


@contextlib.contextmanager
def patched(model: torch.nn.Module) -> Iterator[None]:
    """All replacements, for the body. ``model`` must own its config (see `use_our_attention`)."""
    with registered(attention_function, boolean_mask, additive_mask), _scans_replaced(model):
        yield


def use_our_attention(model: PreTrainedModel) -> None:
    """Points the model at our functions. Changes ``model.config``: give the model a config of its own first.

    Models that ignore the attention interface keep their own attention and get our mask through the 'eager' entry.
    """
    takes_interface = model._can_set_attn_implementation()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            # The internal attribute: the public one recurses into parts that may not support the interface.
            config._attn_implementation_internal = NAME if takes_interface else "eager"
    if getattr(type(model), "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("grouped_mm")

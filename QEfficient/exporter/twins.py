"""Weightless copies of a model: the ghost that is traced and the meta twin that is probed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

Factory = Any  # an AutoModelFor... class


def ghost_from_config(factory: Factory, config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A float32 model of ``config`` whose parameters have a shape but no storage; buffers are real.

    The config is copied, because preparing a model for export changes it.
    """
    config = copy.deepcopy(config)
    with init_empty_weights(include_buffers=False):
        model = factory.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    memo: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in memo:
                memo[id(parameter)] = ghost_parameter(parameter)
            setattr(module, name, memo[id(parameter)])
    model.tie_weights()
    return model.eval()


def ghost_from_model(model: PreTrainedModel) -> PreTrainedModel:
    """A float32 copy of a model in memory without its parameters; shared parameters stay shared."""
    memo: dict[int, Any] = {id(p): ghost_parameter(p) for p in model.parameters()}
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.float() if buffer.is_floating_point() else buffer.clone()
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        # Modules remember the dtype they were built with and cast to it.
        if isinstance(getattr(module, "dtype", None), torch.dtype) and "dtype" in vars(module):
            vars(module)["dtype"] = torch.float32
    twin.config.dtype = torch.float32
    return twin.eval()


def meta_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the meta device: running it costs no memory and no arithmetic."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
        for p in model.parameters()
    }
    memo |= {id(b): torch.empty(b.shape, dtype=b.dtype, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


def ghost_parameter(parameter: torch.Tensor) -> nn.Parameter:
    """One element of storage, expanded: a real CPU tensor as far as tracing can tell."""
    dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(parameter.shape), requires_grad=False)

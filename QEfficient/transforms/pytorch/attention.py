"""The attention function registered with transformers: one ONNX Attention node where the operator can say it."""

from __future__ import annotations

from typing import Any

import torch

from QEfficient.transforms.pytorch import context, ops


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | torch.Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,  # transformers passes whatever the model's forward received; none of it changes the result
) -> tuple[torch.Tensor, None]:
    """transformers' ``AttentionInterface`` contract: heads-first in, ``[batch, seq, heads, dim]`` out."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if isinstance(scaling, torch.Tensor):
        query, scaling = query * scaling, 1.0
    sinks = s_aux if s_aux is not None else sinks
    if attention_mask is None:
        attention_mask = _default_mask(module, query, key, kwargs.get("is_causal"))
    if sinks is None and position_bias is None and attention_mask.dtype == torch.bool:
        out = ops.attention(query, key, value, attention_mask, float(scaling), float(softcap or 0.0))
    else:
        out = ops.attention_reference(
            query, key, value, attention_mask, float(scaling), softcap or 0.0, sinks, position_bias
        )
    return out.transpose(1, 2).contiguous(), None


def _default_mask(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, is_causal: bool | None
) -> torch.Tensor:
    """For layers that never asked for a mask: causal over the state, or everything visible in an encoder."""
    kv = torch.arange(key.shape[2], device=key.device)
    forward = context.current()
    if forward is not None:
        return kv[None, None, None, :] <= forward.positions[:, None, :, None]
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if causal:
        return (kv[None, :] <= torch.arange(query.shape[2], device=key.device)[:, None])[None, None]
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=key.device).expand(1, 1, 1, key.shape[2])

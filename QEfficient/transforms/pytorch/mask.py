"""The mask functions registered with transformers: the model's own rule, evaluated at every row's real positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from QEfficient.transforms.pytorch import context


def boolean_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,  # transformers' hints for skipping the mask; ours is always explicit
) -> torch.Tensor:
    """transformers' ``AttentionMaskInterface`` contract, ignoring ``q_offset``.

    ``mask_function(batch, head, query position, key position)`` is the model's own rule (causal, sliding, chunked and
    their unions); calling it with true positions lets rows sit anywhere. Without a forward context (encoders) a query
    sees the unpadded keys and always itself, so that rows of pure padding stay finite.

    Returns:
        bool [batch or 1, heads or 1, q_length, kv_length], True = visible.
    """
    forward = context.current()
    keys = torch.arange(kv_length, device=device)[None, None, None, :]
    if forward is not None:
        queries = forward.positions[:, None, :, None]
    else:
        queries = torch.arange(q_length, device=device)[None, None, :, None]
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.arange(1, device=device)[None, :, None, None]
    visible = True if mask_function is None else mask_function(batch, head, queries, keys)
    if not isinstance(visible, torch.Tensor):
        visible = torch.full((1, 1, 1, 1), bool(visible), device=device)
    if forward is None and attention_mask is not None:
        visible = visible & attention_mask.to(torch.bool)[:, None, None, :]
        visible = visible | (queries == keys)
    return visible.expand(batch_size, -1, q_length, kv_length)


def additive_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor:
    """`boolean_mask` as 0 / most negative number, for models whose attention adds the mask to the scores."""
    visible = boolean_mask(*args, **kwargs)
    return torch.where(visible, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)

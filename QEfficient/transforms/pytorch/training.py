"""Attention and mask of a training step: differentiable in basic operators, packed rows kept apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from QEfficient.transforms.pytorch.patching import registered


@dataclass(frozen=True)
class Rows:
    """What tokens of a batch may see of each other.

    Attributes:
        segments: int64 [batch, seq]; 0 = padding, k >= 1 = the k-th sequence packed into the row.
        positions: int64 [batch, seq], starting at 0 in every segment.
    """

    segments: torch.Tensor
    positions: torch.Tensor


_ROWS: ContextVar[Rows | None] = ContextVar("qeff_training_rows", default=None)


@contextlib.contextmanager
def training_forward(rows: Rows) -> Iterator[None]:
    """Makes ``rows`` known to the mask function for the body."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


@contextlib.contextmanager
def training_patches() -> Iterator[None]:
    """Installs the functions below in transformers for the body."""
    with registered(training_attention, training_mask, training_mask):
        yield


def training_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Callable[..., Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **hints: Any,  # transformers' hints for skipping the mask; ours is always explicit
) -> torch.Tensor:
    """transformers' ``AttentionMaskInterface`` contract over segments and positions.

    A query sees the keys of its own segment that the model's rule (causal, sliding, chunked …) allows. Padding sees
    padding, so that no row of the softmax is empty.

    Returns:
        float [batch, 1, q_length, kv_length]: 0 where visible, else the most negative number.
    """
    rows = _ROWS.get()
    if rows is None:
        raise RuntimeError("this module was prepared for a training step: call it through that step")
    queries, keys = rows.positions[:, None, :, None], rows.positions[:, None, None, :]
    visible = rows.segments[:, None, :, None] == rows.segments[:, None, None, :]
    if mask_function is not None:
        batch = torch.arange(batch_size, device=queries.device)[:, None, None, None]
        head = torch.arange(1, device=queries.device)[None, :, None, None]
        rule = mask_function(batch, head, queries, keys)
        if isinstance(rule, torch.Tensor):
            visible = visible & rule
    return torch.where(visible, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def training_attention(
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
    """transformers' ``AttentionInterface`` contract: ``[batch, heads, seq, dim]`` in, ``[batch, seq, heads, dim]`` out.

    Query heads that share a key head are rows of one product, so keys and values are never repeated in memory and
    their gradients are summed by the product itself.
    """
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    shared = heads // groups
    query = query * (width**-0.5 if scaling is None else scaling)
    rows = query.reshape(batch * groups, shared * length, width)
    scores = torch.bmm(rows, key.reshape(batch * groups, keys, width).transpose(1, 2))
    scores = scores.reshape(batch, heads, length, keys)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is None and getattr(module, "is_causal", False):
        attention_mask = training_mask(batch, length, keys, mask_function=_causal)
    if attention_mask is not None:
        scores = scores + attention_mask
    sink = s_aux if s_aux is not None else sinks
    if sink is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        extra = sink.reshape(1, -1, 1, 1).expand(batch, heads, length, 1)
        weights = torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]
    mixed = torch.bmm(
        weights.reshape(batch * groups, shared * length, keys),
        value.reshape(batch * groups, keys, value.shape[-1]),
    )
    return mixed.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


def _causal(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key <= query

"""Custom torch operators that become exactly one ONNX operator each: reference bodies and shape functions."""

from __future__ import annotations

import torch


@torch.library.custom_op("qeff::scatter_nd", mutates_args=())
def scatter_nd(data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """ONNX ``ScatterND``: a copy of ``data`` with ``updates`` written at ``indices`` [..., depth].

    Exported as one node, so a runtime that binds input and output to one buffer writes in place.
    """
    out = data.clone()
    out[tuple(indices.unbind(-1))] = updates
    return out


@scatter_nd.register_fake
def _(data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(data)


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Grouped-query attention without repeating keys and values.

    Args:
        query: [batch, heads, seq, dim]; key: [batch, kv_heads, kv, dim]; value: [batch, kv_heads, kv, dim_v].
        mask: bool (True = visible) or additive float, broadcastable to [batch, heads, seq, kv].
        scale: multiplies the scores; softcap: ``c * tanh(scores / c)`` when not 0 (Gemma 2).
        sinks: [heads] extra logits that take probability but have no value (gpt-oss).
        bias: additive position bias (ALiBi and the like).

    Returns:
        [batch, heads, seq, dim_v] in the dtype of ``value``.
    """
    batch, heads, seq, dim = query.shape
    kv_heads = key.shape[1]
    grouped = (query * scale).reshape(batch, kv_heads, heads // kv_heads * seq, dim)
    scores = (grouped @ key.transpose(2, 3)).reshape(batch, heads, seq, key.shape[2])
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask.dtype == torch.bool:
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    scores = scores.float()
    top = scores.amax(-1, keepdim=True)
    if sinks is None:
        exp = (scores - top).exp()
        probabilities = exp / exp.sum(-1, keepdim=True)
    else:
        sink = sinks.reshape(1, -1, 1, 1).float()
        top = torch.maximum(top, sink)
        exp = (scores - top).exp()
        probabilities = exp / (exp.sum(-1, keepdim=True) + (sink - top).exp())
    out = probabilities.to(value.dtype).reshape(batch, kv_heads, heads // kv_heads * seq, -1) @ value
    return out.reshape(batch, heads, seq, value.shape[3])


@torch.library.custom_op("qeff::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """ONNX ``Attention`` (opset 23) with a boolean mask; see `attention_reference`."""
    return attention_reference(query, key, value, mask, scale, softcap)


@attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], query.shape[2], value.shape[3])

"""State-space and linear-attention recurrences as scans with an initial state.

transformers factors these into module-level functions with one name and argument list across all model files, whose
bodies either need a concrete length or take no initial state. These take both a symbolic length and a state, so one
graph serves prefill, chunks and decode. Padding multiplies the step size by zero, which leaves a state untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from QEfficient.transforms.pytorch import context

Step = Callable[[torch.Tensor, tuple[torch.Tensor, ...]], tuple[torch.Tensor, torch.Tensor]]


def scan(step: Step, initial: torch.Tensor, xs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """``state, y_t = step(state, (x_t, ...))`` over dimension 0; returns (last state, stacked y)."""
    if context.require().loop_scans:
        ys = []
        for t in range(xs[0].shape[0]):
            initial, y = step(initial, tuple(x[t] for x in xs))
            ys.append(y)
        return initial, torch.stack(ys)
    from torch._higher_order_ops.scan import scan as scan_operator

    return scan_operator(step, initial, xs, dim=0)


def _real(dtype: torch.dtype) -> torch.Tensor:
    """[batch, seq]: 1 for tokens, 0 for padding."""
    return context.require().real.to(dtype)


def selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,  # kernel selection hints
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba (Gu & Dao 2023): ``h = exp(dt A) h + dt u B; y = h . C + D u``, gated by ``silu(z)``.

    hidden_states, dt [batch, inner, seq]; A [inner, n]; B, C [batch, n, seq]; state [batch, inner, n].
    """
    u = hidden_states.float()
    size = dt if delta_bias is None else dt + delta_bias.to(dt.dtype).unsqueeze(-1)
    size = (F.softplus(size) if delta_softplus else size).float()
    size = size * _real(size.dtype).unsqueeze(1)

    def step(h: torch.Tensor, x: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        d, du, b, c = x  # [batch, inner] twice, [batch, n] twice
        h = h * torch.exp(d.unsqueeze(-1) * A) + du.unsqueeze(-1) @ b.unsqueeze(-2)
        return h, (h @ c.unsqueeze(-1)).squeeze(-1)

    xs = tuple(x.float().permute(2, 0, 1) for x in (size, size * u, B, C))
    initial = context.require().initial_recurrent_state
    if initial is None:
        raise RuntimeError("the selective scan ran before the cache handed out its recurrent state")
    last, ys = scan(step, initial.float(), xs)
    y = ys.permute(1, 2, 0)
    if D is not None:
        y = y + u * D.unsqueeze(-1)
    if z is not None:
        y = y * F.silu(z)
    y = y.to(hidden_states.dtype)
    return (y, last) if return_last_state else y


def chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,  # kernel selection hints
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2 (Dao & Gu 2024): scalar decay per head. The chunk size only blocks the computation; it is not used.

    hidden_states [batch, seq, heads, dim]; dt [batch, seq, heads]; A [heads]; B, C [batch, seq, groups, n];
    state [batch, heads, dim, n].
    """
    x, heads = hidden_states.float(), hidden_states.shape[2]
    size = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    size = (F.softplus(size) if dt_softplus else size).clamp(*dt_limit).float()
    size = size * _real(size.dtype).unsqueeze(-1)
    groups = B.shape[2]

    def per_head(t: torch.Tensor) -> torch.Tensor:  # [batch, seq, groups, n] -> [seq, batch, heads, n]
        t = t.float().transpose(0, 1).unsqueeze(3)
        return t.expand(-1, -1, -1, heads // groups, -1).flatten(2, 3)

    def step(h: torch.Tensor, xs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        decay, dx, b, c = xs  # [batch, heads], [batch, heads, dim], [batch, heads, n] twice
        h = decay.unsqueeze(-1).unsqueeze(-1) * h + dx.unsqueeze(-1) @ b.unsqueeze(-2)
        return h, (h @ c.unsqueeze(-1)).squeeze(-1)

    xs = (
        (size * A.float()).exp().transpose(0, 1),
        (x * size.unsqueeze(-1)).transpose(0, 1),
        per_head(B),
        per_head(C),
    )
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3])
    last, ys = scan(step, initial_states.float(), xs)
    y = ys.transpose(0, 1)
    if D is not None:
        y = y + x * D.float().unsqueeze(-1)
    y = y.contiguous()
    return (y, last) if return_final_states else y


def gated_delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,  # kernel selection hints
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated delta rule (Yang et al. 2024): ``S = exp(g) S; S = S + k (beta (v - k S)); y = q S / sqrt(d_k)``.

    query, key [batch, seq, heads, d_k]; value [batch, seq, v_heads, d_v]; g, beta [batch, seq, v_heads];
    state [batch, v_heads, d_k, d_v].
    """
    q, k = query.float(), key.float()
    if use_qk_l2norm_in_kernel:
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    share = value.shape[2] // key.shape[2]
    if share != 1:
        q, k = (t.unsqueeze(3).expand(-1, -1, -1, share, -1).flatten(2, 3) for t in (q, k))
    q = q * q.shape[-1] ** -0.5
    real = _real(torch.float32).unsqueeze(-1)
    decay, rate = g.float() * real, beta.float() * real

    def step(s: torch.Tensor, xs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        qt, kt, vt, gt, bt = xs
        s = s * gt.exp().unsqueeze(-1).unsqueeze(-1)
        error = bt.unsqueeze(-1) * (vt - (kt.unsqueeze(-2) @ s).squeeze(-2))
        s = s + kt.unsqueeze(-1) @ error.unsqueeze(-2)
        return s, (qt.unsqueeze(-2) @ s).squeeze(-2)

    if initial_state is None:
        initial_state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], value.shape[3])
    last, ys = scan(step, initial_state.float(), tuple(t.transpose(0, 1) for t in (q, k, value.float(), decay, rate)))
    return ys.transpose(0, 1).contiguous().to(query.dtype), (last if output_final_state else None)


#: transformers' function name -> replacement.
SCANS: dict[str, Callable[..., Any]] = {
    "mamba_selective_scan": selective_scan,
    "mamba2_chunk_scan": chunk_scan,
    "torch_chunk_gated_delta_rule": gated_delta,
    "torch_recurrent_gated_delta_rule": gated_delta,
}

"""What the replaced functions need to know about the forward pass they run in, and transformers does not hand them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class ForwardContext:
    """One forward pass of a causal model over fixed-capacity state.

    Attributes:
        real: bool [batch, seq]; False for padding columns and idle rows.
        positions: int64 [batch, seq], all >= 0. A padding column repeats its row's last real token, so whatever it
            computes equals that token's value and writing it twice changes nothing.
        write_positions: int64 [batch, seq], where K/V go. Idle rows write to the last slot: only a query at the last
            position can see that slot, and such a query's own call overwrites it first.
        rows: int64 [batch], the state row (slot) of each batch row.
        indexed: whether ``rows`` is a permutation chosen by the caller (``batch_index``) instead of 0..batch-1.
        capacity: number of KV slots (``ctx_len``).
        last: int64 [batch, 1], the column of each row's last real token.
        columns: int64 [batch, seq], the column every column takes its token from.
        mixes_columns: layers such as convolutions let a padding column differ from the token it repeats, so keys and
            values must be taken from ``columns`` before they are written.
        loop_scans: run recurrences as Python loops (eager checks) instead of the scan operator (export).
    """

    real: torch.Tensor
    positions: torch.Tensor
    write_positions: torch.Tensor
    rows: torch.Tensor
    indexed: bool
    capacity: int | torch.SymInt
    last: torch.Tensor
    columns: torch.Tensor
    mixes_columns: bool = False
    loop_scans: bool = False
    initial_recurrent_state: torch.Tensor | None = None
    _indices: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def from_positions(
        cls,
        position_ids: torch.Tensor,
        batch_index: torch.Tensor | None,
        capacity: int | torch.SymInt,
        mixes_columns: bool = False,
        loop_scans: bool = False,
    ) -> ForwardContext:
        """Builds the context from ``position_ids`` (-1 = padding or idle) and ``batch_index`` [batch, 1]."""
        batch, seq = position_ids.shape
        real = position_ids >= 0
        last = position_ids.argmax(dim=1, keepdim=True)
        columns = torch.where(real, torch.arange(seq, device=position_ids.device)[None, :], last)
        positions = position_ids.gather(1, columns)
        last_slot: Any = capacity - 1  # may be symbolic, which torch.where takes and its annotation does not say
        write_positions = torch.where(positions < 0, last_slot, positions)
        if batch_index is None:
            rows = torch.arange(batch, device=position_ids.device)
        else:
            rows = batch_index[:, 0]
        return cls(
            real=real,
            positions=positions.clamp(min=0),
            write_positions=write_positions,
            rows=rows,
            indexed=batch_index is not None,
            capacity=capacity,
            last=last,
            columns=columns,
            mixes_columns=mixes_columns,
            loop_scans=loop_scans,
        )

    def scatter_indices(self, heads: int) -> torch.Tensor:
        """int64 [batch, heads, seq, 3]: the (row, head, slot) each new key or value is written to."""
        if heads not in self._indices:
            batch, seq = self.write_positions.shape
            shape = (batch, heads, seq)
            head = torch.arange(heads, device=self.rows.device)
            parts = (self.rows[:, None, None], head[None, :, None], self.write_positions[:, None, :])
            self._indices[heads] = torch.stack([part.expand(shape) for part in parts], dim=-1)
        return self._indices[heads]


_CURRENT: ContextVar[ForwardContext | None] = ContextVar("qeff_forward_context", default=None)


def current() -> ForwardContext | None:
    """The context of the forward pass being run, or None outside one (encoders, plain Hugging Face calls)."""
    return _CURRENT.get()


def require() -> ForwardContext:
    """The current context; RuntimeError outside a forward pass of an exportable module."""
    context = _CURRENT.get()
    if context is None:
        raise RuntimeError("this module was prepared for export: call it through its exportable wrapper")
    return context


@contextlib.contextmanager
def active(context: ForwardContext) -> Iterator[ForwardContext]:
    """Makes ``context`` current for the body."""
    token = _CURRENT.set(context)
    try:
        yield context
    finally:
        _CURRENT.reset(token)

"""Pooling of token embeddings into one vector per row, inside the exported graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean

Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over unpadded tokens; hidden [batch, seq, dim], mask [batch, seq] -> [batch, dim]."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def cls(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The first unpadded token of each row."""
    first = mask.to(torch.int64).argmax(dim=1)
    return hidden.gather(1, first[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)


def maximum(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Largest value per feature over unpadded tokens."""
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(hidden.dtype).min).amax(1)


def last(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last unpadded token of each row, whichever side the padding is on."""
    columns = torch.arange(mask.shape[1], device=mask.device)[None, :]
    index = (columns * (mask != 0)).argmax(dim=1)
    return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)


POOLINGS: dict[str, Pool] = {"mean": mean, "cls": cls, "max": maximum, "last": last}


def resolve(pooling: str | Pool | None) -> Pool | None:
    """The pooling function for a name, a callable ``f(last_hidden_state, attention_mask)``, or None."""
    if pooling is None or callable(pooling):
        return pooling
    if pooling not in POOLINGS:
        raise OptionError(
            f"pooling={pooling!r} is not known; use one of {sorted(POOLINGS)}, a callable, or None."
            f"{did_you_mean(str(pooling), POOLINGS)}"
        )
    return POOLINGS[pooling]

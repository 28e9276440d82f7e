"""The modules that are traced: one forward signature per task, whatever the architecture inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from QEfficient.errors import UnsupportedModelError
from QEfficient.transforms.pytorch import context
from QEfficient.transforms.pytorch.cache import build_cache, read_cache
from QEfficient.transforms.pytorch.state import StateLayout


class CausalStep(nn.Module):
    """One step of a causal LM: prefill, a chunk of it, or one decoded token.

    Inputs: ``input_ids`` and ``position_ids`` int64 [batch, seq] (position -1 = padding or idle row), the state
    tensors, and ``batch_index`` int64 [batch, 1] when rows address slots.
    Padding goes to the right of a row's tokens: layers with recurrent state look at the first column to see whether a
    row begins.
    Outputs: ``logits`` [batch, 1, vocab] of each row's last real token, then the new states.
    """

    def __init__(self, model: PreTrainedModel, layout: StateLayout, loop_scans: bool = False) -> None:
        super().__init__()
        self.model, self.layout, self.loop_scans = model, layout, loop_scans
        parameters = inspect.signature(model.forward).parameters
        # A multimodal wrapper may take position_ids through **kwargs only.
        self.takes_positions = "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        head = model.get_output_embeddings()
        if head is None:
            raise UnsupportedModelError(f"{type(model).__name__} has no language-model head.")
        head.register_forward_pre_hook(_keep_last_token)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        state: list[torch.Tensor],
        batch_index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        tensors = dict(zip(self.layout.tensors, state, strict=True))
        capacity = next((t.shape[s.capacity_dim] for s, t in tensors.items() if s.capacity_dim is not None), 1)
        rows = input_ids.shape[0] if batch_index is None else state[0].shape[0]
        for spec, tensor in tensors.items():  # or every buffer gets symbols of its own
            torch._check(tensor.shape[0] == rows)
            if spec.capacity_dim is not None:
                torch._check(tensor.shape[spec.capacity_dim] == capacity)
        forward = context.ForwardContext.from_positions(
            position_ids, batch_index, capacity, self.layout.mixes_columns, self.loop_scans
        )
        with context.active(forward):
            cache = build_cache(list(self.layout.layers), tensors, capacity)
            arguments = {
                "input_ids": input_ids.gather(1, forward.columns),
                "use_cache": True,
                self.layout.cache_argument: cache,
            }
            if self.takes_positions:
                arguments["position_ids"] = forward.positions
            logits = self.model(**arguments).logits
            return (logits.float(), *read_cache(list(self.layout.layers), cache))


def _keep_last_token(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """Before the LM head: keep each row's last real token, so that the vocabulary product is one row."""
    forward = context.current()
    if forward is None:
        return None
    (hidden,) = args
    return (hidden.gather(1, forward.last[:, :, None].expand(-1, -1, hidden.shape[-1])),)


class Encoder(nn.Module):
    """A model without state: ``input_ids``, ``attention_mask`` [, ``token_type_ids``] -> one output.

    The output is ``[batch, seq, hidden]``, what ``pool(hidden, mask)`` makes of it, or a classifier's
    ``[batch, labels]``.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
        output: str,
    ) -> None:
        super().__init__()
        self.model, self.pool, self.output = model, pool, output
        parameters = inspect.signature(model.forward).parameters
        self.takes_cache = "use_cache" in parameters
        # One kind of token needs no input: RoBERTa and kin name the argument but have a table of one row.
        kinds = getattr(getattr(model, "config", None), "type_vocab_size", 0) or 0
        self.takes_token_types = "token_type_ids" in parameters and kinds > 1
        # A decoder's classification head looks for the last token that is not this one.
        config: Any = getattr(model, "config", None)
        self.pad_id: int | None = config.get_text_config().pad_token_id if output == "logits" and config else None

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.pad_id is not None:  # the mask says what padding is, whatever ids the caller put there
            input_ids = torch.where(attention_mask != 0, input_ids, self.pad_id)
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            arguments["token_type_ids"] = token_type_ids
        if self.takes_cache:
            arguments["use_cache"] = False
        result = self.model(**arguments)
        out = getattr(result, self.output)
        return out if self.pool is None else self.pool(out, attention_mask)

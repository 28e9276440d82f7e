"""The modules that are captured: one forward signature per kind of training step, whatever the model inside."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from QEfficient.errors import UnsupportedModelError
from QEfficient.exporter.adapters import SCALING_INPUT, lora_modules, scaling_as_input
from QEfficient.transforms.pytorch.training import Rows, training_forward


@dataclass(frozen=True)
class StepInput:
    """An input of a step: numpy dtype and the names of its dimensions (ints are fixed)."""

    name: str
    dtype: str
    dims: tuple[str | int, ...]


_TOKENS = ("batch_size", "seq_len")


class TokenStep(nn.Module):
    """Log-probabilities of chosen tokens and their weighted sum; every token-level loss is a choice of weights.

    Inputs: ``input_ids``, ``attention_mask`` (segments: 0 = padding) and ``position_ids`` int64 [batch, seq];
    ``rows`` int64 [rows], places in the flattened batch whose next token is predicted; ``row_labels`` int64 [rows],
    that token; ``row_weights`` float32 [rows]. With ``teacher_top`` = K also ``teacher_ids`` int64 [rows, K],
    ``teacher_logprobs`` float32 [rows, K] and ``teacher_weights`` float32 [rows]. With LoRA also
    ``lora_scaling`` float32 [LoRA modules].

    Outputs: ``loss`` = -sum(row_weights * log p) + sum(teacher_weights * sum_k p_k (log p_k - log q_k)), and
    ``token_logprobs`` [rows]. Only the rows named reach the vocabulary projection.
    """

    outputs = ("token_logprobs",)

    def __init__(self, model: nn.Module, head: nn.Module, adapter: str | None = None, teacher_top: int = 0) -> None:
        super().__init__()
        self.model, self.adapter, self.teacher_top = model, adapter, teacher_top
        self._head = [head]  # in a list: registered as a submodule it would name its weights twice
        parameters = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @property
    def inputs(self) -> tuple[StepInput, ...]:
        tokens = tuple(StepInput(n, "int64", _TOKENS) for n in ("input_ids", "attention_mask", "position_ids"))
        rows: tuple[str | int, ...] = ("rows",)
        own = (
            StepInput("rows", "int64", rows),
            StepInput("row_labels", "int64", rows),
            StepInput("row_weights", "float32", rows),
        )
        wide = (*rows, self.teacher_top)
        teacher = (
            StepInput("teacher_ids", "int64", wide),
            StepInput("teacher_logprobs", "float32", wide),
            StepInput("teacher_weights", "float32", rows),
        )
        return tokens + own + (teacher if self.teacher_top else ()) + _scaling_input(self.model, self.adapter)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        rows: torch.Tensor,
        row_labels: torch.Tensor,
        row_weights: torch.Tensor,
        *more: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The mask function reads the segments; the model itself only needs to know what padding is.
        mask = (attention_mask != 0).long()
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
        if self.takes_positions:
            arguments["position_ids"] = position_ids
        seen = Rows(attention_mask, position_ids)
        with _only_rows(self._head[0], rows), training_forward(seen), _scaled(self.model, self.adapter, more):
            logits = self.model(**arguments).logits.float()
        logits = logits.reshape(-1, logits.shape[-1])
        # Written out, because torch's log_softmax would keep a second matrix of the vocabulary's width.
        normaliser = torch.logsumexp(logits, dim=-1)
        logprobs = logits.gather(1, row_labels[:, None])[:, 0] - normaliser
        loss = -(row_weights * logprobs).sum()
        if self.teacher_top:
            ids, wanted, weights = more[:3]
            student = logits.gather(1, ids) - normaliser[:, None]
            loss = loss + (weights * (wanted.exp() * (wanted - student)).sum(dim=-1)).sum()
        return loss, logprobs.detach()


class ClassificationStep(nn.Module):
    """Cross entropy of a sequence classifier, or the score of a model with one output.

    Inputs: ``input_ids``, ``attention_mask`` int64 [batch, seq] (0 = padding), ``position_ids``, ``labels`` int64
    [batch], ``weights`` float32 [batch]. Outputs: ``loss`` = -sum(weights * log p), ``logits`` [batch, classes]. With
    one class, whose probability is always 1, the weights are of the logit itself: ``loss`` = -sum(weights * logit).
    """

    outputs = ("logits",)

    def __init__(self, model: nn.Module, adapter: str | None = None) -> None:
        super().__init__()
        self.model, self.adapter = model, adapter
        config: Any = getattr(model, "config", None)
        base: Any = model.get_base_model() if adapter is not None else model  # type: ignore[operator]
        parameters = inspect.signature(base.forward).parameters
        self.pad_id: int | None = config.get_text_config().pad_token_id if config is not None else None
        self.takes_cache = "use_cache" in parameters

    @property
    def inputs(self) -> tuple[StepInput, ...]:
        tokens = tuple(StepInput(n, "int64", _TOKENS) for n in ("input_ids", "attention_mask", "position_ids"))
        batch = ("batch_size",)
        own = (StepInput("labels", "int64", batch), StepInput("weights", "float32", batch))
        return tokens + own + _scaling_input(self.model, self.adapter)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        *more: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pad_id is not None:  # a decoder's head looks for the last token that is not this one
            input_ids = torch.where(attention_mask != 0, input_ids, self.pad_id)
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": (attention_mask != 0).long()}
        if self.takes_cache:
            arguments["use_cache"] = False
        with training_forward(Rows(attention_mask, position_ids)), _scaled(self.model, self.adapter, more):
            logits = self.model(**arguments).logits.float()
        scores = logits if logits.shape[-1] == 1 else functional.log_softmax(logits, dim=-1)
        return -(weights * scores.gather(1, labels[:, None])[:, 0]).sum(), logits.detach()


def _scaling_input(model: nn.Module, adapter: str | None) -> tuple[StepInput, ...]:
    count = 0 if adapter is None else len(lora_modules(model))
    return (StepInput(SCALING_INPUT, "float32", (count,)),) if count else ()


def _scaled(model: nn.Module, adapter: str | None, more: tuple[torch.Tensor, ...]) -> Any:
    """LoRA layers multiply by the last input for the body, where there are any."""
    if adapter is None or not _scaling_input(model, adapter):
        return contextlib.nullcontext()
    return scaling_as_input(model, adapter, more[-1])


def output_head(model: nn.Module) -> nn.Module:
    """The module that projects onto the vocabulary.

    Raises:
        UnsupportedModelError: there is none.
    """
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if not isinstance(head, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} has no language-model head to compute a token loss with.")
    return head


@contextlib.contextmanager
def _only_rows(head: nn.Module, rows: torch.Tensor) -> Iterator[None]:
    """Lets only the named rows of the flattened batch through the head, as a batch of one sequence."""

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (hidden,) = args
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)[None],)

    handle = head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()

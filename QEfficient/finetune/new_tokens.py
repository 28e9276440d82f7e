"""New tokens of a run: into the tokenizer, into the model's embedding, and into what trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from QEfficient.errors import OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.resize import ResizedSource, rows_of, tokens_of
from QEfficient.finetune.step_model import StepModel
from QEfficient.models.source import CheckpointSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def with_new_tokens(tokenizer: PreTrainedTokenizerBase, config: QEffConfig) -> PreTrainedTokenizerBase:
    """A tokenizer that knows ``new_tokens``; those it knows already stay as they are."""
    if not config.new_tokens:
        return tokenizer
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(list(config.new_tokens))
    return larger


def fitting_source(
    source: CheckpointSource, tokenizer: PreTrainedTokenizerBase, config: QEffConfig
) -> CheckpointSource:
    """The checkpoint, with rows for every token.

    Raises:
        OptionError: it has fewer rows than the tokenizer has tokens, and ``resize_embeddings`` is not set.
    """
    rows, tokens = rows_of(source.config()), tokens_of(tokenizer)
    if tokens <= rows:
        return source
    if not config.resize_embeddings:
        raise OptionError(
            f"the tokenizer has {tokens} tokens and {source.name} has room for {rows}: set resize_embeddings=True, or "
            "use the model's own tokenizer."
        )
    return ResizedSource(source.directory, source.name, source.trust_remote_code, tokens)


def new_rows(source: CheckpointSource, tokenizer: PreTrainedTokenizerBase, config: QEffConfig) -> list[int]:
    """Ids of tokens that the model has never seen: those of ``new_tokens``, and those it got rows for."""
    vocabulary = tokenizer.get_vocab()
    named = {vocabulary[token] for token in config.new_tokens or ()}
    old = rows_of(CheckpointSource.config(source))
    return sorted(named | set(range(old, rows_of(source.config()))))


def training_rows(options: Mapping[str, Any], rows: list[int], model: PreTrainedModel) -> dict[str, Any]:
    """Keywords of peft's LoraConfig that also train the rows of new tokens, in the embedding and in the head.

    What the options say about rows, or about training either as a whole, stays.

    Args:
        model: weightless.
    """
    if options.get("trainable_token_indices") is not None or options.get("peft_type") == "IA3":
        return dict(options)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    whole = tuple(options.get("modules_to_save") or ())
    names = {name for name, module in model.named_modules() if module is embedding}
    if head is not None and head.weight is not embedding.weight:
        names |= {name for name, module in model.named_modules() if module is head}
    chosen = {name: rows for name in sorted(names) if not (whole and name.endswith(whole))}
    return {**options, "trainable_token_indices": chosen} if chosen else dict(options)


def require_trained(model: StepModel, rows: list[int]) -> None:
    """OptionError when the rows of new tokens in the embedding would stay as they were drawn."""
    base: Any = model.skeleton.get_base_model() if model.adapter is not None else model.skeleton  # type: ignore[operator]
    embedding = base.get_input_embeddings()
    if rows and not any(parameter.requires_grad for parameter in embedding.parameters()):
        raise OptionError(
            f"{len(rows)} new tokens would never be learned, for the embedding does not train: use LoRA, or name the "
            "embedding and the head in modules_to_save or trainable."
        )

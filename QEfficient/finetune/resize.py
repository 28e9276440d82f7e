"""A checkpoint with more tokens than it was saved with: rows for new ones, made as transformers makes them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from QEfficient.exporter.quiet import quiet
from QEfficient.finetune.initial import read_dtype, read_tensor
from QEfficient.models.source import CheckpointSource
from QEfficient.safetensors_io import WeightMap, read_header
from QEfficient.store.digest import DigestMemo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

RESIZED_FILE = "resized.safetensors"
#: The rows must be the same whenever they are made: when training, when merging, in another run.
_SEED = 0


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows an embedding needs for a tokenizer: its largest id and one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def rows_of(config: PreTrainedConfig) -> int:
    """Tokens that a configuration has room for."""
    return int(config.get_text_config().vocab_size)


class ResizedSource(CheckpointSource):
    """A checkpoint seen with a larger vocabulary; its files are not changed.

    New rows of embedding and head are drawn around the mean of the old ones, as ``resize_token_embeddings`` of
    transformers does (https://www.cs.columbia.edu/~johnhew/vocab-expansion.html), always from one seed, and rounded to
    the checkpoint's own precision.

    Args:
        vocabulary: tokens, more than the checkpoint has.
    """

    changes_config = True

    def __init__(self, directory: Path, name: str, trust_remote_code: bool, vocabulary: int) -> None:
        super().__init__(directory, name, trust_remote_code)
        self.vocabulary = vocabulary
        self._plain = CheckpointSource(directory, name, trust_remote_code)

    def config(self) -> PreTrainedConfig:
        config = super().config()
        config.get_text_config().vocab_size = self.vocabulary
        return config

    def identity(self, memo: DigestMemo) -> dict[str, Any]:
        return {**super().identity(memo), "vocabulary": self.vocabulary, "seed": _SEED}

    def weights(self, ghost: PreTrainedModel, workspace: Path) -> WeightMap:
        found = super().weights(ghost, workspace)
        return {**found, **self._resized(found, workspace)}

    def load(self, factory: str) -> PreTrainedModel:
        model = self._plain.load(factory)
        with tempfile.TemporaryDirectory() as scratch, quiet(), torch.no_grad():
            model.resize_token_embeddings(self.vocabulary, mean_resizing=False)
            own = dict(model.named_parameters(remove_duplicate=False))
            stored = self._plain.weights(self._plain.ghost(factory), Path(scratch))
            for name, ref in self._resized(stored, Path(scratch)).items():
                own[name].copy_(read_tensor(ref))
        return model.eval()

    def _resized(self, found: WeightMap, workspace: Path) -> WeightMap:
        """Embedding, head and the head's bias with their new rows, written to ``workspace``."""
        model = self._plain.ghost("AutoModelForCausalLM")
        own = [name for name, _ in _token_parameters(model) if name in found]
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for name, parameter in _token_parameters(model):
                if name in found:
                    parameter.data = read_tensor(found[name]).float()
            torch.manual_seed(_SEED)
            model.resize_token_embeddings(self.vocabulary)
        larger = dict(_token_parameters(model))
        dtypes = {name: read_dtype(found[name]) for name in own}
        save_file({name: larger[name].detach().to(dtypes[name]).contiguous() for name in own}, workspace / RESIZED_FILE)
        return read_header(workspace / RESIZED_FILE)


def _token_parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    """Parameters with a row for every token, by every name they have."""
    parts = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    chosen = {id(parameter) for part in parts for parameter in part.parameters()}
    return [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if id(p) in chosen]

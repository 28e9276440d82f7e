"""Which states a model keeps between steps: found by running it once without weights, not by describing it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from QEfficient.errors import UnsupportedModelError


@dataclass(frozen=True)
class StateTensor:
    """One state of one layer.

    ``shape`` is without the leading row dimension; ``None`` stands for the capacity (``ctx_len``).
    ``kind`` is key, value, indexer, conv or recurrent; ``index`` numbers several states of one kind.
    """

    layer: int
    kind: str
    index: int | None
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Graph input name, as the Cloud AI contract spells it."""
        prefix = {"key": "past_key", "value": "past_value", "indexer": "past_indexer"}.get(self.kind)
        if prefix is not None:
            return f"{prefix}.{self.layer}"
        suffix = f".{self.index}" if self.index else ""
        return f"{self.kind}_state.{self.layer}{suffix}"

    @property
    def output_name(self) -> str:
        return f"{self.name}_RetainedState"

    @property
    def capacity_dim(self) -> int | None:
        """Dimension (with rows first) that counts positions, if any."""
        return self.shape.index(None) + 1 if None in self.shape else None

    def zeros(self, rows: int, capacity: int) -> torch.Tensor:
        return torch.zeros(rows, *(capacity if d is None else d for d in self.shape), dtype=self.dtype)


@dataclass(frozen=True)
class LayerState:
    """The states of one layer, in graph order."""

    tensors: tuple[StateTensor, ...]


@dataclass(frozen=True)
class StateLayout:
    """All states of a model and the name its forward gives the cache argument."""

    layers: tuple[LayerState, ...]
    cache_argument: str

    @property
    def tensors(self) -> list[StateTensor]:
        return [tensor for layer in self.layers for tensor in layer.tensors]

    @property
    def mixes_columns(self) -> bool:
        """Whether some layer's output at a column depends on neighbouring columns other than through attention."""
        return any(tensor.kind in ("conv", "recurrent") for tensor in self.tensors)


def cache_argument(model: torch.nn.Module) -> str:
    """The keyword under which the model takes its cache; UnsupportedModelError when it takes none."""
    names = inspect.signature(model.forward).parameters
    for name in ("past_key_values", "cache_params"):
        if name in names:
            return name
    raise UnsupportedModelError(
        f"{type(model).__name__} takes no cache (past_key_values or cache_params): it cannot generate token by token."
    )


def probe(twin: PreTrainedModel) -> StateLayout:
    """Runs a weightless twin of the model once on the meta device and reads back which states exist.

    Raises:
        UnsupportedModelError: the model takes no cache, or keeps its state in a way a cache cannot hold.
    """
    argument = cache_argument(twin)
    if getattr(type(twin), "_can_set_experts_implementation", lambda: False)():
        twin.set_experts_implementation("batched_mm")  # the meta kernel of grouped_mm accepts bfloat16 only
    for module in twin.modules():
        # With a padding id some models look at the values of input_ids to warn; the meta device has none.
        config: Any = getattr(module, "config", None)
        if hasattr(config, "pad_token_id"):
            config.pad_token_id = None
    cache = DynamicCache(config=twin.config)
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    with torch.no_grad():
        twin(input_ids=ids, use_cache=True, **{argument: cache})
    layers = []
    for number, layer in enumerate(cache.layers):
        tensors: list[StateTensor] = []
        for kind, attribute in (("key", "keys"), ("value", "values")):
            t = getattr(layer, attribute, None)
            if t is not None and t.dim() == 4:
                tensors.append(StateTensor(number, kind, None, (t.shape[1], None, t.shape[3]), t.dtype))
        indexer = getattr(layer, "indexer_keys", None)
        if indexer is not None:
            tensors.append(StateTensor(number, "indexer", None, (None, indexer.shape[2]), indexer.dtype))
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for kind, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
                for index, t in states.items():
                    if t is not None:
                        tensors.append(StateTensor(number, kind, index, tuple(t.shape[1:]), t.dtype))
        layers.append(LayerState(tuple(tensors)))
    if not any(layer.tensors for layer in layers):
        raise UnsupportedModelError(
            f"{type(twin).__name__} kept nothing in the cache it was given: it cannot generate token by token."
        )
    return StateLayout(tuple(layers), argument)

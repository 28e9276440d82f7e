"""A transformers ``Cache`` over fixed-capacity buffers, so that state lives in the graph's inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, LinearAttentionCacheLayerMixin

from QEfficient.transforms.pytorch import context, ops
from QEfficient.transforms.pytorch.state import LayerState, StateTensor


def _read(state: torch.Tensor) -> torch.Tensor:
    """The rows of a state buffer that this call's batch works on."""
    forward = context.require()
    return state.index_select(0, forward.rows) if forward.indexed else state


def _write_positions(state: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes ``new`` [batch, heads, seq, dim] at this call's positions; returns (buffer, rows of this batch)."""
    forward = context.require()
    if forward.mixes_columns:
        new = new.gather(2, forward.columns[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
    state = ops.scatter_nd(state, forward.scatter_indices(new.shape[1]), new.to(state.dtype))
    return state, _read(state)


class FixedKeyValueLayer(CacheLayerMixin):
    """Keys and values at full capacity. Sliding layers use it too: their window lives in the mask."""

    is_compileable = True
    is_sliding = False

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        indexer_keys: torch.Tensor | None,
        capacity: int | torch.SymInt,
    ) -> None:
        self.keys, self.values, self.indexer_keys, self.capacity = keys, values, indexer_keys, capacity
        self.is_initialized = True
        self.dtype, self.device = keys.dtype, keys.device

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.keys, keys = _write_positions(self.keys, key_states)
        if self.values is None or value_states is None:
            return keys, value_states
        self.values, values = _write_positions(self.values, value_states)
        return keys, values

    def update_indexer(self, key_states: torch.Tensor) -> torch.Tensor:
        """Second key buffer [rows, capacity, dim] of layers that select keys to attend to (DeepSeek sparse)."""
        buffer, rows = _write_positions(self.indexer_keys[:, None], key_states[:, None])
        self.indexer_keys = buffer[:, 0]
        return rows[:, 0]

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        return self.capacity, 0

    def get_seq_length(self) -> torch.Tensor:
        # One number for the whole batch; masks and positions do not depend on it, they use every row's own.
        return context.require().positions[0, 0]

    def get_max_length(self) -> Any:
        return self.capacity


class FixedLinearLayer(LinearAttentionCacheLayerMixin):
    """Convolution and recurrent states. A row whose first token is at position 0 starts from zeros.

    Zero state equals no state in all these layers, so ``has_previous_state`` is always True and one trace serves the
    first prefill, later chunks and decode.
    """

    def __init__(self, conv: dict[int, torch.Tensor], recurrent: dict[int, torch.Tensor]) -> None:
        count = max([*conv, *recurrent, 0]) + 1
        super().__init__(number_of_states=count)
        self._buffers = {("conv", i): t for i, t in conv.items()} | {("recurrent", i): t for i, t in recurrent.items()}
        self.conv_states = {i: self._start(conv[i]) if i in conv else None for i in range(count)}
        self.recurrent_states = {i: self._start(recurrent[i]) if i in recurrent else None for i in range(count)}
        self.has_previous_state = dict.fromkeys(range(count), True)
        self.is_conv_states_initialized = dict.fromkeys(range(count), True)
        self.is_recurrent_states_initialized = dict.fromkeys(range(count), True)

    @staticmethod
    def _start(state: torch.Tensor) -> torch.Tensor:
        forward = context.require()
        rows = _read(state)
        begins = forward.real[:, 0] & (forward.positions[:, 0] == 0)
        return torch.where(begins.reshape(-1, *[1] * (rows.dim() - 1)), torch.zeros((), dtype=rows.dtype), rows)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """Returns old columns + new ones; keeps the columns that end at each row's last real token."""
        state = self.conv_states[state_idx]
        full = torch.cat([state, conv_states.to(state.dtype)], dim=-1)
        count = context.require().real.sum(-1)
        index = count[:, None] + torch.arange(state.shape[-1], device=state.device)[None, :]
        self.conv_states[state_idx] = full.gather(-1, index[:, None, :].expand(-1, full.shape[1], -1))
        return full

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states.to(self.recurrent_states[state_idx].dtype)
        return self.recurrent_states[state_idx]

    def final_state(self, kind: str, index: int) -> torch.Tensor:
        """The buffer to hand back: this batch's rows, placed where they came from."""
        rows = (self.conv_states if kind == "conv" else self.recurrent_states)[index]
        forward = context.require()
        if not forward.indexed:
            return rows
        return ops.scatter_nd(self._buffers[kind, index], forward.rows[:, None], rows)


class FixedHybridLayer(FixedLinearLayer, FixedKeyValueLayer):
    """Attention and state-space states in one layer (Falcon-H1)."""

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        capacity: int | torch.SymInt,
        conv: dict[int, torch.Tensor],
        recurrent: dict[int, torch.Tensor],
    ) -> None:
        FixedKeyValueLayer.__init__(self, keys, values, None, capacity)
        FixedLinearLayer.__init__(self, conv, recurrent)
        self.is_initialized = True


class FixedCache(Cache):
    """The cache handed to the model: one fixed layer per layer of the model."""

    def __init__(self, layers: list[Any], capacity: int | torch.SymInt) -> None:
        super().__init__(layers=layers)
        self.capacity = capacity

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        # The mamba-1 scan takes no initial state as an argument; it asks the context for the one handed out last.
        state = super().get_recurrent_state(layer_idx, state_idx)
        context.require().initial_recurrent_state = state
        return state

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        return context.require().positions[0, 0]

    def get_query_offset(self, layer_idx: int = 0) -> torch.Tensor:
        return context.require().positions[0, 0]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[Any, int]:
        return self.capacity, 0

    def __iter__(self) -> Any:
        for layer in self.layers:
            yield layer.keys, layer.values, None


def build_cache(
    layout: list[LayerState], tensors: dict[StateTensor, torch.Tensor], capacity: int | torch.SymInt
) -> FixedCache:
    """Wraps the state inputs of the graph into the cache the model's forward expects."""
    layers: list[Any] = []
    for layer in layout:
        own = {(t.kind, t.index): tensors[t] for t in layer.tensors}
        conv = {i: t for (kind, i), t in own.items() if kind == "conv" and i is not None}
        recurrent = {i: t for (kind, i), t in own.items() if kind == "recurrent" and i is not None}
        keys, values = own.get(("key", None)), own.get(("value", None))
        if keys is not None and (conv or recurrent):
            layers.append(FixedHybridLayer(keys, values, capacity, conv, recurrent))
        elif keys is not None:
            layers.append(FixedKeyValueLayer(keys, values, own.get(("indexer", None)), capacity))
        elif conv or recurrent:
            layers.append(FixedLinearLayer(conv, recurrent))
        else:
            layers.append(DummyLayer())  # a layer without state, e.g. experts only
    return FixedCache(layers, capacity)


def read_cache(layout: list[LayerState], cache: FixedCache) -> list[torch.Tensor]:
    """The state outputs of the graph, in the order of the state inputs."""
    attributes = {"key": "keys", "value": "values", "indexer": "indexer_keys"}
    out = []
    for number, layer in enumerate(layout):
        for tensor in layer.tensors:
            if tensor.kind in attributes:
                out.append(getattr(cache.layers[number], attributes[tensor.kind]))
            else:
                out.append(cache.layers[number].final_state(tensor.kind, tensor.index))
    return out

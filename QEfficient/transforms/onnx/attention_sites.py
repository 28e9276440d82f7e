"""Finds causal attention over the KV state in a graph, and proves which slots it writes and sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from QEfficient.transforms.onnx.probe import Part
from QEfficient.transforms.onnx.rotary import heads_of

#: Elements of a mask evaluated at a time.
_BLOCK = 1 << 23
#: The operator takes heads of a multiple of so many dimensions.
_HEAD = 8


@dataclass(frozen=True)
class AttentionSite:
    """One ``Attention`` node over state that two ``ScatterND`` nodes have just written.

    Attributes:
        query: [batch, heads, seq, dim]; key, value: the new ones, [batch, kv_heads, seq, dim].
        window: tokens a query sees, itself included; None when it sees all before it.
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    key_scatter: ir.Node
    value_scatter: ir.Node
    heads: int
    kv_heads: int
    dim: int
    scale: float
    softcap: float
    window: int | None

    @property
    def past_key(self) -> ir.Value:
        assert self.key_scatter.inputs[0] is not None
        return self.key_scatter.inputs[0]

    @property
    def past_value(self) -> ir.Value:
        assert self.value_scatter.inputs[0] is not None
        return self.value_scatter.inputs[0]


class Placement:
    """What masks and slot indices compute from ``position_ids``, found by running them; each is run once."""

    def __init__(self, model: ir.Model, ctx_len: int) -> None:
        self.model, self.ctx_len = model, ctx_len
        self._windows: dict[ir.Value, int | str | None] = {}
        self._slots: dict[ir.Value, bool] = {}

    def window(self, mask: ir.Value) -> int | str | None:
        """Tokens a query sees, None for all before it; words when the mask is another one."""
        if mask not in self._windows:
            self._windows[mask] = self._find_window(mask)
        return self._windows[mask]

    def writes_own_slot(self, indices: ir.Value) -> bool:
        """Whether each token's key goes to (its row, every head, its position)."""
        if indices not in self._slots:
            self._slots[indices] = self._check_slots(indices)
        return self._slots[indices]

    def _find_window(self, mask: ir.Value) -> int | str | None:
        part = self._part(mask)
        if part is None:
            return "its mask depends on more than positions"
        last = self._mask_rows(part, np.array([self.ctx_len - 1]))
        seen = int(last.sum()) if last is not None else 0
        window = None if seen == self.ctx_len else seen
        rows = max(1, _BLOCK // self.ctx_len)
        for start in range(0, self.ctx_len, rows):
            positions = np.arange(start, min(start + rows, self.ctx_len))
            found = self._mask_rows(part, positions)
            if found is None or not np.array_equal(found, causal_mask(positions, self.ctx_len, window)):
                return "its mask is neither causal nor a sliding window"
        width = min(self.ctx_len, 32)
        positions = np.arange(self.ctx_len - width, self.ctx_len)
        (several,) = part.run(self._feeds(part, positions[None]))
        if not np.array_equal(several.reshape(width, -1), causal_mask(positions, self.ctx_len, window)):
            return "its mask treats several tokens otherwise than one at a time"
        return window

    def _mask_rows(self, part: Part, positions: np.ndarray) -> np.ndarray | None:
        """bool [n, capacity] for one query at each position; None when the mask has another form."""
        (mask,) = part.run(self._feeds(part, positions[:, None]))
        if mask.dtype != np.bool_ or mask.size != len(positions) * self.ctx_len:
            return None
        return np.asarray(mask.reshape(len(positions), self.ctx_len))

    def _check_slots(self, indices: ir.Value) -> bool:
        part = self._part(indices)
        if part is None:
            return False
        # Every position as a row of one token, then all of them as rows of two.
        single = np.arange(self.ctx_len)[:, None]
        pairs = np.concatenate([single, np.minimum(single + 1, self.ctx_len - 1)], axis=1)
        rows = max(1, _BLOCK // 64)
        for positions in (single, pairs):
            for start in range(0, self.ctx_len, rows):
                block = positions[start : start + rows]
                (found,) = part.run(self._feeds(part, block))
                if found.ndim != 4 or found.shape[3] != 3:
                    return False
                row, head = np.arange(len(block))[:, None, None], np.arange(found.shape[1])[None, :, None]
                expected = np.stack(np.broadcast_arrays(row, head, block[:, None, :]), axis=-1)
                if not np.array_equal(found, expected):
                    return False
        return True

    def _part(self, value: ir.Value) -> Part | None:
        try:
            part = Part(self.model, [value])
        except ValueError:
            return None
        usable = all(v in self.model.graph.inputs and v.shape is not None for v in part.inputs.values())
        return part if usable and "input_ids" not in part.inputs else None

    def _feeds(self, part: Part, positions: np.ndarray) -> dict[str, np.ndarray]:
        """``position_ids``, and for the rest (state, of which only the shape is read) zeros of the right shape."""
        sizes = {"batch_size": len(positions), "seq_len": positions.shape[1], "ctx_len": self.ctx_len}
        feeds = {}
        for name, value in part.inputs.items():
            assert value.shape is not None
            assert value.dtype is not None
            shape = [sizes.get(str(d), 1) if not isinstance(d, int) else d for d in value.shape]
            feeds[name] = np.zeros(shape, value.dtype.numpy())
        feeds["position_ids"] = np.ascontiguousarray(positions, np.int64)
        return feeds


def causal_mask(positions: np.ndarray, capacity: int, window: int | None) -> np.ndarray:
    """bool [n, capacity]: the slots a query at each of ``positions`` sees."""
    slots = np.arange(capacity)[None]
    visible: np.ndarray = slots <= positions[:, None]
    return visible if window is None else visible & (slots > positions[:, None] - window)


def find_site(node: ir.Node, placement: Placement) -> AttentionSite | str:
    """The site of an ``Attention`` node, or why it is none."""
    if (
        len(node.inputs) != 4
        or any(value is None for value in node.inputs)
        or ("is_causal" in node.attributes and node.attributes["is_causal"].as_int())
    ):
        return "it is no attention with a mask of its own"
    query, keys, values, mask = (value for value in node.inputs if value is not None)
    scatters = [_state_write(value) for value in (keys, values)]
    if scatters[0] is None or scatters[1] is None:
        return "its keys and values are not a state that was just written"
    key, value = scatters[0].inputs[2], scatters[1].inputs[2]
    assert key is not None
    assert value is not None
    sizes = [heads_of(v) for v in (query, key, value)]
    if sizes[0] is None or sizes[1] is None or sizes[2] is None:
        return "the number of heads is not known"
    (heads, dim), (kv_heads, _) = sizes[0], sizes[1]
    if sizes[1] != sizes[2] or sizes[1] != (kv_heads, dim):
        return "keys and values differ in shape"
    if dim % _HEAD:
        return f"its heads of {dim} are no multiple of {_HEAD}, which the operator takes"
    if query.dtype not in (None, ir.DataType.FLOAT):
        return f"it computes in {query.dtype}"
    for scatter in scatters:
        assert scatter is not None
        assert scatter.inputs[1] is not None
        if not placement.writes_own_slot(scatter.inputs[1]):
            return "keys are not written to the slot of their position"
    window = placement.window(mask)
    if isinstance(window, str):
        return window
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else dim**-0.5
    softcap = node.attributes["softcap"].as_float() if "softcap" in node.attributes else 0.0
    return AttentionSite(
        node, query, key, value, scatters[0], scatters[1], heads, kv_heads, dim, scale, softcap, window
    )


def _state_write(value: ir.Value) -> ir.Node | None:
    """The ScatterND that makes ``value``, a state output, out of a state input."""
    node = value.producer()
    if node is None or node.op_type != "ScatterND" or not value.is_graph_output():
        return None
    source = node.inputs[0]
    return node if source is not None and source.is_graph_input() else None

"""FuseAttention: what it fuses computes the same, up to the last slot; what is not causal attention it leaves alone.

References: numpy, from the definition, for small graphs that are written here; Hugging Face's one pass over a whole
sequence for exported models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny_models
import torch
from test_rotary import FLOAT, INT64, Writer, frequencies, like
from tiny_models import sample_prompt, tiny_causal_lm
from transformers import PreTrainedModel

from QEfficient import QEFFAutoModelForCausalLM, load
from QEfficient.errors import OptionError
from QEfficient.onnx_io import load_model, save_model
from QEfficient.targets.host_session import HostSession
from QEfficient.transforms.onnx.base import TransformResult
from QEfficient.transforms.onnx.fuse_attention import FuseAttention
from QEfficient.transforms.onnx.queue import resolve

CTX, VOCAB, HIDDEN = 32, 13, 24
TOLERANCE = 1e-4  # of the largest reference logit


# ---------------------------------------------------------------------------------- a small model, written twice


@dataclass(frozen=True)
class Layer:
    """One attention layer. ``window`` counts the query itself; ``gate`` scales heads before they are put together."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    window: int | None = None
    softcap: float = 0.0
    scale: float | None = None
    rotary: tuple[float, ...] = tuple(frequencies(8))
    interleaved: bool = False
    rotary_scale: float = 1.0
    #: Of keys, where theirs is another one.
    key_rotary_scale: float | None = None
    gate: bool = False
    #: Query, key and value leave one product, are transposed together and split then, as in GPT-NeoX.
    together: bool = False
    #: Shapes of three dimensions are written down, so that Reshape and Transpose can go.
    known: bool = True


#: Changes what a graph uses for a mask or for slots: (writer, made so far, positions [batch, seq]) -> to use.
Change = Callable[[Writer, ir.Value, ir.Value], ir.Value]


@dataclass
class Toy:
    """A causal model of one or several attention layers, as a graph and in numpy."""

    layers: Sequence[Layer] = (Layer(),)
    ctx: int = CTX
    mask: Change | None = None
    slots: Change | None = None
    #: Changes only the slots of values.
    value_slots: Change | None = None
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)

        def draw(*shape: int) -> np.ndarray:
            return (rng.standard_normal(shape) * 1.5 / shape[0] ** 0.5).astype(np.float32)

        self.weights = {"table": draw(VOCAB, HIDDEN) * 4, "head": draw(HIDDEN, VOCAB)}
        for n, layer in enumerate(self.layers):
            for name, heads in (("q", layer.heads), ("k", layer.kv_heads), ("v", layer.kv_heads)):
                self.weights[f"{name}{n}"] = draw(HIDDEN, heads * layer.dim)
            self.weights[f"o{n}"] = draw(layer.heads * layer.dim, HIDDEN)

    # -------------------------------------------------------------- in numpy

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float64 [seq, vocab]."""
        w = {name: array.astype(np.float64) for name, array in self.weights.items()}
        hidden, steps = w["table"][list(ids)], np.arange(len(ids))
        for n, layer in enumerate(self.layers):
            q, k, v = ((hidden @ w[f"{name}{n}"]).reshape(len(ids), -1, layer.dim).transpose(1, 0, 2) for name in "qkv")
            q, k = self._turned(layer, q), self._turned(self._of_keys(layer), k)
            k, v = (np.repeat(x, layer.heads // layer.kv_heads, axis=0) for x in (k, v))
            scores = q @ k.transpose(0, 2, 1) * (layer.scale if layer.scale is not None else layer.dim**-0.5)
            if layer.softcap:
                scores = np.tanh(scores / layer.softcap) * layer.softcap
            ago = steps[:, None] - steps[None, :]
            scores[:, (ago < 0) | (ago >= (layer.window or len(ids)))] = -np.inf
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            out = shares / shares.sum(-1, keepdims=True) @ v
            if layer.gate:
                out = out * (1 + np.arange(layer.heads))[:, None, None] / layer.heads
            hidden = hidden + out.transpose(1, 0, 2).reshape(len(ids), -1) @ w[f"o{n}"]
        return np.asarray(hidden @ w["head"])

    @staticmethod
    def _of_keys(layer: Layer) -> Layer:
        scale = layer.key_rotary_scale
        return layer if scale is None else replace(layer, rotary_scale=scale)

    @staticmethod
    def _turned(layer: Layer, x: np.ndarray) -> np.ndarray:
        pairs = len(layer.rotary)
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
        if layer.interleaved:
            first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        angles = np.arange(x.shape[1])[:, None] * np.array(layer.rotary)
        z = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles) * layer.rotary_scale
        out = x.copy()
        out[..., first], out[..., second] = z.real, z.imag
        return out

    # -------------------------------------------------------------- as a graph

    def model(self) -> ir.Model:
        """As exported models are: state written with ScatterND, then Attention with a mask made of positions."""
        w = Writer()
        ids, positions = (like(name, ["batch_size", "seq_len"], INT64) for name in ("input_ids", "position_ids"))
        inputs, outputs = [ids, positions], []
        batch, seq = (w.op("Shape", positions, start=axis, end=axis + 1) for axis in (0, 1))
        used = w.op("Where", w.op("Less", positions, np.array(0)), np.array(self.ctx - 1), positions)
        hidden = w.op("Gather", self.weights["table"], ids)
        for n, layer in enumerate(self.layers):
            past = [
                like(f"past_{kind}.{n}", ["batch_size", layer.kv_heads, "ctx_len", layer.dim], FLOAT)
                for kind in ("key", "value")
            ]
            inputs += past
            query, key, value = self._projected(w, n, layer, hidden, used)
            slots = self._indices(w, layer, batch, seq, used)
            value_slots = slots if self.value_slots is None else self.value_slots(w, slots, used)
            state = []
            for source, new, where in zip(past, (key, value), (slots, value_slots), strict=True):
                state.append(w.op("ScatterND", source, where, new))
                state[-1].name, state[-1].shape, state[-1].type = f"{source.name}_out", source.shape, source.type
            attention = w.op(
                "Attention", query, *state, self._mask(w, layer, past[0], used), softcap=layer.softcap,
                scale=layer.scale if layer.scale is not None else layer.dim**-0.5,
            )  # fmt: skip
            w.nodes[-1].name = f"attention{n}"
            attention.shape, attention.type = query.shape, query.type
            outputs += state
            if layer.gate:
                gates = (1 + np.arange(layer.heads, dtype=np.float32)).reshape(1, -1, 1, 1) / np.float32(layer.heads)
                attention = w.op("Mul", attention, gates)
            flat = w.op("Transpose", attention, perm=[0, 2, 1, 3])
            flat = w.op("Reshape", flat, np.array([0, 0, layer.heads * layer.dim]))
            if layer.known:
                flat.shape = ir.Shape(["batch_size", "seq_len", layer.heads * layer.dim])
            hidden = w.op("Add", hidden, w.op("MatMul", flat, self.weights[f"o{n}"]))
        logits = w.op("MatMul", hidden, self.weights["head"])
        logits.name, logits.shape = "logits", ir.Shape(["batch_size", "seq_len", VOCAB])
        logits.type = ir.TensorType(FLOAT)
        graph = ir.Graph(
            inputs, [logits, *outputs], nodes=w.nodes, initializers=w.constants, opset_imports={"": 23}, name="toy"
        )
        return ir.Model(graph, ir_version=10)

    def _projected(self, w: Writer, n: int, layer: Layer, hidden: ir.Value, used: ir.Value) -> list[ir.Value]:
        """Rotated query, rotated key, value: [batch, heads, seq, dim]."""
        if layer.together:
            assert layer.heads == layer.kv_heads
            parts = [self.weights[f"{name}{n}"].reshape(HIDDEN, layer.heads, layer.dim) for name in "qkv"]
            whole = w.op("MatMul", hidden, np.concatenate(parts, axis=2).reshape(HIDDEN, -1))
            turned = w.op("Reshape", whole, np.array([0, 0, layer.heads, 3 * layer.dim]))
            turned = w.op("Transpose", turned, perm=[0, 2, 1, 3])
            turned.shape = ir.Shape(["batch_size", layer.heads, "seq_len", 3 * layer.dim])
            turned.type = ir.TensorType(FLOAT)
            made = [w.cut(turned, i * layer.dim, (i + 1) * layer.dim) for i in range(3)]
        else:
            made = []
            for name, heads in (("q", layer.heads), ("k", layer.kv_heads), ("v", layer.kv_heads)):
                flat = w.op("MatMul", hidden, self.weights[f"{name}{n}"])
                if layer.known:
                    flat.shape = ir.Shape(["batch_size", "seq_len", heads * layer.dim])
                split = w.op("Reshape", flat, np.array([0, 0, heads, layer.dim]))
                made.append(w.op("Transpose", split, perm=[0, 2, 1, 3]))
        for value, heads in zip(made, (layer.heads, layer.kv_heads, layer.kv_heads), strict=True):
            value.shape, value.type = ir.Shape(["batch_size", heads, "seq_len", layer.dim]), ir.TensorType(FLOAT)
        return [self._rotated(w, layer, made[0], used), self._rotated(w, self._of_keys(layer), made[1], used), made[2]]

    @staticmethod
    def _rotated(w: Writer, layer: Layer, x: ir.Value, used: ir.Value) -> ir.Value:
        pairs = len(layer.rotary)
        if not pairs:
            return x
        steps = w.op("Unsqueeze", w.op("Cast", used, to=FLOAT.value), np.array([1, 3]))
        angles = w.op("Mul", steps, np.array(layer.rotary, np.float32))
        cos, sin = (w.op("Mul", w.op(kind, angles), np.float32(layer.rotary_scale)) for kind in ("Cos", "Sin"))
        step = 2 if layer.interleaved else 1
        a = w.cut(x, 0, 2 * pairs if layer.interleaved else pairs, step)
        b = w.cut(x, 1 if layer.interleaved else pairs, 2 * pairs, step)
        one = w.op("Sub", w.op("Mul", a, cos), w.op("Mul", b, sin))
        two = w.op("Add", w.op("Mul", b, cos), w.op("Mul", a, sin))
        if layer.interleaved:
            both = w.op("Concat", w.op("Unsqueeze", one, np.array([4])), w.op("Unsqueeze", two, np.array([4])), axis=4)
            pieces = [w.op("Reshape", both, np.array([0, 0, 0, 2 * pairs]))]
        else:
            pieces = [one, two]
        out = w.op("Concat", *pieces, w.cut(x, 2 * pairs, layer.dim), axis=3)
        out.shape, out.type = x.shape, x.type
        return out

    def _indices(self, w: Writer, layer: Layer, batch: ir.Value, seq: ir.Value, used: ir.Value) -> ir.Value:
        """int64 [batch, kv_heads, seq, 3]: row, head, slot."""
        size = w.op("Concat", batch, np.array([layer.kv_heads]), seq, axis=0)
        rows = w.op("Range", np.array(0), w.op("Squeeze", batch), np.array(1))
        heads = np.arange(layer.kv_heads).reshape(1, -1, 1)
        parts = [w.op("Unsqueeze", rows, np.array([1, 2])), w.constant(heads), w.op("Unsqueeze", used, np.array([1]))]
        parts = [w.op("Unsqueeze", w.op("Expand", part, size), np.array([3])) for part in parts]
        made = w.op("Concat", *parts, axis=3)
        return made if self.slots is None else self.slots(w, made, used)

    def _mask(self, w: Writer, layer: Layer, past: ir.Value, used: ir.Value) -> ir.Value:
        """bool [batch, 1, seq, ctx]."""
        slot, query = self.axes(w, past, used)
        mask = w.op("LessOrEqual", slot, query)
        if layer.window is not None:
            mask = w.op("And", mask, w.op("Greater", slot, w.op("Sub", query, np.array(layer.window))))
        return mask if self.mask is None else self.mask(w, mask, used)

    @staticmethod
    def axes(w: Writer, past: ir.Value | int, used: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Slots [1, 1, 1, ctx] and the positions of queries [batch, 1, seq, 1]."""
        size: Any = np.array(past) if isinstance(past, int) else w.op("Squeeze", w.op("Shape", past, start=2, end=3))
        slots = w.op("Range", np.array(0), size, np.array(1))
        return w.op("Unsqueeze", slots, np.array([0, 1, 2])), w.op("Unsqueeze", used, np.array([1, 3]))

    # -------------------------------------------------------------- fused and run

    def fused(self, directory: Path) -> tuple[ir.Model, TransformResult]:
        model = self.model()
        workspace = directory / "workspace"
        workspace.mkdir()
        return model, FuseAttention(ctx_len=self.ctx).apply(model, workspace)


class Runner:
    """A graph in a plain ONNX Runtime session; its state is passed in and out."""

    def __init__(self, toy: Toy, model: ir.Model, directory: Path, rows: int) -> None:
        path = directory / "workspace" / "model.onnx"
        save_model(model, path)
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.state = {
            f"past_{kind}.{n}": np.zeros((rows, layer.kv_heads, toy.ctx, layer.dim), np.float32)
            for n, layer in enumerate(toy.layers)
            for kind in ("key", "value")
        }

    def run(self, ids: list[list[int]], positions: list[list[int]], rows: slice = slice(None)) -> np.ndarray:
        """float32 [rows, seq, vocab]."""
        feeds = {"input_ids": np.array(ids), "position_ids": np.array(positions)}
        feeds |= {name: array[rows] for name, array in self.state.items()}
        found = dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
        for name in self.state:
            self.state[name][rows] = found[f"{name}_out"]
        return np.asarray(found["logits"])


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def assert_follows_numpy(toy: Toy, model: ir.Model, directory: Path) -> None:
    """Chunks and single tokens up to the last slot, a chunk that ends there, and rows of different length together."""
    sequence = tokens(toy.ctx, 1)
    expected = toy.logits(sequence)
    for chunks in ([5, 5, 2], [toy.ctx], [toy.ctx - 3, 3], [1]):
        runner, done = Runner(toy, model, directory, 1), 0
        while done < toy.ctx:
            count = min(max(1, chunks.pop(0) if chunks else 1), toy.ctx - done)
            part = slice(done, done + count)
            assert_close(runner.run([sequence[part]], [list(range(toy.ctx))[part]])[0], expected[part])
            done += count
    if toy.ctx < 12:
        return
    lengths = [toy.ctx - 2, 4, 9]
    rows = [tokens(toy.ctx, seed) for seed in (2, 3, 4)]
    references = [toy.logits(row) for row in rows]
    runner, fed = Runner(toy, model, directory, 3), list(lengths)
    for row, length in enumerate(lengths):
        runner.run([rows[row][:length]], [list(range(length))], slice(row, row + 1))
    # The first row ends in the last slot, which idle rows beside it write, too; then it is idle itself.
    for active in ((0, 1), (1, 2), (0, 2), (2,), (0, 1, 2), (1,)):
        active = tuple(row for row in active if fed[row] < toy.ctx)
        ids = [[rows[row][fed[row]] if row in active else 0] for row in range(3)]
        logits = runner.run(ids, [[fed[row] if row in active else -1] for row in range(3)])
        assert np.isfinite(logits).all()
        for row in active:
            assert_close(logits[row, 0], references[row][fed[row]])
            fed[row] += 1
    assert fed == [toy.ctx, 8, 13]


PLAIN = Layer()
FUSIBLE = {
    # toy, rotary inside, sliding windows
    "grouped heads": (Toy(), 1, 0),
    "one head for keys": (Toy([replace(PLAIN, kv_heads=1)]), 1, 0),
    "a head each": (Toy([replace(PLAIN, kv_heads=4)]), 1, 0),
    "no rotation": (Toy([replace(PLAIN, rotary=())]), 0, 0),
    "interleaved": (Toy([replace(PLAIN, interleaved=True)]), 1, 0),
    "half of the dimensions": (Toy([replace(PLAIN, dim=32)]), 1, 0),
    "half, interleaved": (Toy([replace(PLAIN, dim=32, interleaved=True)]), 1, 0),
    "five pairs": (Toy([replace(PLAIN, rotary=tuple(frequencies(5)))]), 0, 0),
    "four pairs": (Toy([replace(PLAIN, dim=8, rotary=tuple(frequencies(4)))]), 0, 0),
    "sixteen pairs": (Toy([replace(PLAIN, dim=32, rotary=tuple(frequencies(16)))]), 1, 0),
    "factors with a scale": (Toy([replace(PLAIN, rotary_scale=1.3)]), 1, 0),
    "keys turn otherwise": (Toy([replace(PLAIN, key_rotary_scale=0.7)]), 0, 0),
    "another scale": (Toy([replace(PLAIN, scale=0.6)]), 1, 0),
    "softcap": (Toy([replace(PLAIN, softcap=2.0)]), 1, 0),
    "window of 4": (Toy([replace(PLAIN, window=4)]), 1, 1),
    "window of 1": (Toy([replace(PLAIN, window=1)]), 1, 1),
    "window of all but one": (Toy([replace(PLAIN, window=CTX - 1)]), 1, 1),
    "window of all": (Toy([replace(PLAIN, window=CTX)]), 1, 0),
    "window and softcap": (Toy([replace(PLAIN, window=3, softcap=1.5, kv_heads=1)]), 1, 1),
    "two bases and windows": (
        Toy([replace(PLAIN, window=4), PLAIN, replace(PLAIN, rotary=tuple(frequencies(8, 7.0)))]), 3, 1,
    ),
    "heads are read apart": (Toy([replace(PLAIN, gate=True)]), 1, 0),
    "shapes are not known": (Toy([replace(PLAIN, known=False)]), 1, 0),
    "context of 2": (Toy(ctx=2), 1, 0),
    "context of 1": (Toy(ctx=1), 0, 0),
    "context of 1, window of 1": (Toy([replace(PLAIN, window=1)], ctx=1), 0, 0),
    "context of 70": (Toy([replace(PLAIN, window=65), PLAIN], ctx=70), 2, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSIBLE)
def test_fused_graphs_compute_what_numpy_does(name: str, tmp_path: Path) -> None:
    toy, rotary, windows = FUSIBLE[name]
    model, result = toy.fused(tmp_path)
    assert result.modified
    layers = len(toy.layers)
    assert result.facts == {
        "fused": {"GroupQueryAttention": layers, "rotary inside": rotary, "sliding window": windows},
        "left": {},
    }
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("GroupQueryAttention") == layers
    assert not {"Attention", "ScatterND", "LessOrEqual"} & set(kinds)
    assert ("Cos" in kinds) == (rotary < layers and bool(toy.layers[0].rotary))
    assert_follows_numpy(toy, model, tmp_path)


def test_layers_of_one_rotation_share_its_tables(tmp_path: Path) -> None:
    other = replace(PLAIN, rotary=tuple(frequencies(8, 7.0)))
    model, _ = Toy([PLAIN, other, replace(PLAIN, window=4), other]).fused(tmp_path)
    tables = {name for name in model.graph.initializers if name.startswith("rotary.")}
    assert len(tables) == 4
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    used = [tuple(str(value.name) for value in node.inputs[7:9] if value is not None) for node in nodes]
    assert used[0] == used[2] != used[1] == used[3]
    for node, layer in zip(nodes, (PLAIN, other, PLAIN, other), strict=True):
        cos, sin = (value.const_value.numpy() for value in node.inputs[7:9])
        angles = np.arange(CTX)[:, None] * np.array(layer.rotary)
        np.testing.assert_allclose(cos + 1j * sin, np.exp(1j * angles), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dim", "pairs"), [(12, 0), (20, 10), (100, 50), (24, 8), (40, 8)])
def test_heads_the_operator_does_not_take(dim: int, pairs: int, tmp_path: Path) -> None:
    """Open LLaMA 3B has heads of 100. What cannot go inside stays outside."""
    toy = Toy([replace(PLAIN, dim=dim, rotary=tuple(frequencies(pairs)) if pairs else ())])
    assert_follows_numpy(toy, toy.fused(tmp_path)[0], tmp_path)


@pytest.mark.parametrize("dim", [12, 16])
def test_the_graph_as_it_is_written_computes_what_numpy_does(dim: int, tmp_path: Path) -> None:
    """Or the comparison would show nothing of the transform."""
    toy = Toy([replace(PLAIN, dim=dim, window=4, rotary=PLAIN.rotary[: dim // 2]), PLAIN])
    (tmp_path / "workspace").mkdir()
    assert_follows_numpy(toy, toy.model(), tmp_path)


def test_query_key_and_value_transposed_together(tmp_path: Path) -> None:
    toy = Toy([replace(PLAIN, kv_heads=4, together=True)])
    model, result = toy.fused(tmp_path)
    assert result.facts["fused"]["GroupQueryAttention"] == 1
    assert_follows_numpy(toy, model, tmp_path)


# ---------------------------------------------------------------------------------- what is left alone


def strictly_before(w: Writer, mask: ir.Value, used: ir.Value) -> ir.Value:
    slot, query = Toy.axes(w, CTX, used)
    return w.op("Less", slot, query)


def one_ahead(w: Writer, mask: ir.Value, used: ir.Value) -> ir.Value:
    slot, query = Toy.axes(w, CTX, used)
    return w.op("LessOrEqual", slot, w.op("Add", query, np.array(1)))


def everything(w: Writer, mask: ir.Value, used: ir.Value) -> ir.Value:
    return w.op("Or", mask, w.op("Not", mask))


def chunks_of_8(w: Writer, mask: ir.Value, used: ir.Value) -> ir.Value:
    slot, query = Toy.axes(w, CTX, used)
    same = w.op("Equal", w.op("Div", slot, np.array(8)), w.op("Div", query, np.array(8)))
    return w.op("And", mask, same)


def a_growing_window(w: Writer, mask: ir.Value, used: ir.Value) -> ir.Value:
    slot, query = Toy.axes(w, CTX, used)
    return w.op("And", mask, w.op("GreaterOrEqual", slot, w.op("Div", query, np.array(2))))


def one_hole(w: Writer, mask: ir.Value, used: ir.Value) -> ir.Value:
    """The query at position 17 does not see slot 15."""
    slot, query = Toy.axes(w, CTX, used)
    hole = w.op("And", w.op("Equal", slot, np.array(15)), w.op("Equal", query, np.array(17)))
    return w.op("And", mask, w.op("Not", hole))


def tokens_of_a_call_see_each_other(w: Writer, mask: ir.Value, used: ir.Value) -> ir.Value:
    slot, query = Toy.axes(w, CTX, used)
    return w.op("LessOrEqual", slot, w.op("ReduceMax", query, np.array([2]), keepdims=1))


def added_to_scores(w: Writer, mask: ir.Value, used: ir.Value) -> ir.Value:
    return w.op("Where", mask, np.float32(0), np.float32(-1e9))


def a_bias_of_distance(w: Writer, mask: ir.Value, used: ir.Value) -> ir.Value:
    """ALiBi: not only whether, but how much."""
    slot, query = Toy.axes(w, CTX, used)
    return w.op("Where", mask, w.op("Cast", w.op("Sub", slot, query), to=FLOAT.value), np.float32(-1e9))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (strictly_before, "neither causal nor a sliding window"),
        (one_ahead, "neither causal nor a sliding window"),
        (everything, "neither causal nor a sliding window"),
        (chunks_of_8, "neither causal nor a sliding window"),
        (a_growing_window, "neither causal nor a sliding window"),
        (one_hole, "neither causal nor a sliding window"),
        (added_to_scores, "neither causal nor a sliding window"),
        (a_bias_of_distance, "neither causal nor a sliding window"),
        (tokens_of_a_call_see_each_other, "treats several tokens otherwise than one at a time"),
    ],
)
def test_other_masks_are_left(change: Change, reason: str, tmp_path: Path) -> None:
    assert_left(Toy(mask=change), reason, tmp_path)


def assert_left(toy: Toy, reason: str, directory: Path) -> None:
    """Both layers stay, the facts say why, and the graph is the one it was."""
    toy = replace(toy, layers=[PLAIN, replace(PLAIN, window=4)])
    before = ir.to_proto(toy.model()).SerializeToString()
    model, result = toy.fused(directory)
    assert not result.modified
    assert {kind: n for kind, n in result.facts["fused"].items() if n} == {}
    assert result.facts["left"].keys() == {"attention0", "attention1"}
    assert all(reason in text for text in result.facts["left"].values()), result.facts
    assert ir.to_proto(model).SerializeToString() == before


def test_a_mask_of_tokens_is_left(tmp_path: Path) -> None:
    """Padding by token id: known only when it runs."""
    toy = Toy()
    model = toy.model()
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    ids = model.graph.inputs[0]
    w = Writer()
    seen = w.op("Unsqueeze", w.op("Greater", ids, np.array(-1)), np.array([1, 3]))
    both = w.op("And", node.inputs[3], seen)
    install(model, node, w)
    node.replace_input_with(3, both)
    result = FuseAttention(ctx_len=CTX).apply(model, tmp_path)
    assert result.facts["left"] == {"attention0": "its mask depends on more than positions"}


def install(model: ir.Model, before: ir.Node, w: Writer) -> None:
    """Puts what was written in front of a node."""
    for number, constant in enumerate(w.constants):
        constant.name = f"edit{number}"
        model.graph.register_initializer(constant)
    for number, new in enumerate(w.nodes):
        new.outputs[0].name = f"edited{number}"
    model.graph.insert_before(before, w.nodes)


def one_slot_later(w: Writer, indices: ir.Value, used: ir.Value) -> ir.Value:
    return w.op("Add", indices, np.array([0, 0, 1]))


def always_the_first(w: Writer, indices: ir.Value, used: ir.Value) -> ir.Value:
    return w.op("Mul", indices, np.array([1, 1, 0]))


def a_ring(w: Writer, indices: ir.Value, used: ir.Value) -> ir.Value:
    return w.op("Mod", indices, np.array([1 << 30, 1 << 30, 8]))


def the_first_row(w: Writer, indices: ir.Value, used: ir.Value) -> ir.Value:
    return w.op("Mul", indices, np.array([0, 1, 1]))


def the_other_head(w: Writer, indices: ir.Value, used: ir.Value) -> ir.Value:
    return w.op("Abs", w.op("Sub", indices, np.array([0, 1, 0])))


def not_the_last(w: Writer, indices: ir.Value, used: ir.Value) -> ir.Value:
    return w.op("Min", indices, np.array([1 << 30, 1 << 30, CTX - 2]))


def two_exchanged(w: Writer, indices: ir.Value, used: ir.Value) -> ir.Value:
    """Slots 5 and 6."""
    table = np.arange(CTX)
    table[[5, 6]] = 6, 5
    moved = w.op("Sub", w.op("Gather", table, used), used)
    return w.op("Add", indices, w.op("Mul", w.op("Unsqueeze", moved, np.array([1, 3])), np.array([0, 0, 1])))


SLOTS = [one_slot_later, always_the_first, a_ring, the_first_row, the_other_head, not_the_last]


@pytest.mark.parametrize("where", ["slots", "value_slots"])
@pytest.mark.parametrize(
    "change",
    [
        *SLOTS,
        two_exchanged,
    ],
)
def test_other_slots_are_left(change: Change, where: str, tmp_path: Path) -> None:
    toy = Toy(**{where: change})  # type: ignore[arg-type]
    assert_left(toy, "keys are not written to the slot of their position", tmp_path)


def test_one_layer_that_cannot_does_not_keep_the_other(tmp_path: Path) -> None:
    toy = Toy([PLAIN, PLAIN])
    model = toy.model()
    node = next(node for node in model.graph if node.name == "attention1")
    w = Writer()
    shifted = one_slot_later(w, node.inputs[1].producer().inputs[1], model.graph.inputs[1])
    install(model, node.inputs[1].producer(), w)
    node.inputs[1].producer().replace_input_with(1, shifted)
    result = FuseAttention(ctx_len=CTX).apply(model, tmp_path)
    assert result.modified
    assert result.facts["fused"]["GroupQueryAttention"] == 1
    assert list(result.facts["left"]) == ["attention1"]
    assert [node.op_type for node in model.graph if "Attention" in node.op_type] == ["GroupQueryAttention", "Attention"]


def test_an_attention_that_masks_itself_is_left(tmp_path: Path) -> None:
    model = Toy().model()
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    node.attributes.add(ir.AttrInt64("is_causal", 1))
    result = FuseAttention(ctx_len=CTX).apply(model, tmp_path)
    assert result.facts["left"] == {"attention0": "it is no attention with a mask of its own"}


def test_a_state_that_is_no_state_is_left(tmp_path: Path) -> None:
    """Keys that are scaled after they were read from the state: what is seen is not what is kept."""
    model = Toy().model()
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    w = Writer()
    scaled = w.op("Mul", node.inputs[1], np.float32(0.5))
    install(model, node, w)
    node.replace_input_with(1, scaled)
    result = FuseAttention(ctx_len=CTX).apply(model, tmp_path)
    assert result.facts["left"] == {"attention0": "its keys and values are not a state that was just written"}


def test_heads_of_another_width_for_values_are_left(tmp_path: Path) -> None:
    model = Toy().model()
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    value = node.inputs[2].producer().inputs[2]
    value.shape = ir.Shape(["batch_size", 2, "seq_len", 8])
    result = FuseAttention(ctx_len=CTX).apply(model, tmp_path)
    assert result.facts["left"] == {"attention0": "keys and values differ in shape"}


@pytest.mark.parametrize("ctx_len", [None, 0, -1, True, 2.0, "32"])
def test_the_capacity_must_be_named(ctx_len: Any) -> None:
    with pytest.raises(OptionError, match="FuseAttention needs ctx_len"):
        FuseAttention() if ctx_len is None else FuseAttention(ctx_len=ctx_len)


@pytest.mark.parametrize("text", ["FuseAttention", "FuseAttention:ctx_len=0", "FuseAttention:ctx_len=2.5"])
def test_the_capacity_must_be_named_in_words(text: str) -> None:
    with pytest.raises(OptionError, match="FuseAttention needs ctx_len"):
        resolve([text])


# ---------------------------------------------------------------------------------- exported models

#: With test_quantize_weights and test_weights_option: models of these sizes are exported once per run.
WIDE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160}
ONE: dict[str, Any] = {"num_hidden_layers": 1}
GROUPED = tiny_models.CAUSAL_CONFIGS["llama"]


@dataclass(frozen=True)
class Family:
    """A model and what the facts must say of it; None for what another transform may still change."""

    name: str
    options: dict[str, Any]
    fused: int
    rotary: int | None
    windows: int


FAMILIES = [
    Family("llama", WIDE, 2, 2, 0),
    Family("qwen2", ONE, 1, 1, 0),
    Family("qwen3", WIDE, 2, 2, 0),
    Family("gemma2", WIDE, 2, 2, 1),
    Family("gpt2", {"n_embd": 96}, 2, 0, 0),
    Family("phi3", ONE, 1, 1, 1),
    Family("mistral", ONE, 1, 1, 1),
    # Norms between the transposition and the rotation, and two bases.
    Family("gemma3", {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}, 2, None, 1),
    # Half of the dimensions turn, pair by pair: eight pairs.
    Family("glm", ONE | {"head_dim": 32, "partial_rotary_factor": 0.5}, 1, 1, 0),
    # Four pairs: less than the operator takes.
    Family("phi", ONE | {"partial_rotary_factor": 0.5}, 1, 0, 0),
    # Sinks besides the keys, and attention written out: nothing here is the general node.
    Family("gpt_oss", ONE | {"layer_types": ["sliding_attention"], "num_local_experts": 2}, 0, 0, 0),
]


@pytest.fixture(autouse=True)
def more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that only these tests use."""
    for name in ("glm", "phi"):
        fields = {key: value for key, value in GROUPED.items() if key != "head_dim"}
        monkeypatch.setitem(tiny_models.CAUSAL_CONFIGS, name, fields | {"model_type": name})


def built(family: Family) -> tuple[PreTrainedModel, Path]:
    reference = tiny_causal_lm(family.name, **family.options)
    return reference, QEFFAutoModelForCausalLM(reference).compile(ctx_len=CTX, prefill_seq_len=8, progress=False)


@torch.no_grad()
def hf_logits(reference: PreTrainedModel, rows: list[list[int]]) -> np.ndarray:
    """float32 [rows, seq, vocab], of one pass over whole sequences."""
    return reference(input_ids=torch.tensor(rows)).logits.float().numpy()


def feed(session: HostSession, ids: list[int], start: int, row: int) -> np.ndarray:
    """The last token's logits of one call on one row."""
    positions = np.arange(start, start + len(ids))[None]
    return session.run({"input_ids": np.array([ids]), "position_ids": positions}, "Prefill", row=row)["logits"][0, 0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_exported_families(family: Family) -> None:
    """What was fused, and every logit of Hugging Face to the last slot, with windows that wrap many times."""
    reference, package = built(family)
    (record,) = (
        r for r in json.loads((package / "manifest.json").read_text())["transforms"] if "Attention" in r["name"]
    )
    fused = {kind: n for kind, n in record["facts"]["fused"].items() if n}
    assert fused.get("GroupQueryAttention", 0) == family.fused
    assert fused.get("sliding window", 0) == family.windows
    if family.rotary is not None:
        assert fused.get("rotary inside", 0) == family.rotary
    assert record["modified"] == bool(family.fused)
    assert record["facts"]["left"] == {}
    kinds = [node.op_type for node in load_model(package / "program.onnx").graph]
    assert kinds.count("GroupQueryAttention") == family.fused
    assert not {"Attention", "ScatterND"} & set(kinds) or not family.fused

    rows = [sample_prompt(CTX, seed) for seed in (7, 8, 9)]
    expected = hf_logits(reference, rows)
    with load(package) as opened:
        session = opened.session
        session.begin({"batch_size": 3, "ctx_len": CTX})
        for chunks in ([5, 5, 2], [8, 8, 8, 8], [7, 8, 8, 8, 1]):  # the others end at the last slot
            done = 0
            for count in [*chunks, *[1] * CTX][: len(chunks) + CTX - sum(chunks)]:
                found = feed(session, rows[0][done : done + count], done, 0)
                done += count
                assert_close(found, expected[0, done - 1])
            assert done == CTX
        fed = [CTX - 2, 3, 11]
        for row, length in enumerate(fed):
            for start in range(0, length, 8):
                feed(session, rows[row][start : min(start + 8, length)], start, row)
        for active in ((0, 1), (1, 2), (0, 2), (1,), (1, 2)):
            ids = np.array([[rows[row][fed[row]] if row in active else 0] for row in range(3)])
            positions = np.array([[fed[row] if row in active else -1] for row in range(3)])
            logits = session.run({"input_ids": ids, "position_ids": positions}, "Decode")["logits"]
            assert np.isfinite(logits).all()
            for row in active:
                assert_close(logits[row, 0], expected[row, fed[row]])
                fed[row] += 1
        assert fed == [CTX, 7, 14]


@pytest.fixture
def exported() -> ir.Model:
    """The graph of a llama of two layers, before any transform."""
    return load_model(QEFFAutoModelForCausalLM(tiny_causal_lm("llama", **WIDE)).export(progress=False))


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


def test_an_exported_mask_that_sees_less_is_left(exported: ir.Model, tmp_path: Path) -> None:
    (mask,) = {node.inputs[3] for node in attention_nodes(exported)}
    old = mask.producer()
    assert old.op_type == "LessOrEqual"
    new = ir.node("Less", list(old.inputs), name="strict")
    new.outputs[0].name, new.outputs[0].shape, new.outputs[0].type = "strict", mask.shape, mask.type
    exported.graph.insert_before(old, new)
    mask.replace_all_uses_with(new.outputs[0])
    names = {str(node.name) for node in attention_nodes(exported)}
    result = FuseAttention(ctx_len=CTX).apply(exported, tmp_path)
    assert not result.modified
    assert result.facts["left"] == dict.fromkeys(names, "its mask is neither causal nor a sliding window")
    assert len(attention_nodes(exported)) == 2


def test_an_exported_state_that_is_written_elsewhere_is_left(exported: ir.Model, tmp_path: Path) -> None:
    first = attention_nodes(exported)[0]
    scatter = first.inputs[1].producer()
    assert scatter.op_type == "ScatterND"
    w = Writer()
    shifted = w.op("Add", scatter.inputs[1], np.array([0, 0, -1]))
    install(exported, scatter, w)
    scatter.replace_input_with(1, shifted)
    result = FuseAttention(ctx_len=CTX).apply(exported, tmp_path)
    assert result.facts["left"] == {str(first.name): "keys are not written to the slot of their position"}
    assert result.facts["fused"]["GroupQueryAttention"] == 1
    assert attention_nodes(exported) == [first]


def test_a_context_of_one_token() -> None:
    """The first token is the last: one logit, nothing before it."""
    reference = tiny_causal_lm("llama", **WIDE)
    compiled = QEFFAutoModelForCausalLM(reference)
    compiled.compile(ctx_len=1, progress=False)
    (expected,) = hf_logits(reference, [[9]])[0]
    out = compiled.generate(input_ids=np.array([[9]]), max_new_tokens=1)
    assert out.tolist() == [[9, int(expected.argmax())]]
    session = compiled._ready().session
    session.begin({"batch_size": 2, "ctx_len": 1})
    logits = session.run({"input_ids": np.array([[5], [9]]), "position_ids": np.array([[-1], [0]])}, "Decode")["logits"]
    assert_close(logits[1, 0], expected)

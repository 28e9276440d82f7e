"""FuseEncoderAttention: encoders without split heads give what the unfused graph and Hugging Face give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from tiny_models import sample_prompt, tiny_causal_lm, tiny_classifier, tiny_encoder
from transformers import PreTrainedModel

from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM, QEFFAutoModelForSequenceClassification
from QEfficient.onnx_io import load_model
from QEfficient.targets.manifest import Manifest
from QEfficient.transforms.onnx.fuse_encoder_attention import FuseEncoderAttention
from QEfficient.transforms.onnx.fusing import module_of

ROWS = [sample_prompt(n, n) for n in (9, 4, 1, 13, 7)]


def padded(rows: Sequence[Sequence[int]], side: str, pad: int) -> dict[str, np.ndarray]:
    width = max(map(len, rows)) + 2
    ids, mask = np.full((len(rows), width), pad, np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def alone(reference: PreTrainedModel, row: Sequence[int]) -> np.ndarray:
    """Hugging Face on one row without padding: token vectors [seq, hidden] or logits [labels]."""
    ids = torch.tensor([list(row)])
    return reference(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0].numpy()


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    feeds = feeds | {"token_type_ids": np.zeros_like(next(iter(feeds.values())))}
    return np.asarray(session.run(None, {name: array for name, array in feeds.items() if name in taken})[0])


def structure(model: ir.Model) -> list[Any]:
    """Every node with what it reads and writes."""
    return [(n.op_type, [v and v.name for v in n.inputs], [v.name for v in n.outputs]) for n in model.graph]


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return bool(np.abs(found - expected).max() <= tolerance * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "distilbert"])
def test_encoders_compute_the_same(family: str, tmp_path: Path) -> None:
    """Padded on either side; what padding computes may be anything, but not another thing than before."""
    reference = tiny_encoder(family)
    model = load_model(QEFFAutoModel(reference).export())
    before = Counter(node.op_type for node in model.graph)
    sides = {side: padded(ROWS, side, reference.config.pad_token_id) for side in ("left", "right")}
    plain = {side: run(model, feeds) for side, feeds in sides.items()}
    result = FuseEncoderAttention().apply(model, tmp_path)
    layers = reference.config.num_hidden_layers
    assert result.modified
    assert result.facts == {"fused": {"Attention": layers}, "left": {}}
    after = Counter(node.op_type for node in model.graph)
    assert before["Attention"] == after["Attention"] == layers
    assert before["Transpose"] - after["Transpose"] == 4 * layers
    assert all(node.inputs[0].is_initializer() for node in model.graph if node.op_type == "Transpose")
    assert not [v.name for node in model.graph for v in node.outputs if v.shape is not None and len(v.shape) == 4
                and v.dtype is ir.DataType.FLOAT]  # fmt: skip
    again = FuseEncoderAttention().apply(model, tmp_path)
    assert not again.modified
    assert set(again.facts["left"].values()) == {"its heads are joined already"}
    for side, feeds in sides.items():
        fused = run(model, feeds)
        assert close(fused, plain[side], 1e-6)
        # RoBERTa counts positions by the token ids, so it takes padding on the right only.
        if side == "right":
            for row, vectors, keep in zip(ROWS, fused, feeds["attention_mask"].astype(bool), strict=True):
                assert close(vectors[keep], alone(reference, row))
    assert {"layer.0" in module_of(node) or "layer.1" in module_of(node) for node in model.graph
            if node.op_type == "Attention"} == {True}  # fmt: skip


def test_packages() -> None:
    """Through the queue by name, pooled and as a classifier, on rows of any length."""
    encoder = tiny_encoder("bert")
    model = QEFFAutoModel(encoder, pooling="mean")
    package = Path(model.compile(transforms=["FuseEncoderAttention"], progress=False))
    # The host may run it by itself, too; then the second run finds nothing to do.
    record, *_ = [record for record in Manifest.load(package).transforms if record["name"] == "FuseEncoderAttention"]
    assert record["facts"] == {"fused": {"Attention": 2}, "left": {}}
    found = model.generate(**padded(ROWS, "left", 0))["output"]
    assert close(found, np.stack([alone(encoder, row).mean(0) for row in ROWS]))
    reference = tiny_classifier("bert")
    classifier = QEFFAutoModelForSequenceClassification(reference)
    classifier.compile(transforms=["FuseEncoderAttention"], progress=False)
    found = classifier.generate(**padded(ROWS, "left", 0))["logits"]
    assert close(found, np.stack([alone(reference, row) for row in ROWS]))


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (tiny_encoder("modernbert"), "its query is computed with its heads apart (by Add)"),  # rotated
        (tiny_encoder("llama"), "its query is computed with its heads apart (by Add)"),
        (tiny_causal_lm("gpt2"), "its key is read from a state"),
        (tiny_causal_lm("llama"), "heads apart"),
    ],
    ids=["modernbert", "llama-encoder", "gpt2", "llama"],
)
def test_what_needs_its_heads_apart_stays(reference: PreTrainedModel, words: str, tmp_path: Path) -> None:
    kind = QEFFAutoModelForCausalLM if hasattr(reference, "lm_head") else QEFFAutoModel
    model = load_model(kind(reference).export())
    before = structure(model)
    result = FuseEncoderAttention().apply(model, tmp_path)
    assert not result.modified
    assert result.facts["fused"] == {}
    modules = dict(reference.named_modules())
    assert len(result.facts["left"]) == reference.config.num_hidden_layers
    for name, reason in result.facts["left"].items():
        assert "attention" in type(modules[name.removeprefix("model.")]).__name__.lower()
        assert words in reason
    assert structure(model) == before


def test_a_graph_without_the_operator(tmp_path: Path) -> None:
    model = load_model(QEFFAutoModel(tiny_encoder("mpnet")).export())
    result = FuseEncoderAttention().apply(model, tmp_path)
    assert not result.modified
    assert result.facts == {"fused": {}, "left": {"graph": "it has no attention operator"}}


# ---------------------------------------------------------------------------------- written graphs


def written(
    heads: int = 4,
    kv_heads: int = 4,
    dim: int = 3,
    value_dim: int = 3,
    perm: Sequence[int] = (0, 2, 1, 3),
    split: Sequence[Any] = ("batch", "seq"),
    reused: bool = False,
    **attributes: Any,
) -> ir.Model:
    """Queries of one sequence, keys and values of another; ``reused`` returns the result with heads apart, too."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []

    def op(op_type: str, inputs: list[ir.Value], shape: Sequence[Any], **more: Any) -> ir.Value:
        node = ir.node(op_type, inputs, more, name=f"n{len(nodes)}")
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = f"v{len(nodes)}", ir.Shape(shape), kind
        nodes.append(node)
        return node.outputs[0]

    def numbers(*values: int) -> ir.Value:
        name = f"c{len(initializers)}"
        initializers.append(ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name)))
        return initializers[-1]

    def apart(x: ir.Value, length: str, count: int, size: int) -> ir.Value:
        dims = split if length == "seq" else ("batch", length)
        viewed = op("Reshape", [x, numbers(0, 0, count, size)], [*dims, count, size])
        turned = [[*dims, count, size][axis] for axis in perm]
        return op("Transpose", [viewed], turned, perm=list(perm))

    widths = {"q": ("seq", heads * dim), "k": ("keys", kv_heads * dim), "v": ("keys", kv_heads * value_dim)}
    q, k, v = (
        ir.Value(name=name, shape=ir.Shape(["batch", length, width]), type=kind)
        for name, (length, width) in widths.items()
    )
    mask = ir.Value(name="mask", shape=ir.Shape(["batch", 1, "seq", "keys"]), type=ir.TensorType(ir.DataType.BOOL))
    parts = [
        apart(q, "seq", heads, dim),
        apart(k, "keys", kv_heads, dim),
        apart(v, "keys", kv_heads, value_dim),
    ]
    result = op("Attention", [*parts, mask], ["batch", heads, "seq", value_dim], **attributes)
    turned = op("Transpose", [result], ["batch", "seq", heads, value_dim], perm=[0, 2, 1, 3])
    out = op("Reshape", [turned, numbers(0, 0, heads * value_dim)], ["batch", "seq", heads * value_dim])
    outputs = [out, result] if reused else [out]
    graph = ir.Graph([q, k, v, mask], outputs, nodes=nodes, initializers=initializers, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2},
        {"value_dim": 5},
        {"scale": 0.7},
        {"softcap": 2.0},
        {"heads": 1, "kv_heads": 1},
    ],
    ids=str,
)
def test_other_attention(options: dict[str, Any], tmp_path: Path) -> None:
    """Over another sequence, with shared heads, values of another width, and the operator's own attributes."""
    model = written(**options)
    generator = np.random.default_rng(0)
    sizes = {"batch": 2, "seq": 5, "keys": 7}
    feeds = {
        str(value.name): generator.normal(size=[sizes.get(str(d), d) for d in value.shape]).astype(np.float32)
        for value in model.graph.inputs
        if value.shape is not None
    }
    feeds["mask"] = generator.random(feeds["mask"].shape) < 0.6
    feeds["mask"][..., 0] = True
    expected = run(model, feeds)
    result = FuseEncoderAttention().apply(model, tmp_path)
    assert result.facts == {"fused": {"Attention": 1}, "left": {}}
    (node,) = model.graph
    assert node.attributes["q_num_heads"].as_int() == options.get("heads", 4)
    assert node.attributes["kv_num_heads"].as_int() == options.get("kv_heads", 4)
    assert close(run(model, feeds), expected, 1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"perm": (1, 2, 0, 3)}, "its query does not come from"),
        ({"split": ("seq", "batch")}, "its query does not come from"),
        ({"split": (None, None)}, "its query does not come from"),
        ({"reused": True}, "its result is not just joined"),
    ],
    ids=str,
)
def test_what_is_not_proven_stays(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = written(**options)
    before = structure(model)
    result = FuseEncoderAttention().apply(model, tmp_path)
    assert not result.modified
    (reason,) = result.facts["left"].values()
    assert words in reason
    assert structure(model) == before

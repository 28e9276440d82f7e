"""FuseNorms: packages with one operator per RMS norm compute what the spelled out ones and Hugging Face compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from tiny_models import greedy_reference, sample_prompt, save_tiny, tiny_causal_lm, tiny_encoder
from transformers import PreTrainedModel

from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM
from QEfficient.onnx_io import FileTensor, load_model
from QEfficient.targets.manifest import Manifest
from QEfficient.transforms.onnx.fuse_norms import FuseNorms

PROMPT = sample_prompt(11)
CHUNK = 4
#: Norms outside the layers and in each layer.
NORMS = {
    "llama": (1, 2),
    "gemma2": (1, 4),  # 1 + weight; before and after attention and MLP
    "qwen3": (1, 4),  # two of them over the dimension of a head
    "phi3": (1, 2),
    "gemma3": (1, 6),
    "mamba2": (1, 2),  # one of them over groups, whose weight comes after they are joined
}


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def structure(model: ir.Model) -> list[Any]:
    """Every node with what it reads, writes and is told; every initializer."""
    return [[(n.op_type, [v and v.name for v in n.inputs], [v.name for v in n.outputs]) for n in model.graph],
            [(name, value.const_value) for name, value in model.graph.initializers.items()]]  # fmt: skip


def session(model: ir.Model, level: str = "ORT_ENABLE_ALL") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def logits(model: ir.Model) -> np.ndarray:
    """float32 [steps, vocab]: after the prompt's first chunk, after the next ones and after each of two more tokens."""
    tokens = [*PROMPT, 5, 9]
    steps = [(start, min(start + CHUNK, len(PROMPT))) for start in range(0, len(PROMPT), CHUNK)]
    steps += [(place, place + 1) for place in range(len(PROMPT), len(tokens))]
    opened = session(model)
    sizes = {"batch_size": 1, "ctx_len": 16}
    state = {
        value.name: np.zeros([sizes.get(d, d) for d in value.shape], np.float32)
        for value in opened.get_inputs()
        if value.name not in ("input_ids", "position_ids")
    }
    found = []
    for start, end in steps:
        ids = np.array([tokens[start:end]], np.int64)
        feeds = {"input_ids": ids, "position_ids": np.arange(start, end, dtype=np.int64)[None], **state}
        names = [value.name for value in opened.get_outputs()]
        results = dict(zip(names, opened.run(names, feeds), strict=True))
        state = {name: results[f"{name}_RetainedState"] for name in state}
        found.append(results["logits"][0, 0])
    return np.stack(found)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    assert np.isfinite(found).all()
    return bool(np.abs(found - expected).max() <= tolerance * np.abs(expected).max())


@pytest.mark.parametrize("family", NORMS)
def test_causal_models_compute_the_same(family: str, tmp_path: Path) -> None:
    reference = tiny_causal_lm(family)
    model = load_model(QEFFAutoModelForCausalLM(reference).export())
    before, plain = operators(model), logits(model)
    result = FuseNorms().apply(model, tmp_path)
    outside, inside = NORMS[family]
    count = outside + inside * reference.config.num_hidden_layers
    assert result.modified
    assert result.facts == {"fused": {"RMSNormalization": count}, "sums_kept_apart": 0, "left": {}}
    after = operators(model)
    assert after["RMSNormalization"] == before["ReduceMean"] == before["Sqrt"] == count
    assert not {"ReduceMean", "Sqrt", "Reciprocal"} & set(after)
    fused = logits(model)
    assert close(fused, plain)
    again = FuseNorms().apply(model, tmp_path)
    assert not again.modified
    assert set(again.facts["left"].values()) == {"RMSNormalization is one operator already"}
    _, expected = greedy_reference(reference, PROMPT, 1)
    assert close(fused[2], expected[0], 1e-4)


def test_a_package(tmp_path: Path) -> None:
    """Through the queue by name: Hugging Face's tokens, and the facts in the manifest."""
    reference = tiny_causal_lm("qwen3")
    model = QEFFAutoModelForCausalLM(reference)
    package = Path(model.compile(ctx_len=32, prefill_seq_len=CHUNK, transforms=["FuseNorms"], progress=False))
    # The host may run it by itself, too; then the second run finds nothing to do.
    record, *_ = [record for record in Manifest.load(package).transforms if record["name"] == "FuseNorms"]
    assert record["facts"] == {"fused": {"RMSNormalization": 9}, "sums_kept_apart": 0, "left": {}}
    tokens, _ = greedy_reference(reference, PROMPT, 8)
    found = np.asarray(model.generate(input_ids=np.asarray([PROMPT]), max_new_tokens=8, do_sample=False))
    assert found[0, len(PROMPT) :].tolist() == tokens


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_stored_weights_stay_what_and_where_they_are(family: str, tmp_path: Path) -> None:
    """Of a bfloat16 checkpoint: gamma is read through its Cast, Gemma's sum stays in the graph."""
    source = save_tiny(tiny_causal_lm(family), tmp_path / family, torch.bfloat16)
    model = load_model(QEFFAutoModelForCausalLM.from_pretrained(source).export())
    weights = {name: value.const_value for name, value in model.graph.initializers.items() if "norm" in name}
    plain = logits(model)
    result = FuseNorms().apply(model, tmp_path)
    assert result.facts == {"fused": {"RMSNormalization": len(weights)}, "sums_kept_apart": 0, "left": {}}
    for name, tensor in weights.items():
        assert isinstance(tensor, FileTensor)
        assert tensor.dtype is ir.DataType.BFLOAT16
        assert model.graph.initializers[name].const_value is tensor
    assert close(logits(model), plain)


def test_a_norm_that_is_the_output(tmp_path: Path) -> None:
    reference = tiny_encoder("llama")
    model = load_model(QEFFAutoModel(reference).export())
    assert FuseNorms().apply(model, tmp_path).facts["fused"] == {"RMSNormalization": 5}
    assert [value.name for value in model.graph.outputs] == ["output"]
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        wanted = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.numpy()
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    assert close(session(model).run(["output"], feeds)[0], wanted)


def optimized(model: ir.Model, path: Path) -> Counter[str]:
    """The operators ONNX Runtime makes of a graph."""
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(path)
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    ("reference", "norms", "sums"),
    [(tiny_causal_lm("gpt2"), 5, 1), (tiny_encoder("bert"), 5, 4), (tiny_encoder("modernbert"), 7, 1)],
    ids=["gpt2", "bert", "modernbert"],
)
def test_layer_norms_stay(reference: PreTrainedModel, norms: int, sums: int, tmp_path: Path) -> None:
    """Each with its module and a reason, and without the sum before it; nothing else in the graph changes."""
    causal = reference.config.model_type == "gpt2"
    model = load_model((QEFFAutoModelForCausalLM if causal else QEFFAutoModel)(reference).export())
    before = operators(model)
    assert optimized(model, tmp_path / "before.onnx")["SkipLayerNormalization"] == sums
    ids = np.array([PROMPT])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    feeds = {value.name: feeds[value.name] for value in session(model).get_inputs() if value.name in feeds}
    plain = logits(model) if causal else session(model).run(None, feeds)[0]
    result = FuseNorms().apply(model, tmp_path)
    assert result.modified
    assert result.facts["fused"] == {}
    assert result.facts["sums_kept_apart"] == sums
    assert len(result.facts["left"]) == norms
    modules = dict(reference.named_modules())
    for name, reason in result.facts["left"].items():
        assert isinstance(modules[name.removeprefix("model.")], torch.nn.LayerNorm), name
        assert "one operator" in reason
    assert operators(model) == before - Counter(Add=sums) + Counter(Sum=sums)
    assert optimized(model, tmp_path / "after.onnx")["SkipLayerNormalization"] == 0
    assert close(logits(model) if causal else session(model).run(None, feeds)[0], plain)


# ---------------------------------------------------------------------------------- forms, and what is none

WIDTH = 6
Build = Callable[[Any, ir.Value, ir.Value], ir.Value]


class Written:
    """Writes a graph down: operators by name, constants as they come."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def constant(self, value: Any) -> ir.Value:
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        return self("Constant", value=ir.tensor(array))

    def __call__(self, op_type: str, *inputs: Any, **attributes: Any) -> ir.Value:
        values = [v if isinstance(v, ir.Value) else self.constant(v) for v in inputs]
        node = ir.node(op_type, values, attributes, name=f"{op_type}_{len(self.nodes)}")
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]


def mean_of_squares(op: Written, x: ir.Value, **attributes: Any) -> ir.Value:
    return op("ReduceMean", op("Pow", x, 2.0), [-1], keepdims=1, **attributes)


def written(build: Build, opset: int = 23, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """``build(op, x [rows, 3, WIDTH], weight [WIDTH])`` as a model with the outputs ``y`` and ``again``."""
    op = Written()
    x = ir.Value(name="x", shape=ir.Shape(["rows", 3, WIDTH]), type=ir.TensorType(dtype))
    weight = np.random.default_rng(1).normal(size=WIDTH).astype(dtype.numpy())
    w = ir.Value(name="w", shape=ir.Shape([WIDTH]), type=ir.TensorType(dtype), const_value=ir.tensor(weight, name="w"))
    y = op("Identity", build(op, x, w))
    y.name = "y"
    graph = ir.Graph([x], [y], nodes=op.nodes, initializers=[w], opset_imports={"": opset}, name="written")
    model = ir.Model(graph, ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def run(model: ir.Model) -> np.ndarray:
    opened = session(model, "ORT_DISABLE_ALL")
    x = np.random.default_rng(0).normal(size=(2, 3, WIDTH)) * [[[1], [1e-3], [30]]]
    kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[opened.get_inputs()[0].type]
    return np.asarray(opened.run(None, {"x": x.astype(kind)})[0], np.float64)


def root(op: Written, x: ir.Value) -> ir.Value:
    return op("Sqrt", op("Add", mean_of_squares(op, x), 1e-5))


FORMS: dict[str, Build] = {
    "reciprocal": lambda op, x, w: op("Mul", op("Mul", x, op("Reciprocal", root(op, x))), w),
    "turned round": lambda op, x, w: op(
        "Mul", w, op("Mul", op("Reciprocal", op("Sqrt", op("Add", 1e-5, mean_of_squares(op, x)))), x)
    ),
    "quotient": lambda op, x, w: op("Mul", w, op("Div", x, root(op, x))),
    "one by root": lambda op, x, w: op("Mul", op("Mul", x, op("Div", 1.0, root(op, x))), w),
    "power": lambda op, x, w: op("Mul", op("Mul", x, op("Pow", op("Add", mean_of_squares(op, x), 1e-5), -0.5)), w),
    "product": lambda op, x, w: op(
        "Mul", op("Div", x, op("Sqrt", op("Add", op("ReduceMean", op("Mul", x, x), [2], keepdims=1), 1e-5))), w
    ),
    "one more": lambda op, x, w: op("Mul", op("Mul", x, op("Reciprocal", root(op, x))), op("Add", w, 1.0)),
    "no weight": lambda op, x, w: op("Add", op("Div", x, root(op, x)), w),
    "a gate": lambda op, x, w: op("Mul", op("Div", x, root(op, x)), op("Sigmoid", x)),
    "one factor": lambda op, x, w: op("Mul", op("Div", x, root(op, x)), 3.0),
    "read twice": lambda op, x, w: (lambda n: op("Add", op("Mul", n, w), n))(op("Div", x, root(op, x))),
    "centred": lambda op, x, w: (lambda c: op("Mul", op("Div", c, root(op, c)), w))(
        op("Sub", x, op("ReduceMean", x, [-1], keepdims=1))
    ),
    "twice": lambda op, x, w: (lambda n: op("Div", n, root(op, n)))(op("Mul", op("Div", x, root(op, x)), w)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, tmp_path: Path) -> None:
    model = written(FORMS[form])
    expected = run(model)
    result = FuseNorms().apply(model, tmp_path)
    count = 2 if form == "twice" else 1
    assert result.facts == {"fused": {"RMSNormalization": count}, "sums_kept_apart": 0, "left": {}}
    found = run(model)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    # A factor of one number per column is the weight, any other stays outside.
    ones = [v for v in model.graph.initializers.values() if v.name != "w"]
    inside = form in ("no weight", "a gate", "one factor", "read twice", "twice")
    assert len(ones) == inside
    assert all((v.const_value.numpy() == 1).all() and v.const_value.shape == (WIDTH,) for v in ones)


NO_NORMS: dict[str, tuple[Build, str]] = {
    "other axis": (
        lambda op, x, w: op("Div", x, op("Sqrt", op("Add", op("ReduceMean", op("Pow", x, 2.0), [1]), 1e-5))),
        "not over the last axis",
    ),
    "both axes": (
        lambda op, x, w: op("Div", x, op("Sqrt", op("Add", op("ReduceMean", op("Pow", x, 2.0), [1, 2]), 1e-5))),
        "not over the last axis",
    ),
    "no epsilon": (lambda op, x, w: op("Div", x, op("Sqrt", mean_of_squares(op, x))), "is not x / sqrt"),
    "epsilon per column": (
        lambda op, x, w: op("Div", x, op("Sqrt", op("Add", mean_of_squares(op, x), w))),
        "is not x / sqrt",
    ),
    "another x": (lambda op, x, w: op("Div", op("Exp", x), root(op, x)), "is not x / sqrt"),
    "root by x": (lambda op, x, w: op("Div", root(op, x), x), "is not x / sqrt"),
    "two by root": (lambda op, x, w: op("Mul", x, op("Div", 2.0, root(op, x))), "is not x / sqrt"),
    "power of -1": (
        lambda op, x, w: op("Mul", x, op("Pow", op("Add", mean_of_squares(op, x), 1e-5), -1.0)),
        "is not x / sqrt",
    ),
    "root read twice": (lambda op, x, w: (lambda r: op("Add", op("Div", x, r), r))(root(op, x)), "elsewhere"),
    "mean read twice": (
        lambda op, x, w: (lambda m: op("Add", op("Div", x, op("Sqrt", op("Add", m, 1e-5))), m))(mean_of_squares(op, x)),
        "elsewhere",
    ),
    "no norm": (lambda op, x, w: op("Add", op("ReduceMean", op("Pow", x, 3.0), [-1], keepdims=1), w), "no norm"),
}


@pytest.mark.parametrize("case", NO_NORMS)
def test_what_is_no_norm_stays(case: str, tmp_path: Path) -> None:
    build, words = NO_NORMS[case]
    model = written(build)
    before = structure(model)
    result = FuseNorms().apply(model, tmp_path)
    assert not result.modified
    assert result.facts["fused"] == {}
    (reason,) = result.facts["left"].values()
    assert words in reason
    assert structure(model) == before


@pytest.mark.parametrize(
    ("opset", "dtype", "words"), [(22, ir.DataType.FLOAT, "opset 23"), (23, ir.DataType.FLOAT16, "FLOAT16")]
)
def test_where_the_operator_does_not_fit(opset: int, dtype: ir.DataType, words: str, tmp_path: Path) -> None:
    def build(op: Written, x: ir.Value, w: ir.Value) -> ir.Value:
        two, epsilon = (op("Constant", value=ir.tensor(np.array(v, dtype.numpy()))) for v in (2.0, 1e-3))
        mean = op("ReduceMean", op("Pow", x, two), [-1], keepdims=1)
        return op("Mul", op("Div", x, op("Sqrt", op("Add", mean, epsilon))), w)

    model = written(build, opset, dtype)
    result = FuseNorms().apply(model, tmp_path)
    assert not result.modified
    assert words in next(iter(result.facts["left"].values()))
    assert np.isfinite(run(model)).all()

"""LoraAdapters: a lifted weight is fed from outside, wherever it is read; checked with plain ONNX Runtime and numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_models import greedy_reference, sample_prompt, tiny_causal_lm

from QEfficient import QEFFAutoModelForCausalLM, load
from QEfficient.errors import OptionError, TransformError
from QEfficient.targets.manifest import Manifest
from QEfficient.transforms.onnx.lora_adapters import LoraAdapters
from QEfficient.transforms.onnx.queue import resolve, run_queue

RANDOM = np.random.default_rng(0)
A = RANDOM.normal(size=(2, 4)).astype(np.float32)
B = RANDOM.normal(size=(4, 2)).astype(np.float32)
SCALING = np.array([3.0, 0.5], np.float32)
X = RANDOM.normal(size=(5, 4)).astype(np.float32)


def graph(inside: bool = False) -> ir.Model:
    """y = x (A^T B^T) s[1] + x A^T A, and, when the flag is set, B's first row added inside an ``If``.

    A has two readers; B is read in a subgraph, where it is an initializer of its own when ``inside``.
    """
    nodes = [
        helper.make_node("Transpose", ["q.lora_A.weight"], ["at"], perm=[1, 0]),
        helper.make_node("Transpose", ["q.lora_B.weight" if not inside else "plain"], ["bt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "at"], ["low"]),
        helper.make_node("MatMul", ["low", "bt"], ["high"]),
        helper.make_node("Gather", ["lora_scaling", "one"], ["s"]),
        helper.make_node("Mul", ["high", "s"], ["scaled"]),
        helper.make_node("MatMul", ["low", "q.lora_A.weight"], ["again"]),
        helper.make_node("Add", ["scaled", "again"], ["sum"]),
    ]
    then = helper.make_graph(
        [helper.make_node("MatMul", ["sum", "q.lora_B.weight"], ["then_out"])],
        "then",
        [],
        [helper.make_tensor_value_info("then_out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(B, "q.lora_B.weight")] if inside else [],
    )
    other = helper.make_graph(
        [helper.make_node("MatMul", ["sum", "at"], ["else_out"])],
        "else",
        [],
        [helper.make_tensor_value_info("else_out", TensorProto.FLOAT, None)],
    )
    nodes.append(helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other))
    initializers = {"q.lora_A.weight": A, "lora_scaling": SCALING, "one": np.array(1, np.int64)}
    initializers |= {"plain": B} if inside else {"q.lora_B.weight": B}
    body = helper.make_graph(
        nodes,
        "adapted",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(proto)
    return ir.serde.deserialize_model(proto)


def expected(a: np.ndarray, b: np.ndarray, s: np.ndarray, flag: bool, inner: np.ndarray | None = None) -> np.ndarray:
    total = X @ a.T @ b.T * s[1] + X @ a.T @ a
    return total @ (b if inner is None else inner) if flag else total @ a.T


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


def lift(model: ir.Model, tmp_path: Path, *names: str) -> dict[str, Any]:
    transform = LoraAdapters(names) if names else LoraAdapters()
    (record,) = run_queue(model, [transform], tmp_path, lambda *_: None)
    return record


@pytest.mark.parametrize("flag", [True, False])
def test_two_consumers_and_a_subgraph_read_what_is_fed(tmp_path: Path, flag: bool) -> None:
    model = graph()
    np.testing.assert_allclose(run(model, x=X, flag=np.array(flag)), expected(A, B, SCALING, flag), rtol=1e-5)
    record = lift(model, tmp_path)
    assert record["facts"] == {"inputs": ["q.lora_A.weight", "q.lora_B.weight", "lora_scaling"]}
    assert [value.name for value in model.graph.inputs] == ["x", "flag", *record["facts"]["inputs"]]
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    a, b, s = -2 * A + 1, B[::-1].copy(), np.array([9.0, -4.0], np.float32)
    feeds = {"q.lora_A.weight": a, "q.lora_B.weight": b, "lora_scaling": s}
    np.testing.assert_allclose(run(model, x=X, flag=np.array(flag), **feeds), expected(a, b, s, flag), rtol=2e-5)


def test_an_initializer_of_a_subgraph(tmp_path: Path) -> None:
    model = graph(inside=True)
    assert lift(model, tmp_path, "*.lora_B.*")["facts"] == {"inputs": ["q.lora_B.weight"]}
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    inner = RANDOM.normal(size=(4, 2)).astype(np.float32)
    found = run(model, x=X, flag=np.array(True), **{"q.lora_B.weight": inner})
    np.testing.assert_allclose(found, expected(A, B, SCALING, True, inner), rtol=2e-5)


def test_names_patterns_and_the_default_of_an_input(tmp_path: Path) -> None:
    """An exact name wins over its reading as a pattern; a lifted default leaves one input, not two."""
    model = graph()
    value = model.graph.initializers["lora_scaling"]
    value.shape, value.type = ir.Shape([2]), ir.TensorType(ir.DataType.FLOAT)
    model.graph.inputs.append(value)
    record = lift(model, tmp_path, "lora_scaling", "q.lora_?.weight")
    assert record["facts"]["inputs"] == ["lora_scaling", "q.lora_A.weight", "q.lora_B.weight"]
    names = [value.name for value in model.graph.inputs]
    assert sorted(names) == sorted(set(names))
    assert set(model.graph.initializers) == {"one"}


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (("q.lora_A.wieght",), "Did you mean 'q.lora_A.weight'"),
        (("q.lora_A.weight", "*.lora_C.*"), r"'\*\.lora_C\.\*' matches none of the graph's 4 initializers"),
    ],
)
def test_a_pattern_that_matches_nothing_changes_nothing(tmp_path: Path, names: tuple[str, ...], hint: str) -> None:
    model = graph()
    with pytest.raises(TransformError, match=hint):
        lift(model, tmp_path, *names)
    assert [value.name for value in model.graph.inputs] == ["x", "flag"]
    assert "q.lora_A.weight" in model.graph.initializers


def test_the_queue_knows_it_by_name() -> None:
    (transform,) = resolve(["LoraAdapters:names=*.bias|lm_head.weight"])
    assert transform.parameters() == {"names": ("*.bias", "lm_head.weight")}
    assert resolve(["LoraAdapters"])[0].identity() != transform.identity()
    for bad in ((), "", ("a", ""), (1,)):
        with pytest.raises(OptionError, match="names or patterns"):
            LoraAdapters(bad)  # type: ignore[arg-type]


def test_a_weight_of_a_model_becomes_a_parameter_of_its_package(tmp_path: Path) -> None:
    """Any trained tensor: tied ones, too, since embedding and head are then one initializer with two readers."""
    hf = tiny_causal_lm("llama_tied")
    model = QEFFAutoModelForCausalLM(hf, cache_home_dir=tmp_path)
    names = ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight")
    package = model.compile(ctx_len=16, prefill_seq_len=8, transforms=[LoraAdapters(names)], progress=False)
    assert [(p.name, p.dtype) for p in Manifest.load(package).parameters] == [(name, "float32") for name in names]
    prompt = sample_prompt(7)
    answers = []
    for factor in (1.0, -1.5):
        other = tiny_causal_lm("llama_tied")
        tensors = dict(other.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name in names:
                tensors[name].mul_(factor)
        answers.append(greedy_reference(other, prompt, 6)[0])
        with load(package) as opened:
            opened.session.set_parameters({name: tensors[name].detach().numpy() for name in names})
            assert opened.generate(input_ids=np.array([prompt]), max_new_tokens=6)[0, 7:].tolist() == answers[-1]
    assert answers[0] != answers[1]

"""QuantizeWeights: packages compute with the stored values, share tied tables, and leave the old weights behind."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import greedy_reference, sample_prompt, tiny_causal_lm, tiny_encoder
from transformers import PreTrainedModel

from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM
from QEfficient.errors import OptionError, TransformError
from QEfficient.onnx_io import file_tensors, load_model
from QEfficient.transforms.onnx.quantize_weights import QuantizeWeights, quantize_groups
from QEfficient.transforms.onnx.queue import resolve

WIDE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160}


def stored_weights(package: Path, bits: int) -> dict[str, np.ndarray]:
    """Weight name -> [outputs, inputs rounded up to whole groups], element by element from the format's definition."""
    tensors = {
        str(v.name): v.const_value.numpy()
        for v in load_model(package / "program.onnx").graph.initializers.values()
        if v.const_value is not None
    }
    found = {}
    for name in [n.removesuffix(".quantized") for n in tensors if n.endswith(".quantized")]:
        data, scale, zeros = tensors[f"{name}.quantized"], tensors[f"{name}.scale"], tensors.get(f"{name}.zero_point")
        data = data.reshape(*scale.shape, -1)  # a table's groups lie in one row
        outputs, groups, size = data.shape
        group = size * 8 // bits
        full = np.zeros((outputs, groups * group), np.float32)
        for n in range(outputs):
            for g in range(groups):
                zero = 2 ** (bits - 1)
                if zeros is not None:
                    zero = int(zeros[n, g]) if bits == 8 else int(zeros[n, g // 2]) >> (4 * (g % 2)) & 15
                for k in range(group):
                    value = int(data[n, g, k]) if bits == 8 else int(data[n, g, k // 2]) >> (4 * (k % 2)) & 15
                    full[n, g * group + k] = (value - zero) * scale[n, g]
        found[name] = full
    return found


def put_into(model: PreTrainedModel, weights: dict[str, np.ndarray]) -> int:
    """Gives a torch model the stored weights; returns how many."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, full in weights.items():
        old = parameters[name].data
        turned = ".c_" in name  # GPT-2's layers have [inputs, outputs]
        new = torch.tensor(full[:, : old.shape[0]].T if turned else full[:, : old.shape[1]])
        assert new.shape == old.shape
        assert 0 < (new - old).abs().max() < 0.25 * old.abs().max()
        parameters[name].data.copy_(new)
    return len(weights)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", WIDE), ("llama_tied", WIDE), ("gemma2", WIDE), ("qwen3", WIDE), ("gpt2", {"n_embd": 96})],
)
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (4, 64, False), (8, 16, True)])
def test_text_is_that_of_the_stored_weights(
    family: str, options: dict[str, Any], bits: int, group: int, symmetric: bool
) -> None:
    """Hugging Face with the stored weights gives the same tokens; products in float, so that they can be compared."""
    reference = tiny_causal_lm(family, **options)
    compiled = QEFFAutoModelForCausalLM(reference)
    transform = QuantizeWeights(bits, group, symmetric, accuracy_level=1)
    package = Path(compiled.compile(ctx_len=32, prefill_seq_len=5, transforms=[transform]))
    assert put_into(reference, stored_weights(package, bits)) >= 6
    ids = sample_prompt(12, 1)
    tokens, _ = greedy_reference(reference, ids, 10)
    found = np.asarray(compiled.generate(input_ids=np.asarray([ids], np.int64), max_new_tokens=10, do_sample=False))
    assert found[0, len(ids) :].tolist() == tokens


@pytest.mark.parametrize(("bits", "level", "tolerance"), [(4, 1, 1e-5), (8, 0, 1e-5), (4, 4, 0.03), (8, 4, 0.03)])
def test_vectors_are_those_of_the_stored_weights(bits: int, level: int, tolerance: float) -> None:
    """Level 4 rounds activations to 8 bits and stays close."""
    reference = tiny_encoder("bert", **WIDE)
    compiled = QEFFAutoModel(reference)
    package = Path(compiled.compile(transforms=[QuantizeWeights(bits, 32, accuracy_level=level)]))
    assert put_into(reference, stored_weights(package, bits)) >= 6
    ids = torch.tensor([sample_prompt(9, 3)])
    with torch.no_grad():
        wanted = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.numpy()
    got = compiled.generate({"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)})["output"]
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)
    if level == 4:
        assert np.abs(got - wanted).max() > 1e-4, "activations were not rounded"


def test_a_tied_table_is_stored_once_and_the_old_weights_are_left_behind(tmp_path: Path) -> None:
    model = QEFFAutoModelForCausalLM.from_pretrained("examples/demo_model/model")
    sizes = {}
    for bits in (4, 8):
        package = Path(model.compile(ctx_len=64, transforms=[f"QuantizeWeights:bits={bits},group_size=32"]))
        facts = json.loads((package / "manifest.json").read_text())["transforms"][0]["facts"]
        assert facts["left"] == {}
        sizes[bits] = sum(path.stat().st_size for path in (package / "weights").rglob("*") if path.is_file())
        assert sizes[bits] < 1.05 * facts["bytes_after"] + 100_000
        program = load_model(package / "program.onnx")
        (table,) = [node for node in program.graph if node.op_type == "GatherBlockQuantized"]
        rows = table.inputs[0].const_value
        head = file_tensors(program)[str(rows.name).removesuffix(".rows")]
        assert (head.file, head.offset, head.length) == (rows.file, rows.offset, rows.length)
    # Per weight: half a byte or one, and four bytes of scale for 32.
    assert sizes[4] / sizes[8] == pytest.approx((0.5 + 4 / 32) / (1 + 4 / 32), rel=0.05)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4), columns=st.integers(1, 70), group=st.sampled_from([16, 32]), bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(), seed=st.integers(0, 2**16), scale=st.sampled_from([1e-6, 1.0, 1e6]),
)  # fmt: skip
def test_rounding_error_is_bounded(
    rows: int, columns: int, group: int, bits: int, symmetric: bool, seed: int, scale: float
) -> None:
    x = (np.random.default_rng(seed).normal(size=(rows, columns)) * scale).astype(np.float32)
    x[0, 0] = 0
    values, scales, zeros = quantize_groups(x, bits, group, symmetric)
    assert values.shape == (rows, math.ceil(columns / group), group)
    back = ((values.astype(np.float64) - zeros[..., None]) * scales[..., None]).reshape(rows, -1)[:, :columns]
    assert back[0, 0] == 0
    step = np.repeat(np.abs(scales), group, axis=1)[:, :columns]
    # The end of the range may be a whole step away: it has no counterpart, or the zero point was rounded.
    assert (np.abs(back - x) <= step * 1.001).all()
    inside = (values.reshape(rows, -1)[:, :columns] > 0) & (values.reshape(rows, -1)[:, :columns] < 2**bits - 1)
    assert (np.abs(back - x)[inside] <= step[inside] * 0.5005).all()
    if symmetric:
        for row in range(rows):
            for g in range(0, columns, group):
                part = x[row, g : g + group]
                peak = np.abs(part).argmax()
                assert back[row, g + peak] == pytest.approx(part[peak], rel=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bits=3", "4 or 8 bits, got 3"),
        ("group_size=48", "group_size must be one of"),
        ("accuracy_level=2", "accuracy_level must be 0, 1 or 4"),
        ("symmetric=maybe", "neither true nor false"),
        ("group=32", "Did you mean 'group_size'"),
    ],
)
def test_bad_parameters(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        resolve([f"QuantizeWeights:{text}"])


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    weight = np.ones((64, 64), np.float32)
    weight[3, 3] = np.inf
    x = ir.Value(name="x", shape=ir.Shape(["rows", 64]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(
        name="w", shape=ir.Shape((64, 64)), type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(weight)
    )
    node = ir.node("MatMul", [x, w])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 23}, name="g")
    with pytest.raises(TransformError, match="w holds infinities or NaN"):
        QuantizeWeights().apply(ir.Model(graph, ir_version=10), tmp_path)

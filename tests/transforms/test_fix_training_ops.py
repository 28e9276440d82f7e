"""FixTrainingOps: every rule against ONNX Runtime's own operator, and whole training steps in basic operators."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper
from training_steps import FAMILIES, feeds, run, worst

from QEfficient.errors import OptionError, TransformError
from QEfficient.transforms.onnx.fix_training_ops import BASIC, FixTrainingOps
from QEfficient.transforms.onnx.queue import resolve

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def whole(high, *shape, low=0):
    return RNG.integers(low, high, shape)


#: Name -> operator, inputs (a tuple marks a constant), attributes, outputs.
CASES = {
    "scatter_add_duplicates": ("ScatterND", [normal(5, 3), whole(5, 9, 1, low=-5), normal(9, 3)], {"reduction": "add"}),
    "scatter_add_pairs": ("ScatterND", [normal(4, 3, 2), whole(3, 7, 2), normal(7, 2)], {"reduction": "add"}),
    "scatter_add_full_depth": ("ScatterND", [normal(4, 3), whole(3, 7, 2), normal(7)], {"reduction": "add"}),
    "scatter_add_batched": ("ScatterND", [normal(6, 3), whole(6, 2, 4, 1), normal(2, 4, 3)], {"reduction": "add"}),
    "scatter_write": ("ScatterND", [normal(5, 3), np.array([[4], [1], [-3]]), normal(3, 3)], {}),
    "scatter_large_integers": ("ScatterND", [whole(9, 6), np.array([[5], [0], [2]]), whole(2**60, 3)], {}),
    "scatter_nothing": ("ScatterND", [normal(5, 3), whole(5, 0, 1), normal(0, 3)], {"reduction": "add"}),
    "scatter_elements_add": (
        "ScatterElements", [normal(4, 6), whole(6, 4, 5, low=-6), normal(4, 5)], {"axis": 1, "reduction": "add"},
    ),
    "scatter_elements_first_axis": (
        "ScatterElements", [normal(4, 6), whole(4, 3, 6), normal(3, 6)], {"axis": 0, "reduction": "add"},
    ),
    "scatter_elements_write": (
        "ScatterElements", [normal(3, 4), np.array([[1, -1], [0, 2], [3, 1]]), normal(3, 2)], {"axis": -1},
    ),
    "gather_elements": ("GatherElements", [normal(4, 6), whole(6, 4, 2, low=-6)], {"axis": 1}),
    "gather_elements_first_axis": ("GatherElements", [normal(4, 3, 2), whole(4, 5, 3, 2)], {"axis": 0}),
    "gather_elements_infinite": (
        "GatherElements", [np.array([[np.inf, 1, -np.inf]], np.float32), np.array([[1, 2, 0]])], {"axis": 1},
    ),
    "gather_elements_integers": ("GatherElements", [whole(2**60, 1, 6), whole(6, 1, 9)], {"axis": 1}),
    "gather_nd": ("GatherND", [normal(4, 3, 5), whole(3, 7, 2, low=-3)], {}),
    "gather_nd_elements": ("GatherND", [normal(4, 3), whole(3, 2, 2, 2)], {}),
    "gelu": ("Gelu", [normal(50) * 4], {}),
    "gelu_tanh": ("Gelu", [normal(50) * 4], {"approximate": "tanh"}),
    "layer_norm": ("LayerNormalization", [normal(3, 4, 8), normal(8), normal(8)], {"epsilon": 1e-3}, 3),
    "layer_norm_plain": ("LayerNormalization", [normal(3, 8), normal(8)], {}),
    "layer_norm_two_axes": ("LayerNormalization", [normal(3, 4, 8), normal(4, 8)], {"axis": 1}, 3),
    "log_softmax": ("LogSoftmax", [normal(4, 9) * 50], {"axis": -1}),
    "softmax": ("Softmax", [normal(4, 9) * 50], {"axis": 0}),
    "is_nan": ("IsNaN", [np.array([1, np.nan, np.inf], np.float32)], {}),
    "is_inf": ("IsInf", [np.array([1, np.nan, np.inf, -np.inf], np.float32)], {}),
    "is_plus_inf": ("IsInf", [np.array([1, np.nan, np.inf, -np.inf], np.float32)], {"detect_negative": 0}),
    "xor": ("Xor", [whole(2, 3, 4).astype(bool), whole(2, 4).astype(bool)], {}),
    "sign": ("Sign", [np.array([-3.0, 0, 2], np.float32)], {}),
    "sign_integers": ("Sign", [np.array([-3, 0, 2])], {}),
    "reciprocal": ("Reciprocal", [np.array([-3.0, 0, 2], np.float32)], {}),
    "mean": ("ReduceMean", [normal(3, 4, 5), (np.array([0, -1]),)], {"keepdims": 0}),
    "mean_of_all": ("ReduceMean", [normal(3, 4)], {"keepdims": 1}),
    "gemm": ("Gemm", [normal(5, 3), normal(4, 5), normal(4)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    "gemm_plain": ("Gemm", [normal(5, 3), normal(3, 2)], {}),
    "triu": ("Trilu", [normal(2, 4, 5), (np.array(1),)], {"upper": 1}),
    "tril": ("Trilu", [normal(5, 4)], {"upper": 0}),
    "cumsum": ("CumSum", [normal(3, 5), (np.array(1),)], {}),
    "cumsum_exclusive": ("CumSum", [normal(3, 5, 2), (np.array(1),)], {"exclusive": 1}),
    "cumsum_reverse": ("CumSum", [whole(9, 4, 3), (np.array(0),)], {"reverse": 1}),
    "cumsum_both": ("CumSum", [whole(9, 4), (np.array(0),)], {"reverse": 1, "exclusive": 1}),
    "pad_constant": ("Pad", [normal(2, 3), (np.array([0, 1, 2, 0]),), (np.float32(7),)], {}),
    "pad_dynamic": ("Pad", [normal(2, 3), np.array([0, 1, 2, 0])], {}),
    "pad_one_axis": ("Pad", [normal(2, 3, 4), (np.array([2, 1]),), (np.float32(0),), (np.array([-2]),)], {}),
    "split": ("Split", [normal(4, 6), (np.array([1, 0, 5]),)], {"axis": -1}, 3),
    "split_evenly": ("Split", [normal(5, 2)], {"axis": 0, "num_outputs": 3}, 3),
    "top_k": ("TopK", [normal(4, 9), (np.array([3]),)], {"axis": -1}, 2),
    "top_k_ties": ("TopK", [whole(3, 4, 9).astype(np.float32), (np.array([9]),)], {"axis": -1}, 2),
    "top_k_smallest_integers": ("TopK", [whole(5, 7, 3), (np.array([4]),)], {"axis": 0, "largest": 0}, 2),
}  # fmt: skip


def single(op_type, inputs, attributes, outputs=1) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A model of one node; sizes of its inputs are symbols where the operator allows it."""
    names, declared, constants, given = [], [], [], {}
    for number, value in enumerate(inputs):
        name = f"i{number}"
        names.append(name)
        array = np.asarray(value[0] if isinstance(value, tuple) else value)
        if isinstance(value, tuple):
            constants.append(onnx.numpy_helper.from_array(array, name))
        else:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            symbolic = op_type not in ("Split", "ScatterND", "GatherND")
            declared.append(
                helper.make_tensor_value_info(
                    name, kind, [f"d{number}{i}" if symbolic else d for i, d in enumerate(array.shape)]
                )
            )
            given[name] = array
    results = [f"o{number}" for number in range(outputs)]
    node = helper.make_node(op_type, names, results, name="the_node", **attributes)
    untyped = [helper.make_value_info(name, onnx.TypeProto()) for name in results]
    graph = helper.make_graph([node], "g", declared, untyped, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model)
    return ir.from_proto(inferred), given


def evaluate(model: ir.Model, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, given)


@pytest.mark.parametrize("case", CASES)
def test_a_rule_computes_what_the_operator_does(case, tmp_path):
    op_type = CASES[case][0]
    model, given = single(*CASES[case])
    wanted = evaluate(model, given)
    facts = FixTrainingOps("basic", (op_type,)).apply(model, tmp_path).facts
    assert op_type in facts["replaced"]
    assert {node.op_type for node in model.graph} <= BASIC - {op_type}
    got = evaluate(model, given)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


def test_duplicates_against_numpy(tmp_path):
    data, index, updates = normal(5, 3), whole(5, 40, 1), normal(40, 3)
    model, given = single("ScatterND", [data, index, updates], {"reduction": "add"})
    FixTrainingOps().apply(model, tmp_path)
    wanted = data.astype(np.float64)
    np.add.at(wanted, index[:, 0], updates)
    np.testing.assert_allclose(evaluate(model, given)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unsupported", [(), ("TopK", "Split", "Gemm", "Softmax", "ReduceMean", "Reciprocal", "Sign")])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_steps(captured, family, unsupported, tmp_path):
    plain, model = captured(family), captured(family)
    result = FixTrainingOps("basic", unsupported).apply(model, tmp_path)
    assert result.modified
    assert {node.op_type for node in model.graph} <= BASIC - set(unsupported)
    for batch, seq, rows in ((3, 17, 20), (1, 9, 1)):
        inputs = feeds(plain, batch, seq, rows)
        assert worst(run(model, inputs), run(plain, inputs)) < 1e-5


def test_the_host_takes_everything(captured, tmp_path):
    model = captured("llama")
    before = [node.op_type for node in model.graph]
    assert not FixTrainingOps("host").apply(model, tmp_path).modified
    assert [node.op_type for node in model.graph] == before


def test_names_the_node_it_cannot_replace(tmp_path):
    model, _ = single("Erf", [normal(3)], {})
    with pytest.raises(TransformError, match=r"no rule for Erf \(node the_node\)"):
        FixTrainingOps("basic", ("Erf",)).apply(model, tmp_path)
    model, _ = single("ScatterElements", [normal(3, 2), whole(2, 3, 1), normal(3, 1)], {"axis": 1, "reduction": "mul"})
    with pytest.raises(TransformError, match="reduction mul"):
        FixTrainingOps().apply(model, tmp_path)


def test_refuses_unknown_names():
    with pytest.raises(OptionError, match=r"Did you mean.*basic"):
        FixTrainingOps("basik")
    with pytest.raises(OptionError, match=r"Did you mean.*ScatterND"):
        FixTrainingOps("host", ("ScaterND",))


def test_by_name():
    assert resolve(["FixTrainingOps:profile=host,unsupported=ScatterND|Gelu"])[0] == FixTrainingOps(
        "host", ("ScatterND", "Gelu")
    )

"""ONNX transforms: what they do to weights and answers, and that the cache and the manifest know about them.

Weights of a package are read here from the bytes its ONNX file points to, not through the library.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_models import greedy_reference, sample_prompt, save_tiny, tiny_causal_lm
from transformers import PreTrainedModel

from QEfficient import QEFFAutoModelForCausalLM, load
from QEfficient.errors import OptionError, QEfficientError, TransformError
from QEfficient.onnx_io import FileTensor, load_model, store_tensors
from QEfficient.targets.manifest import Manifest
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.fp16_clip import FP16Clip
from QEfficient.transforms.onnx.split_weights import SplitWeights

FP16_MAX = 65504.0
PROMPT = sample_prompt(7)
HEAD = "lm_head.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return tiny_causal_lm("llama")


@pytest.fixture(scope="module")
def model(reference: PreTrainedModel) -> QEFFAutoModelForCausalLM:
    return QEFFAutoModelForCausalLM(reference)


def compiled(model: QEFFAutoModelForCausalLM, *transforms: Any) -> Path:
    return model.compile(ctx_len=16, prefill_seq_len=8, transforms=list(transforms), fuse=False, progress=False)


def logits(package: Path, ids: Sequence[int] = PROMPT) -> np.ndarray:
    """float32 [vocab], the last token's logits of a package."""
    with load(package) as opened:
        opened.session.begin({"batch_size": 1, "ctx_len": 16})
        feeds = {"input_ids": np.array([ids], np.int64), "position_ids": np.arange(len(ids), dtype=np.int64)[None]}
        return opened.session.run(feeds, "Prefill")["logits"][0, 0].copy()


@torch.no_grad()
def hf_logits(model: PreTrainedModel, ids: Sequence[int] = PROMPT) -> np.ndarray:
    return model(input_ids=torch.tensor([list(ids)])).logits[0, -1].float().numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


_TYPES = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.INT64: np.dtype(np.int64),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


def stored(package: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (file, values) of every weight outside the ONNX file, read by offset and length."""
    out = {}
    for tensor in onnx.load(package / "program.onnx", load_external_data=False).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            raw = (package / where["location"]).read_bytes()
            start = int(where["offset"])
            data = np.frombuffer(raw[start : start + int(where["length"])], _TYPES[tensor.data_type])
            out[tensor.name] = (where["location"], data.reshape(tuple(tensor.dims)))
    return out


def constants(graph: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every number written in a graph and its subgraphs, except weights outside the file."""
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            yield tensor.name, numpy_helper.to_array(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield node.name, numpy_helper.to_array(attribute.t)
            elif attribute.type == onnx.AttributeProto.FLOAT:
                yield node.name, np.array(attribute.f)
            elif attribute.type == onnx.AttributeProto.FLOATS:
                yield node.name, np.array(attribute.floats)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from constants(attribute.g)


def outside(package: Path) -> list[str]:
    """Names of nodes and constants with numbers float16 cannot hold."""
    graph = onnx.load(package / "program.onnx", load_external_data=False).graph
    found = [(n, v) for n, v in constants(graph) if v.dtype.kind == "f"]
    found += [(name, values) for name, (_, values) in stored(package).items() if values.dtype != np.int64]
    return [name for name, values in found if (np.abs(values.astype(np.float64)) > FP16_MAX).any()]


def records(package: Path) -> list[dict[str, Any]]:
    return Manifest.load(package).transforms


# ---------------------------------------------------------------------------------- FP16Clip


def test_clip_leaves_a_model_in_range_as_it_is(model: QEFFAutoModelForCausalLM, reference: PreTrainedModel) -> None:
    plain, clipped = compiled(model), compiled(model, "FP16Clip")
    assert clipped != plain
    assert records(plain) == []
    (record,) = records(clipped)
    assert (record["modified"], record["facts"]) == (False, {"clipped": []})
    before, after = stored(plain), stored(clipped)
    assert before.keys() == after.keys()
    for name, (_, values) in before.items():
        np.testing.assert_array_equal(after[name][1], values, err_msg=name)
    np.testing.assert_array_equal(logits(clipped), logits(plain))
    assert_close(logits(clipped), hf_logits(reference))


def test_clip_of_weights_and_infinities(reference: PreTrainedModel) -> None:
    changed = copy.deepcopy(reference)
    matrix = changed.get_parameter(DOWN)
    odd = [1e6, -1e6, math.inf, -math.inf, FP16_MAX, -FP16_MAX, 65520.0, 65503.0]
    with torch.no_grad():
        matrix[: len(odd), 3] = torch.tensor(odd)
    package = compiled(QEFFAutoModelForCausalLM(changed), "FP16Clip")
    (record,) = records(package)
    assert (record["modified"], record["facts"]) == (True, {"clipped": [DOWN]})
    original = {name: tensor.numpy() for name, tensor in changed.state_dict().items()}
    for name, (_, values) in stored(package).items():
        expected = np.clip(original[name], -FP16_MAX, FP16_MAX) if name == DOWN else original[name]
        np.testing.assert_array_equal(values, expected, err_msg=name)
    with torch.no_grad():
        matrix.copy_(torch.from_numpy(np.clip(matrix.numpy(), -FP16_MAX, FP16_MAX)))
    assert_close(logits(package), hf_logits(changed))


def test_clip_of_bfloat16_stays_inside_float16(reference: PreTrainedModel, tmp_path: Path) -> None:
    """65504 is no bfloat16: rounded to the nearest one it is 65536, which float16 cannot hold."""
    changed = copy.deepcopy(reference)
    with torch.no_grad():
        changed.get_parameter(DOWN)[:2, 0] = torch.tensor([1e6, -1e6])
    directory = save_tiny(changed, tmp_path / "bf16", dtype=torch.bfloat16)
    package = compiled(QEFFAutoModelForCausalLM.from_pretrained(directory), "FP16Clip")
    values = stored(package)[DOWN][1]
    assert values.dtype == ml_dtypes.bfloat16
    assert values[:2, 0].astype(np.float32).tolist() == [65280.0, -65280.0]
    assert outside(package) == []
    rounded = changed.get_parameter(DOWN).detach().to(torch.bfloat16)
    np.testing.assert_array_equal(values[2:].view(np.uint16), rounded[2:].view(torch.uint16).numpy())


@pytest.mark.parametrize("name", ["bloom", "falcon", "mamba2"])
def test_nothing_outside_float16_is_left(name: str) -> None:
    """Masks of -3.4e38 and infinite limits, wherever in the graph: they become 65504 and the answer stays."""
    reference = tiny_causal_lm(name)
    model = QEFFAutoModelForCausalLM(reference)
    model.compile(ctx_len=32, prefill_seq_len=5, transforms=["FP16Clip"])
    assert outside(model.qpc_path) == []
    ids = sample_prompt(12)
    expected, _ = greedy_reference(reference, ids, 8)
    assert model.generate(input_ids=np.array([ids]), max_new_tokens=8)[0, 12:].tolist() == expected


def test_some_model_needs_clipping() -> None:
    """Or the test above would show nothing."""
    model = QEFFAutoModelForCausalLM(tiny_causal_lm("bloom"))
    assert outside(model.compile(ctx_len=32, prefill_seq_len=5)) != []


def small_graph() -> ir.Model:
    """Constants of all kinds around a sum; the `If` holds some in subgraphs."""
    double = np.array([1e300, -np.inf, math.pi, 1e-300, np.nan])
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["inner_constant"], name="inner", value_floats=[1e9, 0.5, -1e9])],
        "then",
        [],
        [helper.make_tensor_value_info("inner_constant", TensorProto.FLOAT, [3])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["huge"], ["out_of_else"])],
        "else",
        [],
        [helper.make_tensor_value_info("out_of_else", TensorProto.FLOAT, [3])],
        [numpy_helper.from_array(np.array([2e9, 1.5, -np.inf], np.float32), "huge")],
    )
    nodes = [
        helper.make_node("Constant", [], ["single"], name="single", value_float=-1e30),
        helper.make_node(
            "ConstantOfShape",
            ["shape"],
            ["filled"],
            name="filled",
            value=numpy_helper.from_array(np.array([-3.4e38], np.float32)),
        ),
        helper.make_node("If", ["flag"], ["chosen"], name="branch", then_branch=inner, else_branch=other),
        helper.make_node("Sum", ["x", "single", "filled", "chosen"], ["y"], name="sum"),
        helper.make_node("Identity", ["double"], ["z"], name="keep"),
        helper.make_node("Identity", ["integers"], ["n"], name="keep_integers"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [3]),
            helper.make_tensor_value_info("z", TensorProto.DOUBLE, [5]),
            helper.make_tensor_value_info("n", TensorProto.INT64, [2]),
        ],
        [
            numpy_helper.from_array(np.array([3]), "shape"),
            numpy_helper.from_array(double, "double"),
            numpy_helper.from_array(np.array([10**12, -(10**12)]), "integers"),
        ],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))


def test_clip_finds_every_kind_of_constant(tmp_path: Path) -> None:
    model = small_graph()
    result = FP16Clip().apply(model, tmp_path)
    assert result.modified
    assert set(result.facts["clipped"]) == {"double", "single", "filled", "inner", "huge"}
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    values = dict(constants(proto.graph))
    # Numbers inside the range keep all their bits, and what is not a number stays one.
    np.testing.assert_array_equal(values["double"], [FP16_MAX, -FP16_MAX, math.pi, 1e-300, np.nan])
    np.testing.assert_array_equal(values["huge"], np.array([FP16_MAX, 1.5, -FP16_MAX], np.float32))
    np.testing.assert_array_equal(values["inner"], [FP16_MAX, 0.5, -FP16_MAX])
    assert values["single"] == -FP16_MAX
    assert values["filled"] == -FP16_MAX
    assert values["integers"].tolist() == [10**12, -(10**12)]


def test_clip_to_another_limit(model: QEFFAutoModelForCausalLM) -> None:
    plain, package = stored(compiled(model)), compiled(model, "FP16Clip:limit=0.25")
    for name, (_, values) in stored(package).items():
        np.testing.assert_array_equal(values, np.clip(plain[name][1], -0.25, 0.25), err_msg=name)
    (record,) = records(package)
    assert record["parameters"] == {"limit": 0.25}
    assert len(record["facts"]["clipped"]) > 10


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "many", ""])
def test_clip_refuses_a_senseless_limit(model: QEFFAutoModelForCausalLM, limit: str) -> None:
    with pytest.raises(OptionError):
        compiled(model, f"FP16Clip:limit={limit}")


# ---------------------------------------------------------------------------------- SplitWeights


@pytest.mark.parametrize("limit", [20_000, 33_000, 100_000])
def test_split_into_shards(model: QEFFAutoModelForCausalLM, limit: int) -> None:
    """No file is larger than asked, headers included, except one that holds a single tensor too large for it."""
    plain, package = compiled(model), compiled(model, f"SplitWeights:max_shard_size={limit}")
    before, after = stored(plain), stored(package)
    assert before.keys() == after.keys()
    held: dict[str, list[str]] = {}
    for name, (location, values) in after.items():
        np.testing.assert_array_equal(values, before[name][1], err_msg=name)
        held.setdefault(location, []).append(name)
    files = {path.relative_to(package).as_posix(): path.stat().st_size for path in (package / "weights").iterdir()}
    assert files.keys() == held.keys()
    assert len(files) > 2
    large = {name for name, (_, values) in after.items() if values.nbytes > limit}
    for location, names in held.items():
        assert files[location] <= limit or (len(names) == 1 and set(names) <= large), (location, names)
    assert bool(large) == (limit == 20_000), "one of the limits must be smaller than a tensor"
    np.testing.assert_array_equal(logits(package), logits(plain))
    assert records(package)[0]["facts"] == {"shards": len(files)}


def test_split_fills_its_shards(model: QEFFAutoModelForCausalLM) -> None:
    """A limit with room for everything gives one file; two neighbours never fit into one."""
    whole = stored(compiled(model, SplitWeights("1GB")))
    assert len({location for location, _ in whole.values()}) == 1
    package = compiled(model, SplitWeights(100_000))
    sizes: dict[str, int] = {}
    for location, values in stored(package).values():
        sizes[location] = sizes.get(location, 0) + values.nbytes
    first = {}
    for location, values in stored(package).values():
        first.setdefault(location, values.nbytes)
    order = sorted(sizes)
    for one, following in itertools.pairwise(order):
        assert sizes[one] + first[following] > 0.9 * 100_000


def test_sizes_are_normalised_before_the_key(model: QEFFAutoModelForCausalLM) -> None:
    """D6: one meaning, one package."""
    same = ["SplitWeights:max_shard_size=20KB", SplitWeights(20_000), "SplitWeights:max_shard_size=20000"]
    assert len({compiled(model, one) for one in same}) == 1
    assert compiled(model, "SplitWeights:max_shard_size=20KiB") != compiled(model, same[0])
    for wrong in ("-1", "0", "many", "5 parsecs", "0.1B"):
        with pytest.raises(OptionError):
            compiled(model, f"SplitWeights:max_shard_size={wrong}")


# ---------------------------------------------------------------------------------- names, order, key, manifest


def test_three_ways_to_name_a_built_in_one(model: QEFFAutoModelForCausalLM) -> None:
    assert len({compiled(model, one) for one in ("FP16Clip", FP16Clip, FP16Clip(), "FP16Clip:limit=65504")}) == 1


def test_order_and_parameters_are_in_key_and_manifest(model: QEFFAutoModelForCausalLM) -> None:
    split, clip = "SplitWeights:max_shard_size=20KB", "FP16Clip:limit=0.25"
    queues = [(), (split,), (clip,), (split, clip), (clip, split), (clip, "SplitWeights:max_shard_size=30KB")]
    packages = [compiled(model, *queue) for queue in queues]
    assert len(set(packages)) == len({Manifest.load(p).key for p in packages}) == len(queues)
    assert [r["name"] for r in records(packages[3])] == ["SplitWeights", "FP16Clip"]
    assert [r["name"] for r in records(packages[4])] == ["FP16Clip", "SplitWeights"]
    assert [r["parameters"] for r in records(packages[5])] == [{"limit": 0.25}, {"max_shard_size": 30_000}]
    assert all(r["version"] == 1 for r in records(packages[5]))
    np.testing.assert_array_equal(logits(packages[3]), logits(packages[4]))


def test_the_same_transform_twice(model: QEFFAutoModelForCausalLM) -> None:
    """Each gets a place of its own for its files."""
    package = compiled(model, "FP16Clip:limit=0.5", "FP16Clip:limit=0.25")
    np.testing.assert_array_equal(logits(package), logits(compiled(model, "FP16Clip:limit=0.25")))
    package = compiled(model, "SplitWeights:max_shard_size=20KB", "SplitWeights:max_shard_size=100KB")
    np.testing.assert_array_equal(logits(package), logits(compiled(model)))
    assert len({location for location, _ in stored(package).values()}) == len(list((package / "weights").iterdir()))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("FP16Clp", "Did you mean 'FP16Clip'"),
        ("splitweights", "built in"),
        ("FP16Clip:limt=3", "Did you mean 'limit'"),
        ("SplitWeights:max_shardsize=3", "Did you mean 'max_shard_size'"),
        ("FP16Clip:limit", "parameter=value"),
        (3, "a transform is a name"),
    ],
)
def test_unknown_names_are_refused_before_any_work(
    reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, wrong: Any, hint: str
) -> None:
    model = QEFFAutoModelForCausalLM(reference)
    monkeypatch.setattr(model, "_export", lambda *args: pytest.fail("exported first"))
    with pytest.raises(OptionError, match=hint):
        compiled(model, wrong)


def test_a_single_string_is_no_list(model: QEFFAutoModelForCausalLM) -> None:
    with pytest.raises(OptionError, match="must be a list"):
        model.compile(transforms="FP16Clip")


# ---------------------------------------------------------------------------------- the user's own


@dataclass(frozen=True)
class ScaleHead(OnnxTransform):
    """Multiplies the output head, and so every logit."""

    name: ClassVar[str] = "ScaleHead"
    factor: float = 2.0

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        value = model.graph.initializers[HEAD]
        scaled = value.const_value.numpy() * np.float32(self.factor)
        # Of all names the one that the untouched weights' own file has.
        taken = getattr(value.const_value, "location", "model.safetensors")
        value.const_value = store_tensors({HEAD: scaled}, workspace / Path(taken).name)[HEAD]
        return TransformResult(True, {"scaled": HEAD})


class PlainScale(OnnxTransform):
    """No dataclass: what it remembers is in its attributes only."""

    name: ClassVar[str] = "PlainScale"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        return ScaleHead(self.factor).apply(model, workspace)


class Nameless(OnnxTransform):
    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        return TransformResult(modified=False)


def triple_head(model: ir.Model) -> None:
    value = model.graph.initializers[HEAD]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(3), name=HEAD)


def test_own_transform_as_class_instance_and_function(
    model: QEFFAutoModelForCausalLM, reference: PreTrainedModel
) -> None:
    expected = hf_logits(reference)
    packages = {}
    for label, item, factor in (
        ("class", ScaleHead, 2.0),
        ("instance", ScaleHead(0.5), 0.5),
        ("another", ScaleHead(4.0), 4.0),
        ("function", triple_head, 3.0),
        ("plain", PlainScale(5.0), 5.0),
        ("another plain", PlainScale(6.0), 6.0),
    ):
        packages[label] = compiled(model, item)
        assert_close(logits(packages[label]), factor * expected)
    assert len(set(packages.values())) == len(packages)
    assert compiled(model, ScaleHead(2.0)) == packages["class"]
    (record,) = records(packages["instance"])
    assert record["facts"] == {"scaled": HEAD}
    assert record["parameters"]["wrapped"] == {"name": "ScaleHead", "version": 1, "parameters": {"factor": 0.5}}
    assert records(packages["function"])[0]["parameters"]["label"] == "triple_head"
    plain = stored(compiled(model))
    for name, (_, values) in stored(packages["class"]).items():
        np.testing.assert_array_equal(values, plain[name][1] * (2 if name == HEAD else 1), err_msg=name)


def test_own_transforms_in_a_queue(model: QEFFAutoModelForCausalLM, reference: PreTrainedModel) -> None:
    package = compiled(model, ScaleHead, "SplitWeights:max_shard_size=20KB", triple_head, ScaleHead(0.5))
    assert_close(logits(package), 3 * hf_logits(reference))
    assert len(records(package)) == 4


def test_a_transform_without_a_name(model: QEFFAutoModelForCausalLM) -> None:
    (record,) = records(compiled(model, Nameless()))
    assert record["parameters"]["label"] == "Nameless"


def test_a_function_that_remembers_is_refused(model: QEFFAutoModelForCausalLM) -> None:
    """Two of them have one source, and the second would get what the first one made."""

    def scale_by(factor: float) -> Any:
        def scale(model: ir.Model) -> None:
            value = model.graph.initializers[HEAD]
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=HEAD)

        return scale

    class Callable:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, model: ir.Model) -> None:
            scale_by(self.factor)(model)

    def scale_default(model: ir.Model, factor: float = 2.0) -> None:
        scale_by(factor)(model)

    for item in (scale_by(2.0), Callable(2.0), scale_default):
        with pytest.raises(QEfficientError, match=r"plain function"):
            compiled(model, item)


def test_parameters_must_fit_into_a_key(model: QEFFAutoModelForCausalLM) -> None:
    with pytest.raises(TransformError, match="JSON"):
        compiled(model, PlainScale(np.ones(3)))


FILE = """
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult


@dataclass(frozen=True)
class Scale(OnnxTransform):
    name: ClassVar[str] = "Scale"
    factor: float = FACTOR

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        change(model)
        return TransformResult(modified=True)


def change(model: ir.Model) -> None:
    value = model.graph.initializers["lm_head.weight"]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(FACTOR), name="lm_head.weight")


value = 3
"""


def test_own_transform_in_a_file(model: QEFFAutoModelForCausalLM, reference: PreTrainedModel, tmp_path: Path) -> None:
    """Editing the file makes another package, even within a second and without another length."""
    path = tmp_path / "mine.py"
    packages = []
    for factor in ("2.0", "3.0", "2.0"):
        path.write_text(FILE.replace("FACTOR", factor), encoding="utf-8")
        for name in ("Scale", "change"):
            packages.append(compiled(model, f"{path}:{name}"))
            assert_close(logits(packages[-1]), float(factor) * hf_logits(reference))
    assert packages[:2] == packages[4:]
    assert len(set(packages)) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"], "nothing may be left beside the user's file"


def test_wrong_files_are_refused(model: QEFFAutoModelForCausalLM, tmp_path: Path) -> None:
    good, broken, failing = tmp_path / "good.py", tmp_path / "broken.py", tmp_path / "failing.py"
    good.write_text(FILE.replace("FACTOR", "2.0"), encoding="utf-8")
    broken.write_text("def (:\n", encoding="utf-8")
    failing.write_text("1 / 0\n", encoding="utf-8")
    for item, error, hint in (
        (f"{tmp_path / 'none.py'}:Scale", TransformError, "does not exist"),
        (f"{good}:Scail", TransformError, "Did you mean 'Scale'"),
        (f"{good}", OptionError, "name the class"),
        (f"{good}:value", QEfficientError, "value"),
        (f"{good}:Path", TransformError, "OnnxTransform"),
        (f"{broken}:Scale", TransformError, "SyntaxError"),
        (f"{failing}:Scale", TransformError, "ZeroDivisionError"),
    ):
        with pytest.raises(error, match=hint):
            compiled(model, item)


def renames_an_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "scores"


def drops_an_input(model: ir.Model) -> None:
    model.graph.inputs.pop()


def fails(model: ir.Model) -> None:
    raise ValueError("no such thing as a free lunch")


class ReturnsNothing(OnnxTransform):
    name: ClassVar[str] = "ReturnsNothing"

    def apply(self, model: ir.Model, workspace: Path) -> None:
        return None


@pytest.mark.parametrize(
    ("item", "hint"),
    [
        (renames_an_output, "inputs or outputs"),
        (drops_an_input, "inputs or outputs"),
        (fails, "free lunch"),
        (ReturnsNothing, "TransformResult"),
    ],
)
def test_a_transform_that_breaks_the_rules(reference: PreTrainedModel, tmp_path: Path, item: Any, hint: str) -> None:
    """An error that names it, and no package."""
    model = QEFFAutoModelForCausalLM(reference, cache_home_dir=tmp_path / "home")
    with pytest.raises(TransformError, match=hint):
        compiled(model, item)
    assert model.qpc_path is None
    packages = tmp_path / "home" / "packages"
    assert not packages.exists() or list(packages.iterdir()) == []


def test_transforms_leave_the_export_alone(model: QEFFAutoModelForCausalLM) -> None:
    """Weights are shared by hard links: a transform that wrote in place would change the export, too."""
    plain = logits(compiled(model))
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in model.onnx_path.parent.iterdir() if p.is_file()}
    before.pop("entry.json", None)
    compiled(model, ScaleHead(7.0), FP16Clip(0.125), SplitWeights(50_000))
    for name, (modified, content) in before.items():
        path = model.onnx_path.parent / name
        assert path.read_bytes() == content, name
        if path.suffix == ".safetensors":
            assert path.stat().st_mtime_ns == modified
    np.testing.assert_array_equal(logits(compiled(model)), plain)


def test_file_tensors_are_what_transforms_get(model: QEFFAutoModelForCausalLM) -> None:
    """As the base class promises: weights in files, every parameter under its own name."""
    compiled(model)
    loaded = load_model(model.onnx_path)
    named = {name for name, v in loaded.graph.initializers.items() if isinstance(v.const_value, FileTensor)}
    assert named == set(model.model.state_dict())
    assert dataclasses.is_dataclass(FP16Clip)

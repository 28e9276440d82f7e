"""``compile(weights=…)``: packages of int8 and int4 weights answer as Hugging Face does with these weights put into it.

The stored weights are read from a package of the graph as it was exported, value by value from the format's
definition. Products round activations to 8 bits, so logits are compared by norm; tokens are checked against the
logits that Hugging Face has for the same sequence.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCAB_SIZE, sample_prompt, save_tiny, tiny_causal_lm, tiny_encoder
from transformers import PreTrainedModel

from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM, QEFFAutoPeftModelForCausalLM, load
from QEfficient.engine.row_prefill import RowPrefill
from QEfficient.errors import OptionError, TransformError
from QEfficient.onnx_io import load_model, save_model
from QEfficient.targets.host_session import HostSession
from QEfficient.targets.manifest import Manifest
from QEfficient.transforms.onnx.fuse_attention import FuseAttention
from QEfficient.transforms.onnx.state_only import StateOnly

#: Room for a prompt that is longer than what the program for tokens takes of it.
CTX, PREFILL, LONG = 128, 8, 100
SHAPE: dict[str, Any] = {"ctx_len": CTX, "prefill_seq_len": PREFILL, "progress": False}
INT4: dict[str, Any] = {"weights": "int4", "group_size": 32}
INT8: dict[str, Any] = {"weights": "int8"}
BITS = {"int4": 4, "int8": 8}
#: As in test_quantize_weights and test_fuse_attention: exported once per run.
WIDE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160}
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "llama_tied": WIDE,
    "gemma2": WIDE,
    "qwen3": WIDE,
    "qwen2": {"num_hidden_layers": 1},
    "gpt2": {"n_embd": 96},
    "mamba2": {"num_hidden_layers": 1},
    "mixtral": {"num_hidden_layers": 1},
}
#: Of the norm of the logits: activations rounded to 8 bits, in prompts also the weights once more.
DECODE_ERROR, PROMPT_ERROR = 0.03, 0.05


# ---------------------------------------------------------------------------------- references


@functools.cache
def original(name: str) -> PreTrainedModel:
    return tiny_causal_lm(name, **OPTIONS[name])


def stored_weights(package: Path, bits: int) -> dict[str, np.ndarray]:
    """Weight name -> float32 [outputs, inputs rounded up to whole blocks]; 8 or 4 bits around half their range."""
    tensors = {
        name: v.const_value.numpy() for name, v in load_model(package / "program.onnx").graph.initializers.items()
    }
    found = {}
    for name in [name.removesuffix(".quantized") for name in tensors if name.endswith(".quantized")]:
        scale = tensors[f"{name}.scale"]
        data = tensors[f"{name}.quantized"].reshape(*scale.shape, -1)
        values = data if bits == 8 else np.stack([data & 15, data >> 4], axis=-1).reshape(*scale.shape, -1)
        full = (values.astype(np.float32) - 2 ** (bits - 1)) * scale[..., None]
        found[name] = full.reshape(len(full), -1)
    return found


def put_into(model: PreTrainedModel, package: Path, bits: int) -> PreTrainedModel:
    """A copy of the model with the weights of a package as it was exported."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = stored_weights(package, bits)
    assert len(weights) >= 4
    for name, full in weights.items():
        old = parameters[name].data
        new = torch.tensor(full[:, : old.shape[0]].T if ".c_" in name else full[:, : old.shape[1]])
        assert new.shape == old.shape
        assert 0 < (new - old).abs().max() < 0.3 * old.abs().max()
        old.copy_(new)
    return model


@functools.cache
def compiled(name: str, weights: str) -> QEFFAutoModelForCausalLM:
    model = QEFFAutoModelForCausalLM(original(name))
    model.compile(**SHAPE, **(INT4 if weights == "int4" else INT8))
    return model


@functools.cache
def unfused(name: str, weights: str) -> Path:
    model = QEFFAutoModelForCausalLM(original(name))
    return model.compile(**SHAPE, **(INT4 if weights == "int4" else INT8), fuse=False)


@functools.cache
def reference(name: str, weights: str) -> PreTrainedModel:
    """Hugging Face with the stored weights."""
    return put_into(original(name), unfused(name, weights), BITS[weights])


@torch.no_grad()
def hf_logits(model: PreTrainedModel, ids: Sequence[int]) -> np.ndarray:
    """float32 [seq, vocab], of one pass over the whole sequence."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0].float().numpy()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Kullback-Leibler divergence of two softmaxes of logits, in nats."""
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64)) for x in (expected, found))
    return float((np.exp(p) * (p - q)).sum())


def assert_likely(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """Each token is Hugging Face's most likely one, as far as rounding lets one tell."""
    assert len(tokens) > 0
    logits = hf_logits(model, [*prompt, *tokens])[len(prompt) - 1 : -1]
    behind = logits.max(axis=1) - logits[np.arange(len(tokens)), list(tokens)]
    assert (behind <= 0.3 * logits.std(axis=1)).all(), behind / logits.std(axis=1)


# ---------------------------------------------------------------------------------- running


class Recorded:
    """A session that remembers what it was asked: (specialization, positions, row)."""

    def __init__(self, session: HostSession) -> None:
        self.session, self.manifest = session, session.manifest
        self.calls: list[tuple[str, list[int], int | None]] = []

    def run(self, feeds: dict[str, np.ndarray], specialization: str, row: int | None = None) -> dict[str, np.ndarray]:
        self.calls.append((specialization, feeds["position_ids"][0].tolist(), row))
        return self.session.run(feeds, specialization, row)


def decode(session: HostSession, tokens: Sequence[int | None], positions: Sequence[int]) -> np.ndarray:
    """float32 [rows, vocab]; rows whose token is None are idle."""
    ids = np.array([[0 if token is None else token] for token in tokens])
    steps = np.array([[-1 if token is None else at] for token, at in zip(tokens, positions, strict=True)])
    return session.run({"input_ids": ids, "position_ids": steps}, "Decode")["logits"][:, 0].copy()


def states(session: HostSession) -> dict[str, np.ndarray]:
    return {spec.input: session.state(spec.input).copy() for spec in session.manifest.states}


def kept(session: HostSession, found: dict[str, np.ndarray], row: int, length: int) -> dict[str, np.ndarray]:
    """What ``length`` tokens left on a row: the first slots of keys and values, other state as a whole."""
    out = {}
    for spec in session.manifest.states:
        state = found[spec.input][row]
        axis = spec.shape.index("ctx_len") - 1 if spec.kind == "kv" else 0
        out[spec.input] = np.take(state, range(length), axis) if spec.kind == "kv" else state
    return out


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[HostSession]:
    """A fresh session of a package named by the test's parameters."""
    with load(compiled(*request.param).qpc_path) as package:
        yield package.session


# ---------------------------------------------------------------------------------- every architecture

CASES = [
    *((name, "int8") for name in OPTIONS),
    *((name, "int4") for name in ("llama", "llama_tied", "gemma2", "qwen2", "gpt2", "mamba2")),
]


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_tokens_and_prompts_follow_hugging_face_with_the_stored_weights(name: str, weights: str) -> None:
    model, ids = reference(name, weights), sample_prompt(LONG, 3)
    expected = hf_logits(model, ids)
    with load(compiled(name, weights).qpc_path) as package:
        session = package.session
        # Token by token, on the first of two rows.
        session.begin({"batch_size": 2, "ctx_len": CTX})
        found = np.stack([decode(session, [token, None], [at, 0])[0] for at, token in enumerate(ids)])
        assert distance(found, expected) < DECODE_ERROR
        fed = kept(session, states(session), 0, LONG)
        # The same prompt at once, on the second.
        before = states(session)
        recorded = Recorded(session)
        last = RowPrefill(recorded).feed(np.array(ids), 0, 1)  # type: ignore[arg-type]
        assert {call[0] for call in recorded.calls} == {"Prefill", "Tail"}
        assert distance(last, expected[-1]) < PROMPT_ERROR
        assert divergence(expected[-1], last) < 0.02
        assert divergence(found[-1], last) < 0.02
        after = states(session)
        for name_of_state, state in kept(session, after, 1, LONG).items():
            assert distance(state, fed[name_of_state]) < PROMPT_ERROR
            np.testing.assert_array_equal(after[name_of_state][0], before[name_of_state][0])
        # And both go on where they are.
        more = sample_prompt(3, 4)
        expected = hf_logits(model, [*ids, *more])[LONG:]
        found = np.stack([decode(session, [token, token], [LONG + at] * 2) for at, token in enumerate(more)])
        for row in (0, 1):
            assert distance(found[:, row], expected) < PROMPT_ERROR


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_reference_notices_wrong_weights(weights: str) -> None:
    """What is compared above is no accident: weights before quantization are further away, and so are changed rows."""
    ids = sample_prompt(24, 3)
    with load(compiled("llama", weights).qpc_path) as package:
        session = package.session
        session.begin({"batch_size": 1, "ctx_len": CTX})
        found = np.stack([decode(session, [token], [at])[0] for at, token in enumerate(ids)])
    right = distance(found, hf_logits(reference("llama", weights), ids))
    if weights == "int4":
        assert distance(found, hf_logits(original("llama"), ids)) > 2 * right
    changed = copy.deepcopy(reference("llama", weights))
    changed.get_parameter("model.layers.0.self_attn.v_proj.weight").data[:8] *= -1
    assert distance(found, hf_logits(changed, ids)) > max(DECODE_ERROR, 2 * right)


def test_fused_and_as_exported_are_one_model() -> None:
    """The same stored weights in larger operators: sums in another order, nothing else."""
    ids = sample_prompt(20, 5)
    with load(compiled("llama", "int4").qpc_path) as package, load(unfused("llama", "int4")) as plain:
        assert not plain.session.manifest.specialization("Prefill").by_row
        assert {spec.name for spec in plain.session.manifest.specializations} == {"Prefill", "Decode"}
        sessions = (package.session, plain.session)
        for session in sessions:
            session.begin({"batch_size": 1, "ctx_len": CTX})
        one, other = (
            np.stack([decode(session, [token], [at])[0] for at, token in enumerate(ids)]) for session in sessions
        )
        assert distance(one, other) < 0.01
        for tokens in (p.generate(input_ids=np.array([ids]), max_new_tokens=12)[0, 20:] for p in (package, plain)):
            assert_likely(reference("llama", "int4"), ids, tokens.tolist())


# ---------------------------------------------------------------------------------- where a prompt is cut


def lengths_at_the_borders(manifest: Manifest) -> list[int]:
    tail = manifest.specialization("Tail").symbols["seq_len"].maximum
    assert tail is not None
    assert tail + 2 * PREFILL < LONG < CTX, "LONG must be longer than what needs no program of its own"
    around = [1, 2, PREFILL - 1, PREFILL, PREFILL + 1, PREFILL + tail, PREFILL + tail + 1]
    return sorted({*around, tail - 1, tail, tail + 1, tail + 2 * PREFILL, LONG, CTX - 1, CTX})


@pytest.mark.parametrize("opened", [("llama", "int4"), ("mamba2", "int8")], indirect=True, ids=str)
def test_prompts_at_every_border(opened: HostSession, request: pytest.FixtureRequest) -> None:
    """Each token goes to its position once, the last one to a program that has logits, on its own row only."""
    model = reference(*request.node.callspec.params["opened"])
    ids = sample_prompt(CTX, 6)
    expected = hf_logits(model, ids)
    lengths = lengths_at_the_borders(opened.manifest)
    opened.begin({"batch_size": 3, "ctx_len": CTX})
    fed = {}
    for at, token in enumerate(ids):
        decode(opened, [token, None, None], [at, 0, 0])
        if at + 1 in lengths:
            fed[at + 1] = kept(opened, states(opened), 0, at + 1)
    most = opened.manifest.specialization("Tail").symbols["seq_len"].maximum
    for length in lengths:
        # What the row held before must not matter.
        for spec in opened.manifest.states:
            opened.state(spec.input)[2] = 7.0
        before, recorded = states(opened), Recorded(opened)
        logits = RowPrefill(recorded).feed(np.array(ids[:length]), 0, 2)  # type: ignore[arg-type]
        assert distance(logits, expected[length - 1]) < PROMPT_ERROR, length
        assert [at for _, positions, _ in recorded.calls for at in positions] == list(range(length))
        assert {row for _, _, row in recorded.calls} == {2}
        assert [name for name, _, _ in recorded.calls[-1:]] == ["Tail"]
        assert all(name == "Prefill" and len(at) <= PREFILL for name, at, _ in recorded.calls[:-1])
        assert (len(recorded.calls) > 1) == (length > most)
        after = states(opened)
        for name, state in kept(opened, after, 2, length).items():
            assert distance(state, fed[length][name]) < PROMPT_ERROR, (length, name)
            np.testing.assert_array_equal(after[name][:2], before[name][:2])
        for spec in opened.manifest.states:
            if spec.kind == "kv":  # what lies behind the prompt was not written
                behind = np.take(after[spec.input][2], range(length, CTX), spec.shape.index("ctx_len") - 1)
                assert (behind == 7.0).all()


@pytest.mark.parametrize("opened", [("llama", "int8")], indirect=True, ids=str)
def test_a_prompt_goes_on_where_another_call_ended(opened: HostSession) -> None:
    """Several turns on one row: the second starts at a position above 0."""
    ids = sample_prompt(LONG + 20, 7)
    expected = hf_logits(reference("llama", "int8"), ids)
    opened.begin({"batch_size": 2, "ctx_len": CTX})
    for start, end in ((0, 3), (3, LONG), (LONG, LONG + 1), (LONG + 1, LONG + 20)):
        logits = RowPrefill(opened).feed(np.array(ids[start:end]), start, 1)
        assert distance(logits, expected[end - 1]) < PROMPT_ERROR


@pytest.mark.parametrize("opened", [("llama", "int4"), ("mamba2", "int8")], indirect=True, ids=str)
def test_both_programs_work_on_the_same_state(opened: HostSession) -> None:
    """Prefill returns nothing, and what it wrote is what the next step reads."""
    tail = opened.manifest.specialization("Tail")
    prefill = opened.manifest.specialization("Prefill")
    assert prefill.program
    assert prefill.program != opened.manifest.program
    assert not tail.program
    assert tail.by_row
    assert prefill.by_row
    opened.begin({"batch_size": 2, "ctx_len": CTX})
    ids = np.array([sample_prompt(PREFILL, 8)])
    positions = np.arange(PREFILL)[None]
    result = opened.run({"input_ids": ids, "position_ids": positions}, "Prefill", row=1)
    assert result == {}
    in_place = [spec.input for spec in opened.manifest.states if spec.in_place]
    addresses = {name: opened.state(name).ctypes.data for name in in_place}
    after = states(opened)
    assert all(state[1].any() and not state[0].any() for state in after.values())
    wanted = decode(opened, [None, 9], [0, PREFILL])[1]
    assert {name: opened.state(name).ctypes.data for name in in_place} == addresses
    # The same step on a changed state: what is in the buffer is what is read.
    for spec in opened.manifest.states:
        opened.state(spec.input)[...] = after[spec.input]
    np.testing.assert_array_equal(decode(opened, [None, 9], [0, PREFILL])[1], wanted)
    for spec in opened.manifest.states:
        opened.state(spec.input)[...] = 0.5 * after[spec.input]
    assert distance(decode(opened, [None, 9], [0, PREFILL])[1], wanted) > 0.05


# ---------------------------------------------------------------------------------- generate


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return ids, mask


@pytest.mark.parametrize(("name", "weights"), [("llama", "int4"), ("mamba2", "int8"), ("gemma2", "int8")])
def test_batches_of_any_lengths(name: str, weights: str) -> None:
    rows = [sample_prompt(n, n) for n in (LONG, 1, 9, CTX - 7)]
    ids, mask = padded(rows)
    out = compiled(name, weights).generate(input_ids=ids, attention_mask=mask, max_new_tokens=8)
    np.testing.assert_array_equal(out[:, : ids.shape[1]], ids)
    for row, tokens in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
        assert len(tokens) == 8
        assert_likely(reference(name, weights), row, tokens)
    alone = compiled(name, weights).generate(input_ids=np.array([rows[2]]), max_new_tokens=8)
    assert_likely(reference(name, weights), rows[2], alone[0, 9:].tolist())


@functools.cache
def indexed() -> PreTrainedModel:
    return tiny_causal_lm("llama", num_hidden_layers=1, hidden_size=96, intermediate_size=160)


def test_continuous_batching() -> None:
    """Four prompts through two slots; one program, whose prompts run side by side."""
    model = QEFFAutoModelForCausalLM(indexed(), continuous_batching=True)
    plain = model.compile(**SHAPE, **INT4, full_batch_size=2, fuse=False)
    package = model.compile(**SHAPE, **INT4, full_batch_size=2)
    assert package != plain
    assert {spec.name for spec in Manifest.load(package).specializations} == {"Prefill", "Decode"}
    weighted = put_into(indexed(), plain, 4)
    rows = [sample_prompt(n, n) for n in (LONG, 5, 12, 1)]
    ids, mask = padded(rows)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=7)
    for row, tokens in zip(rows, out[:, LONG:].tolist(), strict=True):
        assert_likely(weighted, row, tokens)


# ---------------------------------------------------------------------------------- adapters


def test_adapters_over_int8_weights(tmp_path: Path) -> None:
    """Two adapters swapped in one package, for prompts and for tokens."""
    base, saved = indexed(), {}
    checkpoint = save_tiny(base, tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        adapted = get_peft_model(
            copy.deepcopy(base),
            LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj", "down_proj"]),
        )
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = noise * 0.6 / parameter.shape[1] ** 0.5
        adapted.peft_config["default"].base_model_name_or_path = str(checkpoint)
        adapted.save_pretrained(tmp_path / name)
        saved[name] = tmp_path / name
    model = QEFFAutoPeftModelForCausalLM.from_pretrained(saved["one"], adapter_name="one")
    weighted = put_into(base, model.compile(**SHAPE, **INT8, fuse=False), 8)
    model.compile(**SHAPE, **INT8)
    model.load_adapter(saved["two"], "two")
    prompt = sample_prompt(LONG, 9)
    references = {name: PeftModel.from_pretrained(copy.deepcopy(weighted), str(path)) for name, path in saved.items()}
    found = {}
    for name in ("one", "two", "one"):
        out = model.generate(input_ids=np.array([prompt]), max_new_tokens=8, adapter_name=name)
        found[name] = out[0, LONG:].tolist()
        assert_likely(references[name], prompt, found[name])
    with pytest.raises(AssertionError):
        assert_likely(references["two"], prompt, found["one"])


# ---------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(("name", "options"), [("bert", WIDE), ("roberta", {"num_hidden_layers": 1})])
def test_vectors_are_those_of_the_stored_weights(name: str, options: dict[str, Any], weights: str) -> None:
    base = tiny_encoder(name, **options)
    model = QEFFAutoModel(base)
    asked = {"weights": weights, "progress": False, **({"group_size": 32} if weights == "int4" else {})}
    group = "channel" if weights == "int8" else 32
    stored = model.compile(transforms=[f"QuantizeWeights:bits={BITS[weights]},group_size={group}"], fuse=False)
    weighted = put_into(base, stored, BITS[weights])
    model.compile(**asked)
    rows = [sample_prompt(n, n) for n in (17, 5, 1)]
    ids = np.full((3, 17), base.config.pad_token_id)
    mask = np.zeros((3, 17), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    out = model.generate({"input_ids": ids, "attention_mask": mask})["output"]
    for i, row in enumerate(rows):
        with torch.no_grad():
            expected = weighted(input_ids=torch.tensor([row])).last_hidden_state[0].numpy()
        assert distance(out[i, : len(row)], expected) < DECODE_ERROR
    (record,) = (r for r in Manifest.load(model.qpc_path).transforms if r["name"] == "QuantizeWeights")
    assert record["facts"]["weights"] >= 6


# ---------------------------------------------------------------------------------- what a package holds


def ranges(file: Path) -> dict[str, tuple[str, int, int]]:
    """Weight -> (file, offset, length), read from the ONNX file itself."""
    found = {}
    for tensor in onnx.load(file, load_external_data=False).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = (where["location"], int(where["offset"]), int(where["length"]))
    return found


@pytest.mark.parametrize(("name", "weights"), [("llama", "int8"), ("llama", "int4"), ("llama_tied", "int4")])
def test_no_byte_is_there_twice(name: str, weights: str) -> None:
    """Two programs, whose common tensors are one; nothing of the weights before, and nothing that nobody reads."""
    options = INT4 if weights == "int4" else INT8
    package = QEFFAutoModelForCausalLM(original(name)).compile(**SHAPE, **options, prepack=False)
    programs = {path.name: ranges(path) for path in package.glob("*.onnx")}
    assert len(programs) == 2
    assert {spec.program for spec in Manifest.load(package).specializations} | {"program.onnx"} == {"", *programs}
    read = {place for tensors in programs.values() for place in tensors.values()}
    contents = {place: (package / place[0]).read_bytes()[place[1] : sum(place[1:])] for place in read}
    large = [content for content in contents.values() if len(content) > 500]
    assert len(large) > 10
    assert len(set(large)) == len(large), "two tensors hold the same bytes"
    on_disk = sum(path.stat().st_size for path in (package / "weights").rglob("*") if path.is_file())
    used = sum(map(len, contents.values()))
    assert used <= on_disk <= 1.02 * used + 20_000
    shared = set(programs["program.onnx"].values()) & set(programs["prefill.onnx"].values())
    assert shared

    # What that comes to, from the sizes of the matrices: bytes of a weight in each program, and a scale each.
    matrices = {n: p for n, p in original(name).named_parameters() if p.dim() == 2 and p.numel() >= 4096}
    group = 32 if weights == "int4" else 128
    expected = 0.0
    for matrix, parameter in matrices.items():
        outputs, inputs = parameter.shape
        groups = math.ceil(inputs / (32 if "embed" in matrix and inputs % group else group))
        # A table's blocks fill its rows, a product's the last one up.
        padded = inputs if "embed" in matrix else groups * group
        expected += outputs * (padded * BITS[weights] / 8 + 4 * groups)
        # Prompts need neither the head nor what the last layer does after its keys and values.
        if not any(part in matrix for part in ("embed", "lm_head", "layers.1.mlp", "layers.1.self_attn.o_proj")):
            expected += outputs * (inputs + 4)
    rest = sum(p.numel() * 4 for n, p in original(name).named_parameters() if n not in matrices)
    assert used == pytest.approx(expected + rest, rel=0.05)
    assert on_disk < 0.65 * sum(p.numel() * 4 for p in original(name).parameters())


def test_a_package_runs_without_torch() -> None:
    """A prompt for both programs, in a process where torch and transformers cannot be imported."""
    package = compiled("llama", "int4").qpc_path
    code = """
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnx_ir"):
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Refuse())
import numpy as np
import QEfficient
request = json.loads(sys.argv[1])
with QEfficient.load(request["package"]) as package:
    ids = package.generate(input_ids=np.array([request["prompt"]]), max_new_tokens=6)
    rows = package.generate(input_ids=np.array([request["prompt"][:5]] * 2), max_new_tokens=6)
print(json.dumps([ids[0].tolist(), rows.tolist()]))
"""
    prompt = sample_prompt(LONG, 10)
    command = [sys.executable, "-c", code, json.dumps({"package": str(package), "prompt": prompt})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    ids, rows = json.loads(done.stdout.splitlines()[-1])
    model = reference("llama", "int4")
    assert ids[:LONG] == prompt
    assert_likely(model, prompt, ids[LONG:])
    for row in rows:
        assert_likely(model, prompt[:5], row[5:])


def test_the_manifest_says_what_was_done() -> None:
    for weights in ("int8", "int4"):
        manifest = Manifest.load(compiled("llama", weights).qpc_path)
        assert manifest.options["weights"] == weights
        assert manifest.options["group_size"] == (32 if weights == "int4" else None)
        by_program: dict[str, list[str]] = {}
        for record in manifest.transforms:
            by_program.setdefault(record.get("program", ""), []).append(record["name"])
        assert "QuantizeWeights" in by_program[""]
        assert "MergeProducts" in by_program["program.onnx"]
        assert [n for n in by_program["prefill.onnx"] if n in ("StateOnly", "RowScaledProducts")] == [
            "StateOnly", "RowScaledProducts",
        ]  # fmt: skip
        (quantized,) = (r for r in manifest.transforms if r["name"] == "QuantizeWeights")
        assert quantized["parameters"]["bits"] == BITS[weights]
        assert quantized["facts"]["left"] == {}
    (quantized,) = (
        r for r in Manifest.load(compiled("mixtral", "int8").qpc_path).transforms if r["name"] == "QuantizeWeights"
    )
    assert set(quantized["facts"]["left"].values()) == {"it has rank 3"}, "experts are stacked"
    facts = {r["name"]: r["facts"] for r in Manifest.load(compiled("gemma2", "int4").qpc_path).transforms}
    assert facts["MergeProducts"]["packed_attention"] == 2


def test_one_meaning_is_one_package() -> None:
    model = QEFFAutoModelForCausalLM(original("llama"))
    packages = {
        name: model.compile(**SHAPE, **options)
        for name, options in {
            "fp32": {}, "int8": {"weights": "int8"}, "int4": {"weights": "int4"}, "32": INT4,
            "unfused": INT4 | {"fuse": False},
        }.items()
    }  # fmt: skip
    assert len(set(packages.values())) == len(packages)
    assert model.compile(**SHAPE, weights="int4", group_size=32) == packages["32"] == compiled("llama", "int4").qpc_path
    assert model.compile(**SHAPE, weights="fp32", fuse=True) == packages["fp32"]
    default = Manifest.load(packages["int4"]).options["group_size"]
    assert default != 32
    assert model.compile(**SHAPE, weights="int4", group_size=default) == packages["int4"]

    def size(package: Path) -> int:
        return sum(path.stat().st_size for path in (package / "weights").iterdir())

    assert size(packages["unfused"]) < size(packages["32"]) < size(packages["int8"]) < size(packages["fp32"])


# ---------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int5"}, "got 'int5'. Did you mean 'int"),
        ({"weights": "fp23"}, "Did you mean 'fp32'"),
        ({"weights": True}, "weights must be one of fp32, int8, int4, mixed, got True"),
        ({"weights": None}, "got None"),
        ({"weights": 4}, "got 4"),
        ({"weights": ["int4"]}, "weights must be one of"),
        ({"group_size": 32}, "group_size goes with weights='int4'"),
        ({"weights": "int8", "group_size": 32}, "group_size goes with weights='int4'"),
        ({"weights": "int4", "group_size": 48}, "group_size must be one of (16, 32, 64, 128, 256), got 48"),
        ({"weights": "int4", "group_size": 0}, "got 0"),
        ({"weights": "int4", "group_size": True}, "got True"),
        ({"weights": "int4", "group_size": "32"}, "got '32'"),
        ({"weights": "int4", "fuse": 1}, "fuse must be True or False, got 1"),
        ({"weight": "int4"}, "no option 'weight'. Did you mean 'weights'"),
        ({"bits": 4}, "no option 'bits'. Did you mean 'weights'"),
        ({"quantization": "int4"}, "Did you mean 'weights'"),
        ({"block_size": 32}, "Did you mean 'group_size'"),
        ({"weights": "int4", "target": "qaic", "dry_run": True}, "weights='int4' is for the host"),
        ({"weights": "int8", "target": "qaic", "dry_run": True}, "mxfp6_matmul=True compresses weights"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    """One sentence or two, before anything is exported."""
    model = QEFFAutoModelForCausalLM(original("llama"))
    with pytest.raises(OptionError) as caught:
        model.compile(**SHAPE, **options)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert message.endswith((".", "?"))
    assert model.qpc_path is None


def test_a_group_size_that_is_no_integer() -> None:
    with pytest.raises(OptionError) as caught:
        QEFFAutoModelForCausalLM(original("llama")).compile(**SHAPE, weights="int4", group_size=32.0)
    assert "QuantizeWeights" not in str(caught.value), "refused too late, in the words of a transform nobody named"


# ---------------------------------------------------------------------------------- StateOnly


def plain_run(model: ir.Model, directory: Path, ids: list[int], start: int, state: dict[str, np.ndarray]) -> Any:
    """Outputs by name, of one call in a plain session."""
    save_model(model, directory / "model.onnx")
    session = ort.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([ids]), "position_ids": np.arange(start, start + len(ids))[None], **state}
    wanted = {value.name for value in session.get_inputs()}
    found = session.run(None, {name: array for name, array in feeds.items() if name in wanted})
    return dict(zip([value.name for value in session.get_outputs()], found, strict=True))


def export_of(name: str) -> Path:
    return QEFFAutoModelForCausalLM(original(name)).export(progress=False)


@pytest.mark.parametrize(("name", "fuse"), [("llama", False), ("llama", True), ("mamba2", False), ("gpt2", True)])
def test_state_only_leaves_the_state_of_the_whole_program(name: str, fuse: bool, tmp_path: Path) -> None:
    path = export_of(name)
    results = []
    for number, alone in enumerate((False, True)):
        (place := tmp_path / str(number)).mkdir()
        for weights in path.parent.glob("*.safetensors"):
            (place / weights.name).hardlink_to(weights)
        model = load_model(path)
        if fuse:
            FuseAttention(ctx_len=CTX).apply(model, place)
        nodes = len(model.graph)
        if alone:
            result = StateOnly().apply(model, place)
            assert result.modified
            assert result.facts == {"nodes_removed": nodes - len(model.graph)}
            assert result.facts["nodes_removed"] > 5
        states = [value for value in model.graph.inputs if str(value.name).startswith(("past", "conv", "recurrent"))]
        assert len(states) == (2 if name == "mamba2" else 4)
        sizes = {"batch_size": 1, "ctx_len": CTX}
        state = {
            str(v.name): np.zeros([sizes.get(str(d), d) if not isinstance(d, int) else d for d in v.shape], np.float32)
            for v in states
        }
        outs = []
        for start, end in ((0, 7), (7, 12)):
            outs.append(plain_run(model, place, sample_prompt(12)[start:end], start, state))
            state = {name: outs[-1][f"{name}_RetainedState"] for name in state}
        results.append(outs)
    for whole, only in zip(*results, strict=True):
        assert only.keys() == whole.keys() - {"logits"}
        for output, array in only.items():
            assert array.any()
            np.testing.assert_allclose(array, whole[output], rtol=0, atol=1e-5, err_msg=output)


def test_state_only_refuses_what_has_no_logits_or_no_state(tmp_path: Path) -> None:
    encoder = load_model(QEFFAutoModel(tiny_encoder("bert", **WIDE)).export(progress=False))
    stateless, nameless = load_model(export_of("llama")), load_model(export_of("llama"))
    del stateless.graph.outputs[1:]
    nameless.graph.outputs[0].name = "scores"
    for model in (encoder, stateless, nameless):
        before = [value.name for value in model.graph.outputs]
        with pytest.raises(TransformError, match="StateOnly needs a causal graph"):
            StateOnly().apply(model, tmp_path)
        assert [value.name for value in model.graph.outputs] == before


def test_vocabulary_of_the_references() -> None:
    """Logits that are compared have the vocabulary's size, and sequences differ."""
    assert hf_logits(original("llama"), [5, 6]).shape == (2, VOCAB_SIZE)
    assert all(sample_prompt(9, a) != sample_prompt(9, b) for a, b in itertools.combinations(range(3, 11), 2))

"""The performance benchmark: its statistics, its protocol, its tables and its conversions; nothing here is timed."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import performance
import quality
import shapes
from peers import contenders, embedding, machine, onnx_bytes, stats, to_gguf, turns
from peers.contenders import EMBEDDERS, ENGINES, GENERATORS, Contender
from peers.markdown import number, table
from peers.prepare import Prepared, Run, in_order, prepare
from peers.process import Launch, PeerError, Worker, cold_start, one_answer
from peers.report import page
from peers.speed import bytes_per_token, prompt
from shapes import ROOT

# ---------------------------------------------------------------------- statistics


def test_speedup_is_the_median_of_ratios_within_rounds():
    # The second round was slow for both: medians of times would say 1.5, the rounds say 2.
    ours, theirs = [1.0, 10.0, 2.0], [2.0, 20.0, 3.0]
    assert stats.speedup(ours, theirs) == 2.0
    assert stats.speedup(ours, theirs[:1]) == 2.0, "a peer that failed later"
    assert stats.speedup(ours, []) is None


def test_rates_and_shares():
    assert stats.spread([3.0, 1.0, 2.0]) == stats.Spread(2.0, 1.0, 3.0)
    assert stats.rate(64, [2.0, 4.0, 1.0]) == stats.Spread(32.0, 16.0, 64.0)
    assert stats.bandwidth_share(250e6, 40, 20) == pytest.approx(0.5)


def test_bandwidth_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "_BYTES", 4_000_000)
    assert machine.Bandwidth(2).measure() > 0
    assert machine.describe()["cores"] >= 1


# ---------------------------------------------------------------------- protocol

WORKER = """
import os, sys, time
sys.path.insert(0, {peers!r})
from worker import Engine, main

class Fake(Engine):
    distributions = ("numpy",)

    @classmethod
    def convert(cls, source, destination, precision):
        destination.mkdir()
        (destination / "weights").write_bytes(b"x" * 100)
        return destination

    def load(self, setup):
        print("a library prints here")
        if setup.model == "crash":
            sys.stderr.write("out of luck\\n")
            os._exit(3)
        if setup.model == "hang":
            time.sleep(60)
        self.setup = setup

    def first(self, ids):
        return sum(ids)

    def next(self, token):
        return token + 1

    def embed(self, texts, batch):
        return [[float(len(text)), batch] for text in texts]

main(Fake)
"""
SETUP = {"model": "m", "precision": "int4", "threads": 1, "context": 8}


@pytest.fixture
def starter(tmp_path) -> Launch:
    script = tmp_path / "fake_worker.py"
    script.write_text(WORKER.format(peers=str(ROOT / "benchmarks" / "peers")), encoding="utf-8")
    return Launch((sys.executable, str(script)), tmp_path / "logs" / "fake.log", 1)


@pytest.fixture
def worker(starter):
    running = Worker(starter)
    yield running
    running.close()


def test_a_worker_answers_commands(worker, tmp_path):
    worker.ask(do="load", **SETUP)
    answer = worker.ask(do="generate", ids=[1, 2], new=3)
    assert answer["tokens"] == [3, 4, 5, 6]
    assert answer["prefill_s"] >= 0
    assert answer["decode_s"] >= 0
    worker.ask(do="embed", texts=["a", "bcd"], batch=2, out=str(tmp_path / "v.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), np.array([[1, 2], [3, 2]], np.float32))
    assert worker.peak_mb is None or worker.peak_mb > 1


def test_an_error_is_one_line_and_the_worker_goes_on(worker):
    worker.ask(do="load", **SETUP)
    with pytest.raises(PeerError, match="NotImplementedError: Fake does not give logits") as error:
        worker.ask(do="logits", windows=[[1]], prompt=0, out="unused")
    assert "\n" not in str(error.value)
    assert worker.ask(do="generate", ids=[1], new=0)["tokens"] == [1]


def test_a_crash_says_how_it_ended(worker):
    with pytest.raises(PeerError, match="code 3: out of luck"):
        worker.ask(do="load", **{**SETUP, "model": "crash"})


def test_a_hung_worker_is_ended(worker):
    with pytest.raises(PeerError, match="no answer"):
        worker.ask(limit=0.5, do="load", **{**SETUP, "model": "hang"})
    assert worker.process.poll() is not None


def test_the_other_ways_to_start_a_worker(starter, tmp_path):
    assert one_answer(starter, "--versions")["numpy"] == np.__version__
    place = {"source": str(tmp_path), "destination": str(tmp_path / "out" / "made"), "precision": "int4"}
    made = one_answer(starter, "--convert", json.dumps(place))
    assert (made["bytes"], made["weight_bytes"], made["model"]) == (100, 100, place["destination"])
    seconds, peak = cold_start(starter, SETUP, [1, 2])
    assert seconds > 0
    assert peak is None or peak > 1
    with pytest.raises(PeerError, match="code 3"):
        cold_start(starter, {**SETUP, "model": "crash"}, [1])
    with pytest.raises(PeerError, match="cannot be started"):
        one_answer(dataclasses.replace(starter, command=("/does/not/exist",)), "--versions")


# ---------------------------------------------------------------------- turns


class StubWorker:
    """Answers with its name; fails from a given call on."""

    def __init__(self, name: str, calls: list[str], fails_at: int = 99) -> None:
        self.name, self.calls, self.fails_at, self.peak_mb = name, calls, fails_at, 1.0
        self.process = SimpleNamespace(pid=-1)

    def ask(self, **command):
        self.calls.append(self.name)
        if self.calls.count(self.name) >= self.fails_at:
            raise PeerError("broke")
        return {"turn": command["turn"]}

    def close(self) -> None:
        self.calls.append(f"{self.name} closed")


@pytest.fixture
def run(tmp_path) -> Run:
    reader = SimpleNamespace(measure=lambda: 10.0)
    return Run(1, 2, 0.0, tmp_path, {}, {}, {}, lambda text: None, reader)


def prepared(engine: str = "llama", precision: str = "q4_0", **values) -> Prepared:
    found = {"model": "m", "bytes": 300, "weight_bytes": 200, "seconds": 1.0, "peak_mb": 5.0} | values
    return Prepared(Contender(engine, precision, "int4"), **found)


def test_engines_take_turns_and_a_failing_one_leaves(run):
    calls: list[str] = []
    players = [turns.Player(prepared(), StubWorker(name, calls, fails)) for name, fails in (("A", 99), ("B", 2))]
    turns.take_turns(run, players, lambda turn: {"turn": turn})
    assert calls == ["A", "B", "A", "B", "B closed", "A"]
    assert [answer["turn"] for answer in players[0].answers] == [1, 2], "the first round only warms up"
    assert (players[1].answers, players[1].error) == ([], "broke")
    assert len(run.bandwidth) == 3


def test_ours_is_in_every_batch_that_memory_forces(run, monkeypatch):
    monkeypatch.setattr(turns, "available_mb", lambda: 12_000.0)
    monkeypatch.setattr(turns.Player, "enter", lambda self, run, context: None)
    monkeypatch.setattr(turns.Player, "resident_mb", lambda self: 3000.0)
    entries = [prepared(model=name) for name in "abcd"]
    met = [[p.prepared.model for p in batch] for batch in turns.batches(run, entries, 8, lambda p: 1500.0)]
    assert met == [["a", "b", "c"], ["a", "d"]]


def test_conversions_are_kept_until_the_engine_changes(run, monkeypatch, tmp_path):
    made: list[str] = []

    def convert(launch, mode, argument):
        made.append(mode)
        return {"model": str(tmp_path), "bytes": 1, "weight_bytes": 1, "peak_mb": 1.0, "seconds": 1.0}

    monkeypatch.setattr("peers.prepare.one_answer", convert)
    monkeypatch.setattr(Run, "launch", lambda self, engine, **settings: None)
    peer, ours = Contender("llama", "q4_0", "int4"), Contender("qefficient", "int4", "int4")
    for versions, contender, expected in (
        ("1", peer, 1),
        ("1", peer, 1),
        ("2", peer, 2),
        ("2", ours, 3),
        ("2", ours, 4),
    ):
        run.versions["llama"] = {"llama": versions}
        prepare(run, contender, tmp_path, "shape", 8)
        assert len(made) == expected
    run.missing["llama"] = "not installed"
    with pytest.raises(PeerError, match="not installed"):
        prepare(run, peer, tmp_path, "shape", 8)


# ---------------------------------------------------------------------- who takes part


def test_every_engine_has_its_worker_and_its_pins():
    for info in ENGINES.values():
        assert (contenders.HERE / info.script).is_file()
        assert not info.environment or (contenders.HERE / "requirements" / f"{info.environment}.txt").is_file()
    assert {entry.engine for entry in (*GENERATORS, *EMBEDDERS)} == set(ENGINES)
    assert len({entry.key for entry in GENERATORS}) == len(GENERATORS)


def test_interpreters(tmp_path):
    assert contenders.interpreters(["llama=/x/python"])["llama"] == "/x/python"
    for wrong in ("llama", "lama=/x"):
        with pytest.raises(ValueError, match="--peer takes"):
            contenders.interpreters([wrong])
    present, missing = contenders.installed(["llama"], {"llama": str(tmp_path / "none")}, tmp_path)
    assert (present, missing) == ({}, {"llama": "not installed"})
    _, missing = contenders.installed(["llama"], {"llama": sys.executable}, tmp_path)
    assert missing["llama"].startswith("not installed (the worker ended with code 1")


def test_prompts_differ_between_rounds_and_not_between_engines():
    shape = shapes.SHAPES["qwen2.5-0.5b"]
    assert prompt(shape, 64, 1) == prompt(shape, 64, 1)
    assert prompt(shape, 64, 1) != prompt(shape, 64, 2)
    assert bytes_per_token(prepared(), shape) == 200
    assert bytes_per_token(prepared(precision="fp32"), shape) == 4 * shape.parameters
    assert bytes_per_token(prepared(precision="fp32"), shape, {"float_bytes": 2}) == 2 * shape.parameters
    rows = [{"engine": "llama", "precision": "q4_0"}, {"engine": "qefficient", "precision": "int4"}]
    assert in_order(rows, GENERATORS)[0]["engine"] == "qefficient"


# ---------------------------------------------------------------------- the page


def results() -> dict:
    ours = {"engine": "qefficient", "precision": "int4", "group": "int4", "title": "QEfficient int4"}
    peer = {"engine": "llama", "precision": "q4_0", "group": "int4", "title": "llama.cpp Q4_0"}
    gone = {"engine": "genai", "precision": "int4", "group": "int4", "title": "genai int4", "error": "not installed"}
    speed = {"shape": "qwen2.5-0.5b", "batch": 0, "prompt": 512, "new": 64, "peak_mb": 700.0, "bytes": 300_000_000}
    speed["bytes_per_token"] = 250_000_000
    both = [
        {**ours, **speed, "prefill_s": [1.0, 2.0], "decode_s": [1.0, 2.0]},
        {**peer, **speed, "prefill_s": [4.0, 8.0], "decode_s": [0.5, 1.0]},
        {**gone, "shape": "qwen2.5-0.5b"},
    ]
    scores = {"perplexity": 4.5, "kl": 0.01, "top1": 0.95, "positions": 2048, "bytes": 5_000_000}
    cold = {"shape": "qwen2.5-0.5b", "peak_mb": 500.0}
    vectors = {"batch": 0, "seconds": [2.0], "cosine": 0.9991, "cosine_low": 0.99, "peak_mb": 200.0, "bytes": 9_000_000}
    return {
        "command": "python benchmarks/performance.py", "date": "2026-01-01", "threads": 2, "rounds": 2, "pause": 0.5,
        "machine": {"cpu": "cpu", "flags": ["avx2"], "cores": 2, "memory_gb": 8.0, "system": "Linux", "python": "3"},
        "sections": list(performance.SECTIONS), "versions": {"qefficient": {"qefficient": "0.1"}},
        "missing": {"genai": "not installed"}, "texts": 512, "texts_from": "somewhere", "bandwidth": [20.0, 25.0, 30.0],
        "speed": both, "quality": [{**ours, **scores}, gone],
        "cold": [{**ours, **cold, "seconds": [1.0]}, {**peer, **cold, "seconds": [1.5]}],
        "embeddings": [{**ours, **vectors}],
        "compile": [{**ours, "shape": "llama-3.2-1b", "seconds": [60.0, 50.0], "peak_mb": [800.0, 900.0], "bytes": 1}],
    }  # fmt: skip


def row_of(text: str, title: str, section: str) -> list[str]:
    after = text[text.index(f"## {section}") :]
    return [cell.strip() for cell in after[after.index(f"| {title} |") :].splitlines()[0].strip("|").split("|")]


def test_the_page_has_every_figure():
    text = page(results())
    # 64 tokens in a median of 1.5 s; 250 MB each is 10.7 GB/s of 25.
    assert row_of(text, "QEfficient int4", "Decode") == [
        "QEfficient int4", "42.7", "32.0–64.0", "–", "250", "43%", "700", "300",
    ]  # fmt: skip
    assert row_of(text, "llama.cpp Q4_0", "Decode")[1:4] == ["85.3", "64.0–128", "0.50×"]
    assert row_of(text, "llama.cpp Q4_0", "Prefill")[3] == "4.00×"
    assert row_of(text, "genai int4", "Prefill")[1] == "not installed"
    assert row_of(text, "llama.cpp Q4_0", "From the start")[3] == "1.50×"
    assert row_of(text, "QEfficient int4", "Embeddings")[4] == "0.999100 (0.9900)"
    assert row_of(text, "QEfficient int4", "From checkpoint")[1:4] == ["55.0", "50.0–60.0", "850"]
    summary = row_of(text, "int4", "The precisions")
    assert summary[1:] == ["300", "341", "42.7", "4.5000", "0.01000", "95.0%", "256", "0.999100"]
    assert "the speed of this library is 0.50 times llama.cpp Q4_0." in text
    assert "25.0 GB/s (20.0–30.0, 3 measurements" in text


def test_a_run_without_peers_or_sections_has_a_page():
    few = results()
    few["speed"] = [row for row in few["speed"] if row["engine"] == "qefficient"]
    few["sections"] = ["prefill"]
    for name in ("cold", "embeddings", "compile", "quality"):
        del few[name]
    text = page(few)
    assert "## Prefill" in text
    assert "## Decode" not in text
    few["speed"][0] |= {"prefill_s": [], "decode_s": [], "error": "it broke"}
    assert row_of(page(few), "QEfficient int4", "Prefill")[1] == "it broke"


def test_the_page_is_made_again_from_results(tmp_path, monkeypatch):
    stored, out = tmp_path / "r.json", tmp_path / "page.md"
    stored.write_text(json.dumps(results()), encoding="utf-8")
    command = ["performance.py", "--from-json", "--json", str(stored), "--output", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    performance.main()
    assert out.read_text(encoding="utf-8") == page(results())


def test_the_command_on_the_page_names_no_directory_of_this_machine():
    given = [
        "--work",
        "/x/y",
        "--peer",
        "llama=/x/python",
        "--peer=genai=/z",
        "--sentences",
        "/data/gsm8k.jsonl",
        "--quick",
    ]
    shown = performance.public_command(given)
    assert shown == "python benchmarks/performance.py --sentences gsm8k.jsonl --quick"


def test_markdown():
    assert table(["", "a"], [["x|y", "1"], ["group"]]) == [
        "|  | a |",
        "| --- | --: |",
        "| x\\|y | 1 |",
        "| group |  |",
        "",
    ]
    assert table(["", "a"], []) == []
    assert [number(value) for value in (1234.5, 12.34, 1.234, None)] == ["1,234", "12.3", "1.23", "–"]


# ---------------------------------------------------------------------- quality and texts


def test_quality_figures_agree_with_torch():
    source = np.random.default_rng(0)
    left, right = source.normal(size=(2, 2, 5, 11)).astype(np.float32)
    targets = source.integers(0, 11, (2, 5))
    expected = torch.nn.functional.cross_entropy(torch.tensor(left).view(-1, 11), torch.tensor(targets).view(-1)).exp()
    assert quality.perplexity(left, targets) == pytest.approx(float(expected), rel=1e-5)
    logs = [torch.tensor(array).log_softmax(-1).view(-1, 11) for array in (left, right)]
    divergence = torch.nn.functional.kl_div(logs[1], logs[0], reduction="batchmean", log_target=True)
    assert quality.divergence(left, right) == pytest.approx(float(divergence), rel=1e-4)
    assert quality.agreement(left, left) == 1.0
    close = torch.nn.functional.cosine_similarity(torch.tensor(left[0]), torch.tensor(right[0]))
    np.testing.assert_allclose(quality.cosine(left[0], right[0]), close.numpy(), rtol=1e-5)


def test_windows_of_held_out_text(tmp_path):
    found = quality.windows(None, 16)
    assert [len(window) for window in found] == [quality.WINDOW + 1] * 16
    assert found[0][-1] == found[1][0], "the last token of a window is only predicted, and begins the next"
    (tmp_path / "short.txt").write_text("Question: how many?", encoding="utf-8")
    with pytest.raises(ValueError, match="text for 0 windows"):
        quality.windows(tmp_path / "short.txt", 1)


def test_sentences(tmp_path):
    assert len(set(embedding.sentences(None, 512))) == 512
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"question": "one"}\n{"text": "two"}\n', encoding="utf-8")
    for name in ("a.txt", "a.jsonl"):
        assert embedding.sentences(tmp_path / name, 2) == ["one", "two"]
        with pytest.raises(ValueError, match="has 2 texts, 3 are needed"):
            embedding.sentences(tmp_path / name, 3)


# ---------------------------------------------------------------------- checkpoints and conversions


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_shapes_are_those_transformers_builds(name):
    shape = shapes.SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.config))
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    assert dict(shapes.tensors(shape.config)) == expected
    assert len({to_gguf.gguf_name(key) for key in expected}) == len(expected)
    assert shape.context >= shape.prompt + shape.new


def tiny(model_type: str) -> shapes.Shape:
    make = shapes._llama if model_type == "llama" else shapes._qwen2
    return shapes.Shape("tiny", "tiny", make(128, 64, 2, (4, 2), 96, 1e4))


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_written_checkpoint_loads(model_type, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_NOISE", (1 << 16) - 3)
    directory = shapes.write_checkpoint(tiny(model_type), tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert float(model.model.layers[0].self_attn.q_proj.weight.std()) == pytest.approx(0.02, rel=0.1)
    stamp = (directory / "model.safetensors").stat().st_mtime_ns
    shapes.write_checkpoint(tiny(model_type), directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == stamp
    read = {key: get() for key, _, get in to_gguf.read_safetensors(directory / "model.safetensors")}
    for key, tensor in read.items():
        np.testing.assert_array_equal(tensor, model.state_dict()[key].numpy())


def test_interleaved_rows_rotate_to_the_same_vectors():
    heads, size = 3, 8
    source = np.random.default_rng(0)
    vector, angles = source.normal(size=heads * size), source.normal(size=size // 2)
    cos, sin = np.cos(angles), np.sin(angles)
    halves = vector.reshape(heads, 2, size // 2)
    rotated = np.stack([halves[:, 0] * cos - halves[:, 1] * sin, halves[:, 1] * cos + halves[:, 0] * sin], axis=1)
    pairs = to_gguf.interleave(vector, heads).reshape(heads, size // 2, 2)
    beside = np.stack([pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin], axis=-1)
    np.testing.assert_allclose(beside.ravel(), to_gguf.interleave(rotated.ravel(), heads))


def test_gguf_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="neither llama nor qwen2"):
        to_gguf.gguf_name("model.layers.0.self_attn.q_norm.weight")


def test_bytes_that_a_graph_reads(tmp_path):
    def stored(name: str, offset: int, length: int) -> onnx.TensorProto:
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[length // 4])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "w"), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        return tensor

    tensors = [stored("table", 0, 400), stored("shared", 400, 80), stored("again", 400, 80), stored("weight", 480, 40)]
    nodes = [
        onnx.helper.make_node("Gather", ["table", "ids"], ["a"]),
        onnx.helper.make_node("Gather", ["shared", "ids"], ["b"]),
        onnx.helper.make_node("MatMul", ["a", "shared"], ["c"]),
        onnx.helper.make_node("MatMul", ["again", "weight"], ["d"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializer=tensors)
    (tmp_path / "m.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    assert onnx_bytes.read_bytes(tmp_path / "m.onnx") == 120

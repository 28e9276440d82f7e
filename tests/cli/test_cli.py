"""``qefficient``: what people type, what they see, and that the numbers are Hugging Face's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import greedy_reference, save_tiny, tiny_causal_lm, tiny_classifier, tiny_encoder, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from QEfficient import QEFFAutoModelForCausalLM
from QEfficient.cli.cloud_flags import CloudFlags
from QEfficient.cli.compile import print_transforms
from QEfficient.cli.compile_flags import EncoderFlags, ShapeFlags, TargetFlags
from QEfficient.cli.embed import _checkpoint_pooling
from QEfficient.cli.main import app
from QEfficient.cli.user_errors import user_errors
from QEfficient.errors import OptionError
from QEfficient.targets.manifest import Manifest
from QEfficient.targets.options import CompileOptions

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %} a:{% endif %}"
)
COMMANDS = ("infer", "embed", "export", "compile", "execute", "validate", "doctor", "quantize", "card", "push")
PROMPTS = ("the other", "an island in the sea")
#: The options every causal test uses, so that all share one package.
SHAPES = ("--ctx-len", 64)


@dataclass(frozen=True)
class Tiny:
    """A checkpoint on disk, its torch model, and the cache the commands use."""

    model: PreTrainedModel
    path: Path
    cache: Path

    @property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path)

    def greedy(self, prompt: str, count: int) -> str:
        """Hugging Face's greedy continuation."""
        tokenizer = self.tokenizer
        tokens, _ = greedy_reference(self.model, tokenizer(prompt).input_ids, count)
        return str(tokenizer.decode(tokens, skip_special_tokens=True))


def run(*arguments: object, stdin: str | None = None) -> Any:
    # Wide, so that no table cell or message is cut.
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, env={"COLUMNS": "200"})


def refused(result: Any, *words: str) -> None:
    """One sentence on stderr, exit code 2, no traceback, nothing on stdout."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("note:", "warning:"))]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]
    assert result.stdout == ""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Tiny:
    model, path = tiny_causal_lm("llama"), tmp_path_factory.mktemp("models") / "llama"
    tiny_tokenizer(save_tiny(model, path))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return Tiny(model, path, cache)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Tiny:
    model, path = tiny_encoder("bert"), tmp_path_factory.mktemp("models") / "bert"
    tiny_tokenizer(save_tiny(model, path))
    return Tiny(model, path, cache)


@pytest.fixture(scope="module")
def package(causal: Tiny) -> Path:
    result = run("compile", causal.path, *SHAPES, "--cache-dir", causal.cache)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip())


# ------------------------------------------------------------------ help


def test_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in (*COMMANDS, "cache"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example_and_explains_every_option(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"qefficient {command}" in result.stdout.partition("Example")[2]
    for parameter in _command(command).params:
        assert getattr(parameter, "help", None), f"{command} {parameter.name} has no help"


def _command(name: str) -> Any:
    import typer.main

    return typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]


def test_bare_program_shows_help():
    assert "infer" in run().output


def test_version():
    from QEfficient import __version__

    assert run("--version").stdout == f"qefficient {__version__}\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom QEfficient.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx_ir', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compile_flags_are_the_compile_options():
    groups = (ShapeFlags, EncoderFlags, TargetFlags, CloudFlags)
    flags = {f.name: f.default for group in groups for f in fields(group)}
    flags["compiler_flags"] = flags["compiler_flags"] or ()  # a repeated flag that is not given is None to typer
    assert flags == {f.name: f.default for f in fields(CompileOptions)}


# ------------------------------------------------------------------ infer


def test_infer_prints_the_greedy_text_and_the_speed(causal):
    result = run(
        "infer", causal.path, "--prompt", PROMPTS[0], "--generation-len", 8, *SHAPES, "--cache-dir", causal.cache
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == causal.greedy(PROMPTS[0], 8) + "\n"
    assert "tokens/s" in result.stderr


def test_infer_streams_the_same_text(causal, package):
    result = run("infer", package, "--prompt", PROMPTS[1], "--generation-len", 8, "--stream")
    assert result.exit_code == 0, result.output
    assert result.stdout == causal.greedy(PROMPTS[1], 8) + "\n"


def test_infer_json_has_every_prompt(causal, package, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([PROMPTS[1], "", "hé is in"]) + "\n", encoding="utf-8")
    result = run("infer", package, "-p", PROMPTS[0], "--prompts-file", file, "--generation-len", 6, "--json")
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert [r["prompt"] for r in body["results"]] == [*PROMPTS, "hé is in"]
    assert [r["text"] for r in body["results"]] == [causal.greedy(r["prompt"], 6) for r in body["results"]]
    assert {r["finish_reason"] for r in body["results"]} == {"length"}
    assert body["metrics"]["generated_tokens"] == 18
    assert body["metrics"]["decode_tokens_per_s"] > 0


def test_infer_shows_each_prompt_of_several(causal, package):
    result = run("infer", package, "-p", PROMPTS[0], "-p", PROMPTS[1], "--generation-len", 4)
    expected = [f"[{n}] {p}\n{causal.greedy(p, 4)}\n\n" for n, p in enumerate(PROMPTS, 1)]
    assert result.stdout == "".join(expected)


def test_infer_applies_the_chat_template(causal, package):
    result = run("infer", package, "--message", "how is it", "--generation-len", 6)
    chat = causal.tokenizer.apply_chat_template(
        [{"role": "user", "content": "how is it"}], add_generation_prompt=True, tokenize=False
    )
    ids = causal.tokenizer(chat, add_special_tokens=False).input_ids
    tokens, _ = greedy_reference(causal.model, ids, 6)
    assert result.stdout == causal.tokenizer.decode(tokens, skip_special_tokens=True) + "\n"


def test_infer_sampling_repeats_with_a_seed(package):
    def sampled(seed: int) -> str:
        flags = ("--sample", "--temperature", 1.5, "--top-k", 50, "--top-p", 0.99, "--seed", seed)
        result = run("infer", package, "-p", "the", "--generation-len", 12, *flags)
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_infer_stops_at_a_text(causal, package):
    whole = causal.greedy(PROMPTS[0], 12)
    stop = whole[4:6]
    result = run("infer", package, "-p", PROMPTS[0], "--generation-len", 12, "--stop", stop, "--json")
    found = json.loads(result.stdout)["results"][0]
    assert (found["text"], found["finish_reason"]) == (whole[: whole.index(stop)], "stop_string")


def test_sampling_option_without_sampling_is_said_in_one_line(package):
    result = run("infer", package, "-p", "the", "--generation-len", 2, "--temperature", 0.5)
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if "temperature" in line]
    assert line.startswith("warning: ")


# ------------------------------------------------------------------ compile, export, execute, validate


def test_command_line_and_python_share_one_package(causal, package):
    model = QEFFAutoModelForCausalLM.from_pretrained(causal.path, cache_home_dir=causal.cache)
    assert model.compile(ctx_len=64) == package


def test_export_then_compile_then_execute(encoder, tmp_path):
    cache = ("--cache-dir", encoder.cache)
    exported = run("export", encoder.path, "--pooling", "mean", "--output", tmp_path / "onnx", *cache)
    assert exported.stdout == f"{tmp_path / 'onnx' / 'model.onnx'}\n"
    compiled = run(
        "compile", tmp_path / "onnx" / "model.onnx", "--seq-len", 32, "--seq-len", 64, "--transform", "FP16Clip",
        "--output", tmp_path / "package", *cache,
    )  # fmt: skip
    assert compiled.exit_code == 0, compiled.output
    assert compiled.stdout == f"{tmp_path / 'package'}\n"
    for words in ("FP16Clip", "seq_len=1..32", "seq_len=1..64", "feature-extraction, host", "kB"):
        assert words in compiled.stderr
    shutil.rmtree(tmp_path / "onnx")
    done = run("execute", tmp_path / "package", "--text", PROMPTS[0])
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(
        json.loads(done.stdout)["embedding"], mean_pooled(encoder, PROMPTS[0]), rtol=1e-5, atol=1e-5
    )


def test_execute_needs_neither_torch_nor_transformers(causal, package):
    code = (
        "import sys\nfrom QEfficient.cli.main import app\n"
        f"try:\n    app(['execute', {str(package)!r}, '-p', {PROMPTS[0]!r}, '--generation-len', '5'])\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == causal.greedy(PROMPTS[0], 5) + "\n"


def test_execute_gives_labels(tmp_path, cache):
    model = tiny_classifier("bert")
    tiny_tokenizer(save_tiny(model, tmp_path / "classifier"))
    compiled = run("compile", tmp_path / "classifier", "--cache-dir", cache, "--output", tmp_path / "package")
    assert "text-classification" in compiled.stderr
    done = run("execute", tmp_path / "package", "--text", PROMPTS[0], "--text", PROMPTS[1])
    assert done.exit_code == 0, done.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "classifier")
    for line, prompt in zip(done.stdout.splitlines(), PROMPTS, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(prompt, return_tensors="pt")).logits[0].softmax(-1).numpy()
        found = json.loads(line)
        np.testing.assert_allclose(list(found["scores"].values()), expected, atol=1e-5)
        assert found["label"] == model.config.id2label[int(expected.argmax())]


def test_validate_says_equal(causal):
    arguments = ("validate", causal.path, *SHAPES, "--prompt", PROMPTS[0], "--tokens", 4, "--cache-dir", causal.cache)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "4 of 4" in result.stdout
    assert "DIFFERS" not in result.stdout
    body = json.loads(run(*arguments, "--json").stdout)
    assert body["ok"] is True
    assert [stage["stage"] for stage in body["stages"]] == ["transformed torch", "ONNX", "package"]


def test_validate_measures_a_cards_formats(causal, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("How many apples are left? " * 3)
    start = ("validate", causal.path, *SHAPES, "--cache-dir", causal.cache)
    flags = ("--simulate", "qaic", "--prompt", PROMPTS[0], "--tokens", 3, "--measure", text)
    body = json.loads(run(*start, *flags, "--json").stdout)
    assert [row["formats"] for row in body["formats"]][:3] == ["fp32", "fp16", "mxfp6"]
    assert all(row["choices"] == 3 and row["perplexity"] > 1 for row in body["formats"])
    refused(run(*start, "--measure", text), "--measure goes with --simulate qaic")
    refused(run(*start, "--simulate", "qaic", "--tolerance", 1), "--tolerance")
    made = run("compile", *start[1:], "--simulate", "qaic", "--mxfp6-matmul", "--mxint8-kv-cache")
    options = json.loads((Path(made.stdout.strip()) / "manifest.json").read_text())["options"]
    assert (options["simulate"], options["mxfp6_matmul"], options["mxint8_kv_cache"]) == ("qaic", True, True)
    assert "without effect" not in made.stderr


def test_validate_exits_with_1_when_they_part(encoder):
    flags = ("--pooling", "mean", "--text", PROMPTS[0], "--tolerance", 0, "--cache-dir", encoder.cache)
    result = run("validate", encoder.path, *flags)
    assert result.exit_code == 1, result.output
    assert "DIFFERS" in result.stdout


# ------------------------------------------------------------------ embed


def mean_pooled(encoder: Tiny, text: str) -> np.ndarray:
    with torch.no_grad():
        out = encoder.model(**encoder.tokenizer(text, return_tensors="pt"))
    return np.asarray(out.last_hidden_state[0].mean(0).numpy())


def test_embed_equals_torch(encoder, tmp_path):
    file = tmp_path / "vectors.npy"
    flags = ("--pooling", "mean", "--batch-size", 2, "--cache-dir", encoder.cache, "--output", file)
    texts = [*PROMPTS, "a"]
    result = run("embed", encoder.path, *flags, stdin="\n".join(texts) + "\n")
    assert result.exit_code == 0, result.output
    vectors = np.load(file)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [mean_pooled(encoder, t) for t in texts], rtol=1e-5, atol=1e-5)
    lines = run("embed", encoder.path, "--normalize", "--cache-dir", encoder.cache, *[f"--text={t}" for t in texts])
    assert "names no pooling: using mean" in lines.stderr
    found = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [entry["text"] for entry in found] == texts
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose([entry["embedding"] for entry in found], unit, atol=1e-6)


def test_embed_similarity_is_the_cosine(encoder):
    a, b = (mean_pooled(encoder, text) for text in PROMPTS)
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    flags = ("--pooling", "mean", "--similarity", "--cache-dir", encoder.cache)
    result = run("embed", encoder.path, "-t", PROMPTS[0], "-t", PROMPTS[1], *flags)
    assert result.exit_code == 0, result.output
    assert result.stdout.count(f"{cosine:.3f}") == 2
    assert result.stdout.count("1.000") == 2


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 8}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "max"}, "max"),
    ],
)
def test_pooling_of_a_sentence_transformers_checkpoint(tmp_path, config, pooling):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert _checkpoint_pooling(str(tmp_path)) == pooling


@pytest.mark.parametrize(
    "config",
    [{"pooling_mode_weightedmean_tokens": True}, {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}],
)
def test_a_pooling_we_do_not_have_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptionError, match="--pooling"):
        _checkpoint_pooling(str(tmp_path))


# ------------------------------------------------------------------ weights and fusions

INT4 = ("--weights", "int4", "--group-size", 32)


def test_compile_explains_what_each_transform_did(causal):
    flags = (*SHAPES, *INT4, "--cache-dir", causal.cache)
    plain, explained = run("compile", causal.path, *flags), run("compile", causal.path, *flags, "--explain")
    for result in (plain, explained):
        assert result.exit_code == 0, result.output
    assert plain.stdout == explained.stdout
    manifest = Manifest.load(Path(explained.stdout.strip()))
    assert (manifest.options["weights"], manifest.options["group_size"]) == ("int4", 32)
    assert "what it did" not in plain.stderr
    table = explained.stderr.partition("what it did")[2]
    facts = {record["name"]: record["facts"] for record in manifest.transforms}
    weights = facts["QuantizeWeights"]
    assert weights["weights"] > 4
    assert weights["bytes_after"] > 1000
    for words in (
        "FuseAttention", "2 GroupQueryAttention, 2 rotary inside", "QuantizeWeights", f"weights: {weights['weights']}",
        f"bytes after: {weights['bytes_after']:,}", "MergeProducts", "StateOnly", "RowScaledProducts",
    ):  # fmt: skip
        assert words in table, words
    # Which program a transform made is in its row.
    rows = [line for line in table.splitlines() if "RowScaledProducts" in line]
    assert len(rows) == 1
    assert "prefill.onnx" in rows[0]
    assert f"products: {facts['RowScaledProducts']['products']}" in rows[0]
    assert [line for line in table.splitlines() if "program.onnx" in line and "prefill" not in line]


def test_explain_names_what_was_left_and_why(package, tmp_path, monkeypatch, capsys):
    """Places that were left for one reason are one line; no fact, or only zeros, is nothing to do."""
    left = {f"layers.{n}.experts": "it has rank 3" for n in range(5)} | {"conv[1]": "Conv reads it"}
    records = [
        {"name": "QuantizeWeights", "facts": {"weights": 1234567, "left": left}},
        {"name": "FuseAttention", "program": "prefill.onnx", "facts": {"fused": {}, "left": {}}},
        {"name": "FP16Clip", "facts": {"clipped": []}},
        {"name": "StateOnly", "program": "prefill.onnx"},
    ]
    Manifest.load(package).replace(transforms=records).save(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    print_transforms(tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()

    def row(words: str) -> str:
        (line,) = (line for line in lines if words in line)
        return line

    assert "weights: 1,234,567" in row("QuantizeWeights")
    assert "left layers.0.experts, layers.1.experts, layers.2.experts and 2 more: it has rank 3" in row("it has rank 3")
    assert "left conv[1]: Conv reads it" in row("Conv reads it")
    assert "nothing to do" in row("FuseAttention")
    assert "nothing to do" in row("StateOnly")
    for name, program in (("QuantizeWeights", "all"), ("StateOnly", "prefill.onnx")):
        assert program in row(name)


def test_compile_without_fusions(causal, package):
    flags = ("--cache-dir", causal.cache)
    result = run("compile", causal.path, *SHAPES, "--no-fuse", "--explain", *flags)
    assert result.exit_code == 0, result.output
    other = Path(result.stdout.strip())
    assert other != package
    manifest = Manifest.load(other)
    assert manifest.options["fuse"] is False
    assert not [record["name"] for record in manifest.transforms if record["name"].startswith("Fuse")]
    assert "FuseAttention" not in result.stderr
    assert any(record["name"] == "FuseAttention" for record in Manifest.load(package).transforms)
    assert run("compile", causal.path, *SHAPES, "--fuse", *flags).stdout == f"{package}\n"
    for place in (other, package):
        assert (
            run("infer", place, "-p", PROMPTS[0], "--generation-len", 8).stdout == causal.greedy(PROMPTS[0], 8) + "\n"
        )


def test_infer_with_int8_weights_on_a_trained_model():
    """Text that Hugging Face writes with some distance to the second best: rounding to 8 bits does not change it."""
    prompt, count, path = "Question: what is", 16, Path("examples/demo_model/model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = tokenizer(prompt).input_ids
    tokens, logits = greedy_reference(model, ids, count)
    best = np.sort(logits, axis=1)[:, -2:]
    assert ((best[:, 1] - best[:, 0]) / logits.std(axis=1)).min() > 0.1
    flags = ("--weights", "int8", "--ctx-len", 64)
    result = run("infer", path, "--prompt", prompt, "--generation-len", count, *flags)
    assert result.exit_code == 0, result.output
    assert result.stdout == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    package = Path(run("compile", path, *flags).stdout.strip())
    manifest = Manifest.load(package)
    assert manifest.options["weights"] == "int8"
    (quantized,) = (record for record in manifest.transforms if record["name"] == "QuantizeWeights")
    assert quantized["parameters"]["bits"] == 8
    assert quantized["facts"]["weights"] == 6 * 7 + 1, "seven matrices of each layer, and the tied table"
    assert run("execute", package, "--prompt", prompt, "--generation-len", count).stdout == result.stdout


def test_embed_with_int8_weights(encoder):
    flags = ("--pooling", "mean", "--cache-dir", encoder.cache, *[f"--text={text}" for text in PROMPTS])
    result = run("embed", encoder.path, "--weights", "int8", *flags)
    assert result.exit_code == 0, result.output
    found = [json.loads(line)["embedding"] for line in result.stdout.splitlines()]
    for vector, text in zip(found, PROMPTS, strict=True):
        expected = mean_pooled(encoder, text)
        distance = np.linalg.norm(np.array(vector) - expected) / np.linalg.norm(expected)
        assert 1e-4 < distance < 0.05, "close to the floats, and not them"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "int5"), "got 'int5'. Did you mean 'int"),
        (("--weights", "fp16"), "weights must be one of fp32, int8, int4, mixed, got 'fp16'"),
        (("--weights", "INT8"), "got 'INT8'"),
        (("--weights", ""), "got ''"),
        (("--weights", "int4", "--group-size", 48), "group_size must be one of (16, 32, 64, 128, 256), got 48"),
        (("--group-size", 32), "group_size goes with weights='int4'"),
        (("--weights", "int8", "--group-size", 32), "group_size goes with weights='int4'"),
        (("--weights", "int4", "--target", "qaic", "--dry-run"), "weights='int4' is for the host"),
    ],
)
@pytest.mark.parametrize("command", ["compile", "infer"])
def test_weights_that_cannot_be(causal, tmp_path, command, arguments, words):
    prompt = ("-p", "x") if command == "infer" else ()
    refused(run(command, causal.path, *prompt, *arguments, "--cache-dir", tmp_path / "cache"), words)
    assert not list(tmp_path.glob("cache/packages/*"))


def test_flags_of_weights_for_a_package_are_refused(package):
    refused(run("infer", package, "-p", "x", "--weights", "int8"), "--weights", "compiled already")
    refused(run("infer", package, "-p", "x", "--weights", "int4", "--group-size", 32), "compiled already")
    refused(run("compile", package, "--weights", "int8"), "is a package already")


def test_a_flag_is_named_as_it_was_typed(package):
    refused(run("infer", package, "-p", "x", "--no-fuse"), "--no-fuse", "compiled already")


# ------------------------------------------------------------------ doctor


def test_doctor(tmp_path):
    result = run("doctor", "--cache-dir", tmp_path)
    assert result.exit_code == 0, result.output
    for words in ("host", "ONNX Runtime", "qaic", "only dry runs", "Apps SDK", "transformers", "free"):
        assert words in result.stdout


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("command", ["infer", "embed", "export", "compile", "validate"])
def test_a_path_that_is_not_there(tmp_path, command):
    texts = {"infer": ("-p", "x"), "embed": ("-t", "x")}.get(command, ())
    refused(run(command, tmp_path / "nothing", *texts), "nothing", "does not exist")


def test_unknown_options_and_commands_are_refused_with_the_nearest(causal):
    result = run("infer", causal.path, "--prmpt", "x")
    assert result.exit_code == 2
    assert "--prompt" in result.stderr
    result = run("compile", causal.path, "--mxfp6")
    assert result.exit_code == 2
    assert "--mxfp6-matmul" in result.stderr
    result = run("infre")
    assert result.exit_code == 2
    assert "infer" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to generate from"),
        (("--prompt", ""), "prompt 1 is empty"),
        (("--prompt", "x", "--message", "y"), "cannot be mixed"),
        (("--prompt", "x", "--prompt", "y", "--stream"), "one prompt"),
        (("--prompt", "x", "--stream", "--json"), "exclude each other"),
        (("--prompt", "x", "--top-p", "0"), "top_p"),
        (("--prompt", "x", "--batch-size", "2", "--full-batch-size", "2"), "exclude each other"),
        (("--prompt", "x", "--prefill-seq-len", "65", "--ctx-len", "64"), "prefill_seq_len=65"),
        (("--prompt", "x", "--device-group", "a,b"), "list of device ids"),
        (("--prompt", "x", "--target", "hots"), "'host'"),
        (("--prompt", "x", "--transform", "FP16Clp"), "'FP16Clip'"),
        (("--prompts-file", "/nothing/here.txt"), "cannot be read"),
    ],
)
def test_infer_mistakes(causal, tmp_path, arguments, words):
    # An empty cache stays empty: all of these are refused before the expensive work.
    refused(run("infer", causal.path, *arguments, "--cache-dir", tmp_path / "cache"), words)
    assert not list(tmp_path.glob("cache/*/*"))


def test_a_prompt_that_is_too_long(package):
    refused(run("infer", package, "-p", "x" * 100), "does not fit ctx_len=64")
    refused(run("infer", package, "-p", "x", "--generation-len", 80), "do not fit ctx_len=64")


def test_compile_options_for_a_package_are_refused(package, encoder):
    refused(run("infer", package, "-p", "x", "--ctx-len", 32), "--ctx-len", "compiled already")
    refused(run("infer", package, "-p", "x", "--transform", "FP16Clip"), "--transform")
    refused(run("compile", package), "is a package already")
    refused(run("validate", package), "no reference")


def test_the_wrong_command_for_a_package_names_the_right_one(package):
    refused(run("embed", package, "-t", "x"), "text-generation", "qefficient infer")
    refused(run("execute", package, "-t", "x"), "--prompt")
    refused(run("execute", package, "-t", "x", "-p", "y"), "one kind")


def test_packages_that_are_not_ours_or_were_changed(package, tmp_path):
    refused(run("execute", tmp_path, "-p", "x"), "manifest.json")
    (tmp_path / "manifest.json").write_text('{"format": "something"}')
    refused(run("execute", tmp_path, "-p", "x"), "made by something else")
    changed = shutil.copytree(package, tmp_path / "changed")
    weights = next((changed / "weights").iterdir())
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    refused(run("execute", changed, "-p", "x"), "was changed after it was compiled")
    assert run("execute", changed, "-p", "x", "--generation-len", 1, "--no-verify").exit_code == 0


def test_embed_mistakes(encoder):
    refused(run("embed", encoder.path, stdin=""), "no text")
    refused(run("embed", encoder.path, "-t", ""), "text 1 is empty")
    refused(run("embed", encoder.path, "-t", "x", "--pooling", "mena"), "'mean'")
    refused(run("embed", encoder.path, "-t", "x", "--output", "vectors.json"), ".npy")


def test_task_mistakes(encoder, causal, tmp_path):
    refused(run("infer", encoder.path, "-p", "x"), "BertModel")
    refused(run("export", causal.path, "--task", "translation"), "translation", "text-generation")
    refused(run("compile", tmp_path / "model.onnx"), "does not exist")
    refused(run("compile", tmp_path / "model.onnx", "--pooling", "mean"), "--pooling")


def test_debug_shows_the_traceback(tmp_path):
    result = run("export", tmp_path / "nothing", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_errors_of_libraries_in_several_lines_become_one(capsys):
    with pytest.raises(SystemExit, match="2"), user_errors():
        raise OptionError("first\nsecond")
    assert capsys.readouterr().err == "error: first second\n"


def test_ctrl_c_is_130(capsys):
    with pytest.raises(SystemExit, match="130"), user_errors():
        raise KeyboardInterrupt
    assert capsys.readouterr().err.startswith("error: interrupted")


def test_a_missing_library_says_what_to_install(capsys):
    with pytest.raises(SystemExit, match="2"), user_errors():
        raise ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir")
    assert "pip install 'qefficient[export]'" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError), user_errors():
        raise ModuleNotFoundError("No module named 'my_own'", name="my_own")


def test_bugs_are_not_hidden():
    with pytest.raises(ZeroDivisionError), user_errors():
        _ = 1 // 0

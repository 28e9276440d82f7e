"""``qefficient quantize``: the same package as compile makes, its size, and perplexity against Hugging Face's."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tiny_causal_lm, tiny_encoder, tiny_tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from QEfficient import load
from QEfficient.cli.main import app
from QEfficient.errors import InputError
from QEfficient.evaluate.perplexity import perplexity
from QEfficient.targets.manifest import Manifest

CONTEXT = 48
TEXT = "the other day an island in the sea was seen by her friends, and apples were counted\n" * 2


def quantize(*words: object) -> Any:
    return CliRunner().invoke(app, ["quantize", *(str(word) for word in words)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A torch model, its checkpoint, and a cache."""
    root = tmp_path_factory.mktemp("quantize")
    model = tiny_causal_lm("llama", hidden_size=96, intermediate_size=160)
    return model, tiny_tokenizer(save_tiny(model, root / "llama")), root / "cache"


def reference(model: Any, checkpoint: Path, text: str) -> tuple[float, int]:
    """Hugging Face's perplexity of the second half of every window of CONTEXT tokens, each window alone."""
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt").input_ids
    losses = []
    for window in ids[0].split(CONTEXT):
        with torch.no_grad():
            logprobs = model(window[None]).logits[0].double().log_softmax(-1)
        half = len(window) // 2
        losses += [-float(logprobs[n - 1, window[n]]) for n in range(half, len(window)) if half]
    return math.exp(sum(losses) / len(losses)), len(losses)


def test_sizes_and_perplexity(places: Any, tmp_path: Path) -> None:
    model, checkpoint, cache = places
    (tmp_path / "held.txt").write_text(TEXT)
    output = tmp_path / "package"
    result = quantize(
        checkpoint, "--weights", "int4", "-o", output, "--group-size", 32, "--ctx-len", CONTEXT, "--no-prepack",
        "--measure", tmp_path / "held.txt", "--cache-dir", cache,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(output)
    before = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    said = re.search(r"([\d.]+) kB of weights became a package of ([\d.]+) kB \((\d+)%\)$", result.stderr, re.MULTILINE)
    assert said is not None, result.stderr
    assert float(said[1]) == pytest.approx(before / 1000, abs=0.06)
    stored = sum(p.stat().st_size for p in output.rglob("*") if p.is_file() and p.name != "manifest.json")
    assert float(said[2]) == pytest.approx(stored / 1000, abs=0.06)
    expected, tokens = reference(model, checkpoint, TEXT.rstrip("\n"))
    shown = re.search(r"([\d.]+) in float32, ([\d.]+) in int4 .* ([\d,]+) tokens", result.stderr)
    assert shown is not None, result.stderr
    assert float(shown[1]) == pytest.approx(expected, rel=1e-4)
    assert int(shown[3]) == tokens
    # Rounding moves a random model a little, and not to nowhere.
    assert float(shown[2]) != pytest.approx(expected, rel=1e-5)
    assert float(shown[2]) == pytest.approx(expected, rel=0.1)
    # The same package as compile makes: found in the cache by its content.
    options = ("--weights", "int4", "--group-size", 32, "--ctx-len", CONTEXT, "--no-prepack")
    compiled = CliRunner().invoke(
        app, ["compile", *(str(word) for word in (checkpoint, *options, "--cache-dir", cache))]
    )
    assert Manifest.load(Path(compiled.stdout.strip())).key == Manifest.load(output).key
    with load(output) as package, pytest.raises(InputError, match="perplexity takes 4 or more"):
        perplexity(package, "the")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "fp32"], "quantizes nothing"),
        (["--weights", "int5"], "weights must be one of fp32, int8, int4, mixed, got 'int5'"),
        (["--weights", "int8", "--group-size", "32"], "group_size"),
        (["--weights", "int8", "--measure", "no-such.txt"], "no-such.txt cannot be read"),
    ],
)
def test_what_is_refused(places: Any, tmp_path: Path, words: list[str], message: str) -> None:
    _, checkpoint, cache = places
    result = quantize(checkpoint, *words, "-o", tmp_path / "out", "--cache-dir", cache)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_only_a_model_that_generates_has_a_perplexity(places: Any, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text(TEXT)
    checkpoint = tiny_tokenizer(save_tiny(tiny_encoder("bert"), tmp_path / "bert"))
    words = ("--weights", "int8", "-o", tmp_path / "out", "--measure", tmp_path / "held.txt")
    result = quantize(checkpoint, *words, "--cache-dir", places[2])
    assert result.exit_code == 2
    assert "--measure takes a model that generates text" in result.stderr
    assert not (tmp_path / "out").exists()

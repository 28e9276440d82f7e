"""`model.validate(simulate="qaic")` reports what formats do, names what overflows, and leaves the model alone."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from mx_definition import by_definition
from tiny_models import sample_prompt, save_tiny, tiny_causal_lm, tiny_classifier, tiny_tokenizer

from QEfficient import QEFFAutoModelForCausalLM, QEFFAutoModelForSequenceClassification
from QEfficient.engine.package import open_package
from QEfficient.errors import InputError, OptionError
from QEfficient.evaluate.numerics_report import NumericsReport
from QEfficient.evaluate.perplexity import perplexity
from QEfficient.evaluate.steps import SessionSteps, forced

FORMATS = ["fp32", "fp16", "mxfp6", "mxint8 KV", "mxfp6 + mxint8 KV"]
TEXT = "the cat sat on the mat and the dog lay on the rug beside it " * 3


@pytest.fixture(scope="module")
def previewed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, NumericsReport]:
    path = save_tiny(tiny_causal_lm("qwen3", num_hidden_layers=1), tmp_path_factory.mktemp("numerics") / "model")
    tiny_tokenizer(path)
    model = QEFFAutoModelForCausalLM.from_pretrained(path)
    model.compile(ctx_len=32, prefill_seq_len=8)
    return model, model.validate([TEXT[:20], TEXT[20:50]], simulate="qaic", text=TEXT, tokens=4)


def test_a_row_for_every_set_of_formats(previewed: tuple[Any, NumericsReport]) -> None:
    model, report = previewed
    rows = {row.formats: row for row in report.formats}
    assert list(rows) == FORMATS
    exact = rows["fp32"]
    assert (exact.cosine, exact.least_cosine) == pytest.approx((1, 1), abs=1e-12)
    assert (exact.equal, exact.choices) == (8, 8)
    lost = {name: 1 - row.cosine for name, row in rows.items()}
    assert 0 < lost["fp16"] < lost["mxint8 KV"] < lost["mxfp6"] < 0.01
    with open_package(model.compile(ctx_len=32, prefill_seq_len=8)) as package:
        assert exact.perplexity == pytest.approx(perplexity(package, TEXT).value, rel=1e-6)
    assert len({row.perplexity for row in rows.values()}) == 5


def test_figures_are_those_of_the_packages(previewed: tuple[Any, NumericsReport]) -> None:
    """One row again, by hand: greedy tokens of float32 fed to the package of that row."""
    model, report = previewed
    row = {row.formats: row for row in report.formats}["mxfp6"]
    vectors: list[list[np.ndarray]] = []
    chosen: list[np.ndarray] = []
    for options in ({}, {"simulate": "qaic", "mxfp6_matmul": True}):
        with open_package(model.compile(ctx_len=32, prefill_seq_len=8, **options)) as package:
            ids = [np.array(package.tokenizer.encode(text)) for text in (TEXT[:20], TEXT[20:50])]
            chosen = chosen or [
                np.asarray(package.generate(input_ids=i[None], max_new_tokens=4)).reshape(-1)[-4:] for i in ids
            ]
            steps = SessionSteps(package.session)
            vectors.append([v for i, c in zip(ids, chosen, strict=True) for v in forced(steps, i, c, 32)])
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(*vectors, strict=True)]
    assert (row.cosine, row.least_cosine) == pytest.approx((np.mean(cosines), min(cosines)), abs=1e-6)
    assert row.equal == sum(a.argmax() == b.argmax() for a, b in zip(*vectors, strict=True))


def test_the_report_prints_and_saves(previewed: tuple[Any, NumericsReport]) -> None:
    _, report = previewed
    printed = str(report)
    assert all(name in printed for name in FORMATS)
    assert f"{report.losses[0].name} ({report.losses[0].output:.2%})" in printed.replace("\n", " ")
    assert len(report.losses) == 8  # seven matrices of a layer and the head
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["formats"][0]["formats"] == "fp32"
    assert not report.overflows
    assert "Nothing left the range of float16" in printed


def test_the_model_keeps_its_package() -> None:
    model = QEFFAutoModelForSequenceClassification(tiny_classifier("bert"))
    package = model.compile(seq_len=24)
    rows = [sample_prompt(9), sample_prompt(9, 1), sample_prompt(9, 2)]
    report = model.validate({"input_ids": rows}, simulate="qaic")
    assert model.qpc_path == package
    assert [row.formats for row in report.formats] == ["fp32", "fp16", "mxfp6"]
    assert all(row.choices == 3 and row.perplexity is None for row in report.formats)
    assert 0.9 < report.formats[2].least_cosine < report.formats[1].least_cosine <= 1


def test_overflows_are_named_with_their_size() -> None:
    torch_model = tiny_causal_lm("qwen3", num_hidden_layers=1)
    with torch.no_grad():
        torch_model.model.layers[0].mlp.up_proj.weight[0] *= 1e6
        torch_model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    prompt = sample_prompt(9)
    model = QEFFAutoModelForCausalLM(torch_model)
    model.compile(ctx_len=32, prefill_seq_len=8)
    report = model.validate({"input_ids": [prompt]}, simulate="qaic", tokens=2)

    clipped = copy.deepcopy(torch_model)
    largest = float(clipped.model.layers[0].mlp.up_proj.weight.detach().abs().max())
    clipped.model.layers[0].mlp.up_proj.weight.data.clamp_(-65504, 65504)
    seen: list[torch.Tensor] = []
    clipped.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        clipped(input_ids=torch.tensor([prompt]))
    peak = float(seen[0].abs().max())
    assert peak > 65520

    weights = [o for o in report.overflows if o.kind == "weight"]
    assert [(o.name, o.largest) for o in weights] == [("model.layers.0.mlp.up_proj.weight", pytest.approx(largest))]
    mine = [o for o in report.overflows if "/mlp/" in o.name and "MatMul" in o.name]
    assert any(o.largest == pytest.approx(peak, rel=1e-4) for o in mine)
    assert report.formats[1].cosine is None
    assert "not finite" in str(report)
    assert "clipped to 65504: the weights model.layers.0.mlp.up_proj.weight" in str(report).replace("\n", " ")


def test_losses_are_those_of_the_products_on_this_input(previewed: tuple[Any, NumericsReport]) -> None:
    """Every linear layer on what Hugging Face gives it, with and without MXFP6 in its weight."""
    model, report = previewed
    losses, torch_model = report.losses, tiny_causal_lm("qwen3", num_hidden_layers=1)
    with open_package(model.qpc_path) as package:
        prompts = [package.tokenizer.encode(text) for text in (TEXT[:20], TEXT[20:50])]
    sums: dict[str, np.ndarray] = {}

    def watch(name: str, module: torch.nn.Linear) -> None:
        kept = np.array([by_definition(row, "e2m3") for row in module.weight.detach().numpy()])

        def hook(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            last = slice(-1, None) if name == "lm_head" else slice(None)  # the graph makes the last token's logits only
            exact = output[:, last].double().numpy()
            error = inputs[0][:, last].double().numpy() @ kept.T - exact
            sums[name] = sums.get(name, 0) + np.array([(error**2).sum(), (exact**2).sum()])

        module.register_forward_hook(hook)

    for name, module in torch_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            watch(name, module)
    with torch.no_grad():
        for prompt in prompts:
            torch_model(input_ids=torch.tensor([prompt]))
    expected = {f"{name}.weight": float(np.sqrt(error / size)) for name, (error, size) in sums.items()}
    assert {loss.name: loss.output for loss in losses} == pytest.approx(expected, rel=2e-3)
    assert [loss.name for loss in losses] == sorted(expected, key=lambda name: -expected[name])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"simulate": "qiac"}, OptionError, "Did you mean 'qaic'"),
        ({"simulate": "qaic", "tokens": 0}, InputError, "at least 1"),
        ({"simulate": "qaic", "prompts": ["a"], "texts": ["b"]}, InputError, "one of"),
    ],
)
def test_unusable_requests_are_one_sentence(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        QEFFAutoModelForCausalLM(tiny_causal_lm("qwen3", num_hidden_layers=1)).validate(**arguments)

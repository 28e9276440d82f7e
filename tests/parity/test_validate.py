"""`model.validate()` says "equal" for a good package and never for one whose weights are not the reference's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    greedy_reference,
    sample_prompt,
    save_tiny,
    tiny_causal_lm,
    tiny_classifier,
    tiny_encoder,
    tiny_tokenizer,
)
from transformers import PreTrainedModel

from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM, QEFFAutoModelForSequenceClassification
from QEfficient.errors import InputError
from QEfficient.evaluate.parity import ParityReport

STAGES = ["transformed torch", "ONNX", "package"]
MODELS: dict[str, Any] = {
    "llama": lambda: (QEFFAutoModelForCausalLM, tiny_causal_lm("llama")),
    "gemma2": lambda: (QEFFAutoModelForCausalLM, tiny_causal_lm("gemma2")),
    "jamba": lambda: (QEFFAutoModelForCausalLM, tiny_causal_lm("jamba")),
    "bert": lambda: (QEFFAutoModel, tiny_encoder("bert")),
    "llama classifier": lambda: (QEFFAutoModelForSequenceClassification, tiny_classifier("llama")),
}


def nudge(model: PreTrainedModel, by: float) -> None:
    """Changes one weight of the first layer."""
    with torch.no_grad():
        matrix = next(p for n, p in model.named_parameters() if ".0." in n and p.dim() == 2)
        matrix[0, 0] += by


def compiled(cls: Any, source: Any, **options: Any) -> Any:
    model = cls(source) if not isinstance(source, Path) else cls.from_pretrained(source)
    if cls is QEFFAutoModelForCausalLM:
        options = {"ctx_len": 32, "prefill_seq_len": 5, **options}
    model.compile(**options)
    return model


def verdicts(report: ParityReport) -> dict[str, bool]:
    return {stage.stage: stage.ok for stage in report.stages}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    cls, model = MODELS[request.param]()
    return cls, save_tiny(model, tmp_path_factory.mktemp("validate") / request.param.replace(" ", "-"))


def test_a_good_package(checkpoint: tuple[Any, Path]) -> None:
    report = compiled(*checkpoint).validate()
    assert report.ok, str(report)
    assert [stage.stage for stage in report.stages] == STAGES
    for stage in report.stages:
        assert stage.max_rel <= report.tolerance == 1e-4
        assert stage.tokens_equal == stage.tokens
        assert (stage.tokens > 0) == (report.task == "text-generation")
    assert "DIFFERS" not in str(report)


@pytest.mark.parametrize("by", [0.5, float("nan")])
def test_weights_that_are_not_the_reference(checkpoint: tuple[Any, Path], by: float) -> None:
    """The package is made from the files; the reference in memory gets one other weight afterwards."""
    model = compiled(*checkpoint)
    nudge(model.model, by)
    report = model.validate()
    assert not report.ok
    found = verdicts(report)
    assert not found["ONNX"]
    assert not found["package"]
    # It shares its weights with the changed reference, so only a NaN may part the two.
    assert found["transformed torch"] == (by == 0.5)
    assert "DIFFERS" in str(report)
    assert report.to_json()["ok"] is False


def test_an_export_of_another_model(tmp_path: Path) -> None:
    """The graph of one checkpoint, compiled under the name of another."""
    one, other = (save_tiny(tiny_causal_lm("llama", seed), tmp_path / str(seed)) for seed in (0, 1))
    path = QEFFAutoModelForCausalLM.from_pretrained(one).export()
    model = QEFFAutoModelForCausalLM.from_pretrained(other)
    model.compile(path, ctx_len=32, prefill_seq_len=5)
    assert verdicts(model.validate()) == {"transformed torch": True, "ONNX": False, "package": False}


def test_a_package_that_a_transform_changed() -> None:
    """The export is good; only what the transform queue made of it is not."""
    model = compiled(QEFFAutoModelForCausalLM, tiny_causal_lm("llama"), transforms=["FP16Clip:limit=0.2"])
    report = model.validate()
    assert verdicts(report) == {"transformed torch": True, "ONNX": True, "package": False}
    assert not report.ok


def test_continuous_batching() -> None:
    reference = tiny_causal_lm("mamba2")
    model = compiled(QEFFAutoModelForCausalLM, copy.deepcopy(reference), full_batch_size=2)
    assert model.validate().ok


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_poolings(pooling: str) -> None:
    model = QEFFAutoModel(tiny_encoder("bert"), pooling=pooling)
    assert model.validate().ok
    nudge(model.model, 0.5)  # the model in memory is the reference; what was exported is not changed by this
    assert verdicts(model.validate()) == {"transformed torch": True, "ONNX": False, "package": False}


def test_own_input() -> None:
    """Token ids with padding, as many steps as asked for, and fewer where the context ends."""
    reference = tiny_causal_lm("llama")
    model = compiled(QEFFAutoModelForCausalLM, reference)
    rows = [sample_prompt(30), sample_prompt(4)]
    ids, mask = np.zeros((2, 30), np.int64), np.zeros((2, 30), np.int64)
    for i, row in enumerate(rows):
        ids[i, 30 - len(row) :], mask[i, 30 - len(row) :] = row, 1
    report = model.validate({"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}, tokens=6)
    assert report.ok
    assert [(s.tokens_equal, s.tokens) for s in report.stages] == [(3 + 6, 3 + 6)] * 3
    with pytest.raises(InputError):
        model.validate(tokens=0)
    with pytest.raises(InputError):
        model.validate(prompts=["a"], texts=["b"])


def test_text_and_a_model_with_an_end_token(tmp_path: Path) -> None:
    """Hugging Face would stop at it, or be kept from choosing it; the comparison goes on to the last step."""
    reference = tiny_causal_lm("llama")
    directory = save_tiny(reference, tmp_path / "model")
    tiny_tokenizer(directory)
    model = compiled(QEFFAutoModelForCausalLM, directory)
    texts = ["the end of it", "we"]
    rows = [model._ready().tokenizer.encode(text) for text in texts]
    model.model.generation_config.eos_token_id = greedy_reference(reference, rows[0], 3)[0][2]
    report = model.validate(prompts=texts, tokens=8)
    assert report.ok, str(report)
    assert [stage.tokens for stage in report.stages] == [16] * 3


def test_the_tolerance_counts(checkpoint: tuple[Any, Path]) -> None:
    """A change far below one weight's size is within a wide tolerance and outside a narrow one."""
    model = compiled(*checkpoint)
    nudge(model.model, 0.02)
    assert not model.validate(tolerance=1e-6).ok
    if model.task != "text-generation":  # elsewhere a token may change
        assert model.validate(tolerance=0.5).ok

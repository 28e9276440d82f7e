"""Classifiers through refine: classes from the data, heads kept or made, results that transformers and PEFT load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import save_tiny, tiny_causal_lm, tiny_classifier, tiny_encoder, tiny_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from QEfficient import QEFFAutoModelForSequenceClassification
from QEfficient.errors import ExportError
from QEfficient.finetune import QEffConfig, QEfficient, QEffModelManager, QEffTrainingArgs
from QEfficient.finetune.classes import choose_classes

WORDS = {"bad": ("awful", "boring", "sad"), "fine": ("usual", "plain", "so so"), "good": ("great", "fun", "bright")}
ROWS = [
    {"text": f"{opening} film was {word}{end}", "label": label}
    for label, words in WORDS.items()
    for word in words
    for opening in ("the", "this new")
    for end in ("", " for me")
]
HEADS = {"bert": "classifier", "llama": "score"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints without a head for classes: an encoder and a language model."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family, make in (("bert", tiny_encoder), ("llama", tiny_causal_lm)):
        save_tiny(make(family), root / family)
        tiny_tokenizer(root / family)
    return root


def refined(model: Path, output: Path, rows=ROWS, **config):
    args = QEffTrainingArgs(
        output, max_steps=60, batch_size=9, learning_rate=3e-3, save_strategy="no", report_to="none",
        disable_tqdm=True, plot=False,
    )  # fmt: skip
    given = {"train_frac": 1.0, "max_ctx_len": 64, "task": "seq_classification", **config}
    qe = QEfficient(QEffConfig(str(model), rows, **given), args)
    heard: list[object] = []
    tuned, tokenizer = qe.refine(say=heard.append)
    return qe, tuned, tokenizer, heard


def predictions(model, tokenizer, rows=ROWS) -> np.ndarray:
    """Logits of padded batches, as a user of transformers gets them: [rows, classes]."""
    inputs = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def accuracy(logits: np.ndarray, names: list[str], rows=ROWS) -> float:
    return float(np.mean([names[i] == row["label"] for i, row in zip(logits.argmax(1), rows, strict=True)]))


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.sweep), "llama"])
def test_full_fine_tuning_loads_everywhere(family, checkpoints, tmp_path):
    out = tmp_path / "out"
    qe, tuned, tokenizer, heard = refined(checkpoints / family, out, lora_config=None)
    assert qe.proof is not None
    assert qe.proof.passed
    assert any("3 classes on a new head: bad, fine, good" in str(line) for line in heard)

    plain = AutoModelForSequenceClassification.from_pretrained(out)
    assert plain.config.id2label == {0: "bad", 1: "fine", 2: "good"}
    assert plain.config.label2id == {"bad": 0, "fine": 1, "good": 2}
    logits = predictions(plain, tokenizer)
    np.testing.assert_allclose(logits, predictions(tuned, tokenizer), atol=1e-5)
    assert accuracy(logits, ["bad", "fine", "good"]) >= 0.9

    compiled = QEFFAutoModelForSequenceClassification.from_pretrained(str(out))
    inputs = AutoTokenizer.from_pretrained(out)([row["text"] for row in ROWS[:4]], padding=True, return_tensors="np")
    found = compiled.generate({k: inputs[k] for k in ("input_ids", "attention_mask")})["logits"]
    np.testing.assert_allclose(found, logits[:4], atol=2e-4)


@pytest.mark.parametrize("family", ["bert", pytest.param("llama", marks=pytest.mark.sweep)])
def test_lora_trains_the_head_too(family, checkpoints, tmp_path):
    out = tmp_path / "out"
    qe, tuned, tokenizer, _ = refined(checkpoints / family, out, lora_config={"r": 8})
    assert qe.proof is not None
    assert qe.proof.passed
    head = f"base_model.model.{HEADS[family]}.weight"
    tensors = load_file(out / "adapter_model.safetensors")
    assert tensors[head].shape[0] == 3
    assert not any(HEADS[family] in name and "lora" in name for name in tensors)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert HEADS[family] in settings["modules_to_save"]
    assert settings["base_model_name_or_path"] == str(checkpoints / family)

    base = AutoModelForSequenceClassification.from_pretrained(
        settings["base_model_name_or_path"], config=AutoConfig.from_pretrained(out)
    )
    logits = predictions(PeftModel.from_pretrained(base, str(out)), tokenizer)
    np.testing.assert_allclose(logits, predictions(tuned, tokenizer), atol=1e-5)
    assert accuracy(logits, ["bad", "fine", "good"]) >= 0.9


def manager_of(model: Path, tmp_path: Path, seed: int = 0, **config) -> QEffModelManager:
    given = {"task": "seq_classification", "max_ctx_len": 64, **config}
    return QEffModelManager(QEffConfig(str(model), ROWS, **given), QEffTrainingArgs(tmp_path / "out", seed=seed))


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_new_head_is_transformers_own(lora, checkpoints, tmp_path):
    """Weights of standard deviation initializer_range, biases 0, the same for a seed."""

    def head(seed: int) -> dict[str, torch.Tensor]:
        manager = manager_of(checkpoints / "bert", tmp_path, seed, lora_config=lora)
        manager.set_classes({str(i): i for i in range(40)}, pad_token_id=0)
        model = manager.init_model()
        return {model.file_names[n]: p.detach() for n, p in model.trained.items() if "classifier" in n}

    first, again, other = head(0), head(0), head(1)
    weight, bias = sorted(first, key=len, reverse=True)
    assert first[weight].shape == (40, 64)
    assert float(first[weight].std()) == pytest.approx(0.02, rel=0.1)
    assert not first[bias].any()
    assert torch.equal(first[weight], again[weight])
    assert not torch.equal(first[weight], other[weight])


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_head_for_the_same_classes_is_kept(lora, tmp_path):
    model = tiny_classifier(
        "llama", id2label={0: "bad", 1: "fine", 2: "good"}, label2id={"bad": 0, "fine": 1, "good": 2}
    )
    save_tiny(model, tmp_path / "model")
    for labels, kept in (({"bad": 0, "fine": 1, "good": 2}, True), ({"up": 0, "down": 1, "left": 2}, False)):
        manager = manager_of(tmp_path / "model", tmp_path, lora_config=lora)
        classes = manager.set_classes(labels, pad_token_id=0)
        assert classes.new_head is not kept
        described = manager.init_model()
        (head,) = [p for n, p in described.trained.items() if "score" in n]
        assert torch.equal(head.detach(), model.score.weight.detach()) is kept
        assert described.config.id2label == dict(enumerate(labels))


def test_a_head_of_another_size_gives_way(tmp_path):
    save_tiny(tiny_classifier("bert"), tmp_path / "model")  # three classes
    manager = manager_of(tmp_path / "model", tmp_path, lora_config=None)
    manager.set_classes({"no": 0, "yes": 1}, pad_token_id=0)
    assert manager.init_model().trained["classifier.weight"].shape[0] == 2
    assert manager.load_reference().config.num_labels == 2


def test_a_body_with_a_hole_is_refused(checkpoints, tmp_path):
    """Only a head may be missing: a random layer inside the body would go unnoticed."""
    from safetensors.torch import save_file

    place = tmp_path / "model"
    save_tiny(tiny_encoder("bert"), place)
    tensors = load_file(place / "model.safetensors")
    hole = next(name for name in tensors if "layer.1.attention.self.query.weight" in name)
    tensors.pop(hole)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    manager = manager_of(place, tmp_path, lora_config=None)
    manager.set_classes({"no": 0, "yes": 1}, pad_token_id=0)
    with pytest.raises(ExportError, match=r"lacks .*query\.weight"):
        manager.init_model()


@pytest.mark.parametrize(
    ("labels", "names", "new"),
    [
        ({"0": 0, "1": 1}, ("a", "b", "c"), False),  # numbers fit any head that is wide enough
        ({"0": 0, "1": 1, "2": 2, "3": 3}, ("0", "1", "2", "3"), True),
        ({"a": 0, "b": 1}, ("a", "b", "c"), False),
        ({"b": 0, "a": 1}, ("b", "a"), True),  # the same names under other ids
        ({"x": 0, "y": 1, "z": 2}, ("x", "y", "z"), True),
    ],
)
def test_classes_of_data_and_checkpoint(labels, names, new):
    config = AutoConfig.for_model("bert", id2label={0: "a", 1: "b", 2: "c"})
    config.architectures = ["BertForSequenceClassification"]
    found = choose_classes(config, labels)
    assert (found.names, found.new_head) == (names, new)
    config.architectures = ["BertModel"]
    assert choose_classes(config, labels).new_head

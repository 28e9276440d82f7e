"""Freezing by layer: which tensors train, and that all others come out as they went in, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny, tiny_causal_lm, tiny_classifier, tiny_tokenizer
from transformers import AutoModelForCausalLM

from QEfficient.errors import OptionError, UnsupportedModelError
from QEfficient.finetune import QEffConfig, QEfficient, QEffModelManager, QEffTrainingArgs
from QEfficient.finetune.freezing import blocks_of

ROWS = [{"prompt": f"{word} is", "completion": f" {word[::-1]}"} for word in ("one", "two", "three", "four")]


def manager(place: Path, **options: Any) -> QEffModelManager:
    return QEffModelManager(QEffConfig(str(place), ROWS, max_ctx_len=32, **options), QEffTrainingArgs("unused"))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("freezing")
    made = {family: tiny_causal_lm(family) for family in ("llama", "gpt2", "gemma2", "opt")}
    return {
        **{name: tiny_tokenizer(save_tiny(model, root / name)) for name, model in made.items()},
        "bert": tiny_tokenizer(save_tiny(tiny_classifier("bert"), root / "bert")),
    }


#: Family -> what a parameter of its second and last block begins with, and what trains beside the blocks when only the
#: first block and the embeddings are frozen (a head that is tied to the embedding stays with it).
EXPECTED = {
    "llama": ("model.layers.1.", {"model.norm.weight", "lm_head.weight"}),
    "gpt2": ("transformer.h.1.", {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
    "gemma2": ("model.layers.1.", {"model.norm.weight"}),
    "opt": (
        "model.decoder.layers.1.",
        {"model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"},
    ),
    "bert": (
        "bert.encoder.layer.1.",
        {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"},
    ),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_names(family: str, places: dict[str, Path]) -> None:
    prefix, beside = EXPECTED[family]
    task = "seq_classification" if family == "bert" else "generation"

    def trained(**options: Any) -> set[str]:
        found = manager(places[family], task=task, **options)
        if family == "bert":
            found.set_classes({"no": 0, "yes": 1, "maybe": 2}, 0)
        return set(found.init_model().trained)

    last, upper = trained(unfreeze_last_n=1), trained(freeze_layers=1)
    block = {name for name in last if name.startswith(prefix)}
    assert len(block) >= 9
    assert last == block | (beside if family == "bert" else set())  # a classifier's head may be new
    assert upper == block | beside
    first = trained(unfreeze_last_n=-1)
    assert {name.replace(".0.", ".1.", 1) for name in first} == last
    assert trained(freeze_layers=2) == beside


def test_frozen_weights_come_out_as_they_went_in(places: dict[str, Path], tmp_path: Path) -> None:
    args = QEffTrainingArgs(
        tmp_path / "out", max_steps=2, batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant",
        report_to="none", save_strategy="no", disable_tqdm=True, plot=False,
    )  # fmt: skip
    config = QEffConfig(str(places["llama"]), ROWS, train_frac=1.0, max_ctx_len=32, unfreeze_last_n=1)
    qe = QEfficient(config, args)
    qe.refine(say=lambda line: None, load=False)
    assert qe.proof is not None
    assert qe.proof.passed
    assert len(qe.proof.gradients) == 9  # of the trained tensors only
    before, after = (load_file(place / "model.safetensors") for place in (places["llama"], tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) is not name.startswith("model.layers.1."), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_more_layers_than_there_are(places: dict[str, Path]) -> None:
    for option, value in (("unfreeze_last_n", 3), ("unfreeze_last_n", -3), ("freeze_layers", 3)):
        with pytest.raises(OptionError, match=f"{option} is 3, and LlamaForCausalLM has 2 layers: lower it"):
            manager(places["llama"], **{option: value}).init_model()


def test_a_model_without_a_list_of_layers() -> None:
    model = tiny_causal_lm("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModelError, match="name what trains with trainable"):
        blocks_of(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unfreeze_last_n": 0}, "nothing would train"),
        ({"unfreeze_last_n": True}, "unfreeze_last_n must be an integer"),
        ({"freeze_layers": -1}, "freeze_layers must be an integer of at least 0"),
        ({"freeze_layers": 1, "unfreeze_last_n": 1}, "unfreeze_last_n and freeze_layers both say"),
        ({"freeze_layers": 1, "lora_config": {"r": 4}}, "freeze_layers and lora_config both say"),
        ({"freeze_layers": 1, "trainable": ["*.bias"]}, "trainable and freeze_layers both say"),
    ],
)
def test_contradictions(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        QEffConfig("m", "d.jsonl", **options)


def test_names_of_other_tools() -> None:
    assert QEffConfig("m", "d.jsonl", freeze_trainable_layers=2).unfreeze_last_n == 2
    assert QEffConfig("m", "d.jsonl", unfreeze_last_n=2).lora_config is None

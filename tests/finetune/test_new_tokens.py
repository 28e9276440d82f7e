"""New tokens: rows as transformers draws them, trained, read by PEFT, spoken by the compiled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import VOCAB_SIZE, greedy_reference, save_tiny, tiny_causal_lm, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from QEfficient.errors import OptionError
from QEfficient.finetune import QEffConfig, QEfficient, QEffModelManager, QEffTrainingArgs
from QEfficient.finetune.merge import merge_adapter
from QEfficient.finetune.resize import ResizedSource
from QEfficient.models.source import CheckpointSource
from QEfficient.store.digest import DigestMemo

NEW = ("<ping>", "<pong>")
ROWS = [{"prompt": f"{word} <ping>", "completion": " <pong><pong>"} for word in ("one", "two", "three", "four")]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokens")
    made = {
        "untied": (tiny_causal_lm("llama", num_hidden_layers=1), torch.bfloat16),
        "tied": (tiny_causal_lm("llama", num_hidden_layers=1, tie_word_embeddings=True), torch.float32),
    }
    return {n: tiny_tokenizer(save_tiny(m, root / n, dtype=dtype)) for n, (m, dtype) in made.items()}


def configuration(place: Path, **options: Any) -> QEffConfig:
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    settings = {"resize_embeddings": True, "new_tokens": NEW, "lora_config": lora, **options}
    return QEffConfig(str(place), ROWS, train_frac=1.0, max_ctx_len=32, **settings)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_rows_are_drawn_as_transformers_draws_them(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    source = ResizedSource(places[kind], kind, False, VOCAB_SIZE + 3)
    found = source.load("AutoModelForCausalLM")
    with torch.random.fork_rng(devices=[]):
        expected = AutoModelForCausalLM.from_pretrained(places[kind], dtype=torch.float32)
        torch.manual_seed(0)
        expected.resize_token_embeddings(VOCAB_SIZE + 3)
    stored = torch.bfloat16 if kind == "untied" else torch.float32
    for name, parameter in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter.to(stored).float()), name
    assert found.get_input_embeddings().weight.shape[0] == VOCAB_SIZE + 3 == found.config.vocab_size
    memo = DigestMemo(tmp_path)
    assert source.identity(memo) != CheckpointSource(places[kind], kind).identity(memo)
    refs = source.weights(source.ghost("AutoModelForCausalLM"), tmp_path)
    assert refs["model.embed_tokens.weight"].shape == (VOCAB_SIZE + 3, 64)
    assert ("lm_head.weight" in refs) is (kind == "untied")


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_new_tokens_are_learned_and_spoken(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = QEffTrainingArgs(
        out, max_steps=24, batch_size=4, learning_rate=5e-2, lr_scheduler_type="constant", report_to="none",
        save_strategy="no", disable_tqdm=True, plot=False,
    )  # fmt: skip
    qe = QEfficient(configuration(places[kind]), args)
    qe.refine(say=lambda line: None, load=False)
    assert qe.proof is not None
    assert qe.proof.passed
    rows = [name for name in qe.proof.gradients if "trainable_tokens_delta" in name]
    assert len(rows) == (1 if kind == "tied" else 2)

    # As any user of PEFT reads it: the saved tokenizer, the base model made larger, the adapter.
    tokenizer = AutoTokenizer.from_pretrained(out)
    ping, pong = tokenizer.convert_tokens_to_ids(list(NEW))
    assert {ping, pong} == {VOCAB_SIZE, VOCAB_SIZE + 1}
    base: Any = AutoModelForCausalLM.from_pretrained(places[kind], dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer))
    read: Any = PeftModel.from_pretrained(base, str(out)).eval()
    assert qe.data_manager is not None
    prompt = qe.data_manager.prompt_ids("one <ping>")
    assert ping in prompt
    tokens = greedy_reference(read, prompt, 4)[0]
    assert tokens.count(pong) >= 2

    if kind == "untied":
        assert qe.generate("one <ping>", max_new_tokens=4).count("<pong>") >= 2
    merge_adapter(out, tmp_path / "merged")
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert greedy_reference(merged, prompt, 4)[0] == tokens
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == tokenizer.get_vocab()


def manager(place: Path, **options: Any) -> QEffModelManager:
    return QEffModelManager(configuration(place, **options), QEffTrainingArgs("unused"))


def test_a_tokenizer_larger_than_the_model(places: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=r"tokenizer has 130 tokens and .* has room for 128: set resize_embeddings"):
        manager(places["untied"], resize_embeddings=False)
    fits = manager(places["untied"], new_tokens=None)
    assert not isinstance(fits.source, ResizedSource)  # nothing to do


def test_what_would_never_be_learned(places: dict[str, Path]) -> None:
    for options in (
        {"lora_config": {"peft_type": "IA3"}},
        {"lora_config": None, "unfreeze_last_n": 1},
        {"lora_config": {"trainable_token_indices": {"lm_head": [128]}}},
    ):
        with pytest.raises(OptionError, match="2 new tokens would never be learned"):
            manager(places["untied"], **options).init_model()


def test_what_trains_the_new_rows(places: dict[str, Path]) -> None:
    def trained(**options: Any) -> dict[str, tuple[int, ...]]:
        model = manager(places["untied"], **options).init_model()
        return {model.file_names[n]: tuple(p.shape) for n, p in model.trained.items() if "proj" not in n}

    prefix, delta = "base_model.model.", "token_adapter.trainable_tokens_delta"
    embedding, head = f"{prefix}model.embed_tokens.", f"{prefix}lm_head."
    assert trained() == {embedding + delta: (2, 64), head + delta: (2, 64)}
    whole = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    assert trained(lora_config=whole) == {embedding + "weight": (130, 64), head + delta: (2, 64)}
    everything = trained(lora_config=None)
    assert everything["model.embed_tokens.weight"] == everything["lm_head.weight"] == (130, 64)
    # Tokens the model had rows for already need no larger embedding, but these rows train as well.
    known = manager(places["untied"], new_tokens=("<unk>",), resize_embeddings=False)
    assert known.peft_config().trainable_token_indices == {"lm_head": [3], "model.embed_tokens": [3]}


def test_contradictions() -> None:
    with pytest.raises(OptionError, match="resize_embeddings is for task='generation'"):
        QEffConfig("m", "d.jsonl", resize_embeddings=True, task="seq_classification")
    with pytest.raises(OptionError, match="new_tokens must be a non-empty string"):
        QEffConfig("m", "d.jsonl", new_tokens=["<a>", ""])
    assert QEffConfig("m", "d.jsonl", new_tokens="<a>").new_tokens == ("<a>",)

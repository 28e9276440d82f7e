"""The tiny models are only worth something if their outputs depend on the context."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_models import (
    CAUSAL_TYPES,
    CLASSIFIER_TYPES,
    ENCODER_TYPES,
    EXTRA_CAUSAL_TYPES,
    NUM_LABELS,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    context_sensitivity,
    greedy_reference,
    sample_prompt,
    save_tiny,
    tiny_causal_lm,
    tiny_classifier,
    tiny_encoder,
    tiny_tokenizer,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

ALL_CAUSAL = CAUSAL_TYPES + EXTRA_CAUSAL_TYPES
PROMPTS = [sample_prompt(12, seed) for seed in range(4)]
NEW_TOKENS = 10


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def causal(name: str) -> PreTrainedModel:
    return tiny_causal_lm(name)


@cache
def references(name: str) -> list[tuple[list[int], np.ndarray]]:
    return [greedy_reference(causal(name), prompt, NEW_TOKENS) for prompt in PROMPTS]


def realigned(model: PreTrainedModel) -> PreTrainedModel:
    """A loaded model in eval mode, its weights moved to where an unloaded model would have them.

    Weights that are mapped from a file may be aligned differently, and then the last bits of products differ.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


@torch.no_grad()
def causal_logits(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([prompt])).logits


def outputs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Hidden states of an encoder or logits of a classifier."""
    rows = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=rows, attention_mask=torch.ones_like(rows))[0]


@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_generation_shape_and_scale(name: str) -> None:
    for tokens, logits in references(name):
        assert len(tokens) == NEW_TOKENS
        assert logits.shape == (NEW_TOKENS, VOCAB_SIZE)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()
        assert 0.5 < logits.std() < 30
        assert logits.argmax(-1).tolist() == tokens


@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_generation_depends_on_the_prompt(name: str) -> None:
    sequences = [tokens for tokens, _ in references(name)]
    assert all(len(set(tokens)) >= 3 for tokens in sequences), sequences
    assert len({tuple(tokens) for tokens in sequences}) == len(PROMPTS), sequences


@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_early_tokens_move_the_last_logits(name: str) -> None:
    assert context_sensitivity(causal(name), PROMPTS[0]) > 0.05


@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_generation_equals_recomputation(name: str) -> None:
    """HF's own cache agrees with a run over the whole sequence, so that the references can be trusted."""
    tokens, logits = references(name)[0]
    whole = causal_logits(causal(name), PROMPTS[0] + tokens[:-1])[0, len(PROMPTS[0]) - 1 :].numpy()
    np.testing.assert_allclose(whole, logits, atol=1e-4 * max(1.0, float(logits.std())))


@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_biases_and_corrections_are_not_zero(name: str) -> None:
    for key, tensor in causal(name).state_dict().items():
        assert tensor.any(), key


@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_checkpoint_round_trip(name: str, tmp_path: Path) -> None:
    save_tiny(causal(name), tmp_path)
    loaded = realigned(AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True))
    assert loaded.generation_config.eos_token_id is None
    tokens, logits = greedy_reference(loaded, PROMPTS[0], NEW_TOKENS)
    assert tokens == references(name)[0][0]
    np.testing.assert_array_equal(logits, references(name)[0][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_checkpoint_in_another_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = causal(name).config.to_dict()
    save_tiny(causal(name), tmp_path, dtype=dtype)
    assert causal(name).dtype == torch.float32
    assert causal(name).config.to_dict() == config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, dtype="auto").eval()
    assert loaded.dtype == dtype
    difference = causal_logits(loaded, PROMPTS[0]).float() - causal_logits(causal(name), PROMPTS[0])
    assert difference.std() < 0.25 * references(name)[0][1].std()


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    save_tiny(causal("llama_tied"), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_checkpoint_in_shards(tmp_path: Path) -> None:
    save_tiny(causal("llama"), tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = realigned(AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True))
    torch.testing.assert_close(
        causal_logits(loaded, PROMPTS[0]), causal_logits(causal("llama"), PROMPTS[0]), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["llama", "jamba", "mamba2"])
def test_seeds(name: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again, other = tiny_causal_lm(name, seed=0), tiny_causal_lm(name, seed=1)
    assert torch.equal(torch.rand(1), expected)
    first = causal_logits(causal(name), PROMPTS[0])
    assert torch.equal(causal_logits(again, PROMPTS[0]), first)
    assert not torch.allclose(causal_logits(other, PROMPTS[0]), first, atol=0.1)


def test_overrides() -> None:
    assert tiny_causal_lm("llama", num_hidden_layers=1).config.num_hidden_layers == 1


@pytest.mark.parametrize("name", ENCODER_TYPES)
def test_encoder(name: str, tmp_path: Path) -> None:
    model = tiny_encoder(name)
    ids = PROMPTS[0]
    hidden = outputs(model, ids)
    assert hidden.shape == (1, 12, 64)
    assert 0.3 < hidden.std() < 30
    for position in (0, 11):  # both directions, and beyond any local window
        changed = list(ids)
        changed[position] = PROMPTS[1][position]
        assert (outputs(model, changed) - hidden)[0, 11 - position].abs().max() > 0.05
    save_tiny(model, tmp_path)
    loaded = realigned(AutoModel.from_pretrained(tmp_path, local_files_only=True))
    assert torch.equal(outputs(loaded, ids), hidden)


@pytest.mark.parametrize("name", ENCODER_TYPES)
def test_encoder_ignores_padding(name: str) -> None:
    model = tiny_encoder(name)
    ids, pads = PROMPTS[0], [model.config.pad_token_id] * 4
    mask = torch.tensor([[1] * len(ids) + [0] * len(pads)])
    with torch.no_grad():
        padded = model(input_ids=torch.tensor([ids + pads]), attention_mask=mask)[0]
    torch.testing.assert_close(padded[:, : len(ids)], outputs(model, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CLASSIFIER_TYPES)
def test_classifier(name: str, tmp_path: Path) -> None:
    model = tiny_classifier(name)
    logits = torch.cat([outputs(model, prompt) for prompt in PROMPTS])
    assert logits.shape == (len(PROMPTS), NUM_LABELS)
    assert 0.1 < logits.std() < 30
    assert logits.std(0).min() > 0.05
    assert (outputs(model, [*PROMPTS[1][:1], *PROMPTS[0][1:]]) - logits[0]).abs().max() > 0.01
    save_tiny(model, tmp_path)
    loaded = realigned(AutoModelForSequenceClassification.from_pretrained(tmp_path, local_files_only=True))
    assert torch.equal(outputs(loaded, PROMPTS[0])[0], logits[0])


TEXTS = ["Hello, world!", "the cat sat on the mat\nand is singing", "  two  spaces; 3*(4-1)=9 ~ {x}"]


@pytest.mark.parametrize("vocab_size", [100, VOCAB_SIZE, 512])
def test_tokenizer(vocab_size: int, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, vocab_size), local_files_only=True)
    assert len(tokenizer) == vocab_size
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token_id == 3
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert len(SPECIAL_TOKENS) <= min(ids) <= max(ids) < vocab_size
        assert tokenizer.decode(ids) == text
    ids = tokenizer("né")["input_ids"]
    assert (3 in ids) == (vocab_size < 300)
    if vocab_size >= 300:
        assert len(ids) == 3
        assert tokenizer.decode(ids) == "né"
    assert tokenizer.decode([*ids, 2], skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)


def test_tokenizer_merges_words(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path), local_files_only=True)
    assert tokenizer.tokenize("on the") == ["on", "Ġthe"]


def test_tokenizer_is_deterministic(tmp_path: Path) -> None:
    first, second = tiny_tokenizer(tmp_path / "a"), tiny_tokenizer(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    with pytest.raises(ValueError, match="at least 100"):
        tiny_tokenizer(tmp_path, 99)


def test_tokenizer_special_order(tmp_path: Path) -> None:
    """RoBERTa-like models have their padding at id 1."""
    path = tiny_tokenizer(tmp_path, specials=("<s>", "<pad>", "</s>", "<unk>"))
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_tokenizer_next_to_a_checkpoint(name: str, tmp_path: Path) -> None:
    """The model type in config.json must not replace the tokenizer class."""
    causal(name).config.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path), local_files_only=True)
    assert len(tokenizer) == VOCAB_SIZE
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == AutoTokenizer.from_pretrained(tmp_path, use_fast=True)(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

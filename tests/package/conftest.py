"""Checkpoints and packages the tests of this directory read, built once and shared by all workers."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, tiny_causal_lm, tiny_classifier, tiny_encoder, tiny_tokenizer
from transformers import PreTrainedModel

from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM, QEFFAutoModelForSequenceClassification

torch.set_num_threads(1)

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
CTX_LEN = 48
PREFILL = 8


@dataclass(frozen=True)
class Built:
    """A Hugging Face model, its checkpoint with a tokenizer, and a package made of it. Nobody may change any."""

    hf: PreTrainedModel
    checkpoint: Path
    package: Path


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache home for read-only use; the store's own locks let every worker use the same one."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared-qeff-home"


def _checkpoint(hf: PreTrainedModel, path: Path) -> Path:
    save_tiny(hf, path)
    tiny_tokenizer(path)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def llama(shared_home, tmp_path_factory) -> Built:
    hf = tiny_causal_lm("llama")
    checkpoint = _checkpoint(hf, tmp_path_factory.mktemp("checkpoints") / "llama")
    model = QEFFAutoModelForCausalLM.from_pretrained(checkpoint, cache_home_dir=shared_home)
    return Built(hf, checkpoint, model.compile(ctx_len=CTX_LEN, prefill_seq_len=PREFILL))


@pytest.fixture(scope="session")
def unfused_llama(shared_home, tmp_path_factory) -> Built:
    """The same model with its graph as it was exported, whose prompts run side by side."""
    hf = tiny_causal_lm("llama")
    checkpoint = _checkpoint(hf, tmp_path_factory.mktemp("checkpoints") / "llama")
    model = QEFFAutoModelForCausalLM.from_pretrained(checkpoint, cache_home_dir=shared_home)
    return Built(hf, checkpoint, model.compile(ctx_len=CTX_LEN, prefill_seq_len=PREFILL, fuse=False))


@pytest.fixture(scope="session")
def bert(shared_home, tmp_path_factory) -> Built:
    hf = tiny_encoder("bert")
    checkpoint = _checkpoint(hf, tmp_path_factory.mktemp("checkpoints") / "bert")
    model = QEFFAutoModel.from_pretrained(checkpoint, pooling="mean", cache_home_dir=shared_home)
    return Built(hf, checkpoint, model.compile())


@pytest.fixture(scope="session")
def classifier(shared_home, tmp_path_factory) -> Built:
    hf = tiny_classifier("bert")
    checkpoint = _checkpoint(hf, tmp_path_factory.mktemp("checkpoints") / "classifier")
    model = QEFFAutoModelForSequenceClassification.from_pretrained(checkpoint, cache_home_dir=shared_home)
    return Built(hf, checkpoint, model.compile())


@pytest.fixture
def llama_copy(llama: Built, tmp_path: Path) -> Path:
    """A copy of the package that a test may break."""
    copy = tmp_path / "copy"
    shutil.copytree(llama.package, copy)
    return copy

"""Exports that the tests of this directory compile for the card, made once, and the stand-in's SDK."""

import os
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stand_in import install, runtime
from tiny_models import tiny_causal_lm, tiny_classifier, tiny_encoder

from QEfficient import (
    QEFFAutoModel,
    QEFFAutoModelForCausalLM,
    QEFFAutoModelForSequenceClassification,
    QEFFAutoPeftModelForCausalLM,
)
from QEfficient.targets.qaic_sdk import find_sdk

torch.set_num_threads(1)


class Models:
    """Tiny models by name, one object each, so that each is exported once."""

    def __init__(self, home) -> None:
        self.home, self._made = home, {}

    def __getitem__(self, name: str):
        if name not in self._made:
            torch.manual_seed(0)
            self._made[name] = getattr(self, f"_{name}")()
        return self._made[name]

    def _causal(self):
        return QEFFAutoModelForCausalLM(tiny_causal_lm("llama"), cache_home_dir=self.home)

    def _embedding(self):
        return QEFFAutoModel(tiny_encoder("bert"), pooling="mean", cache_home_dir=self.home)

    def _classification(self):
        return QEFFAutoModelForSequenceClassification(tiny_classifier("bert"), cache_home_dir=self.home)

    def _adapters(self):
        tuned = get_peft_model(tiny_causal_lm("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
        return QEFFAutoPeftModelForCausalLM(tuned, cache_home_dir=self.home)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("cloud-home"))


@pytest.fixture
def sdk(tmp_path, monkeypatch):
    """The stand-in as the first compiler on the PATH, where the vendor's own installation rule finds it."""
    place = install.install_qaic(tmp_path / "sdk")
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    found = find_sdk()
    if found is None or found.compiler.parent != place:
        pytest.skip("a Cloud AI SDK is installed here")
    return tmp_path / "sdk"


@pytest.fixture
def card(sdk, monkeypatch) -> runtime.Machine:
    """The stand-in's runtime beside its compiler, with four devices."""
    install.install_runtime(sdk)
    for name in ("qaicrt", "QAicApi_pb2"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    runtime.MACHINE.reset(devices=4)
    yield runtime.MACHINE
    for name in ("qaicrt", "QAicApi_pb2"):
        sys.modules.pop(name, None)

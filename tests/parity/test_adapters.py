"""LoRA adapters of a compiled package: swapped without compiling, each with the tokens of Hugging Face and PEFT."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import greedy_reference, sample_prompt, save_tiny, tiny_causal_lm, tiny_tokenizer
from transformers import PreTrainedModel

from QEfficient import QEFFAutoModelForCausalLM, QEFFAutoPeftModelForCausalLM, load
from QEfficient.errors import (
    InputError,
    ModelLoadError,
    OptionError,
    PackageError,
    QEfficientError,
    UnsupportedModelError,
)
from QEfficient.targets.manifest import Manifest

PROMPT = sample_prompt(12)
NEW = 8
SHAPE = {"ctx_len": 24, "prefill_seq_len": 8, "progress": False}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "gate_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gemma2": "all-linear",
    "phi3": ["qkv_proj", "down_proj"],
    "mistral": ["o_proj", "up_proj"],
}


#: Their layers are llama's.
LIKE_LLAMA = ("qwen2", "phi3", "mistral")


@dataclass(frozen=True)
class Base:
    hf: PreTrainedModel
    checkpoint: Path


def save_adapter(base: Base, directory: Path, seed: int, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A PEFT adapter with random A and B, both large enough to change the tokens."""
    model = get_peft_model(copy.deepcopy(base.hf), LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (noise * 0.6 / parameter.shape[1] ** 0.5).to(dtype)
    model.peft_config["default"].base_model_name_or_path = str(base.checkpoint)
    model.save_pretrained(directory)
    return directory


def reference(base: Base, adapter: Path | None, prompt: list[int] = PROMPT) -> list[int]:
    """Greedy tokens of Hugging Face, with a fresh PEFT model around the adapter."""
    model: Any = copy.deepcopy(base.hf)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return greedy_reference(model.eval(), prompt, NEW)[0]


def tokens(model: Any, prompt: list[int] = PROMPT, **arguments: Any) -> list[int]:
    ids = model.generate(input_ids=np.array([prompt]), max_new_tokens=NEW, **arguments)
    return ids[0, len(prompt) :].tolist()


def make_base(name: str, directory: Path) -> Base:
    hf = tiny_causal_lm(name)
    return Base(hf, save_tiny(hf, directory / name))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def llama(place: Path) -> Base:
    base = make_base("llama", place)
    tiny_tokenizer(base.checkpoint)
    return base


@pytest.fixture(scope="module")
def first(llama: Base, place: Path) -> Path:
    return save_adapter(llama, place / "first", 1, r=4, lora_alpha=8, target_modules=TARGETS["llama"])


@pytest.fixture(scope="module")
def second(llama: Base, place: Path) -> Path:
    return save_adapter(llama, place / "second", 2, r=2, lora_alpha=5, target_modules=TARGETS["llama"])


@pytest.fixture
def model(first: Path) -> QEFFAutoPeftModelForCausalLM:
    """The first adapter, compiled; found in the cache of the run after the first time."""
    model = QEFFAutoPeftModelForCausalLM.from_pretrained(first, adapter_name="first")
    model.compile(**SHAPE)
    return model


# ---------------------------------------------------------------------------------- swapping


@pytest.mark.parametrize(
    "family", [pytest.param(n, marks=pytest.mark.sweep) if n in LIKE_LLAMA else n for n in TARGETS]
)
def test_two_adapters_in_one_package(place: Path, family: str) -> None:
    """Different values, rank, alpha and rule of scaling; no compile between them."""
    base = make_base(family, place / "families")
    where = place / "families" / f"{family}-adapters"
    settings = {"target_modules": TARGETS[family]}
    a = save_adapter(base, where / "a", 3, r=4, lora_alpha=8, **settings)
    b = save_adapter(base, where / "b", 4, r=3, lora_alpha=5, use_rslora=True, **settings)
    expected = {name: reference(base, adapter) for name, adapter in (("a", a), ("b", b), (None, None))}
    assert len({tuple(ids) for ids in expected.values()}) == 3
    model = QEFFAutoPeftModelForCausalLM.from_pretrained(a, adapter_name="a")
    package = model.compile(**SHAPE)
    assert tokens(model) == expected["a"]
    model.load_adapter(b, "b")
    assert model.adapters == ["a", "b"]
    assert model.active_adapter == "a"
    for name in ("b", "a", None, "b", None, "a"):
        model.set_adapter(name)
        assert tokens(model) == expected[name], name
    assert tokens(model, adapter_name="b") == expected["b"]
    assert (model.active_adapter, tokens(model)) == ("a", expected["a"])
    assert model.qpc_path == package


def test_disabled_is_the_base_model(model: QEFFAutoPeftModelForCausalLM, llama: Base, first: Path) -> None:
    base, adapted = reference(llama, None), reference(llama, first)
    with model.disable_adapter():
        assert model.active_adapter is None
        assert tokens(model) == base
        assert tokens(model, adapter_name="first") == adapted
        assert tokens(model) == base
    assert tokens(model) == adapted
    model.disable_adapter()  # as a statement it lasts
    assert tokens(model) == base
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert model.active_adapter is None


@pytest.mark.parametrize(
    "config",
    [
        {"r": 1, "lora_alpha": 3},
        {"r": 4, "lora_alpha": 16, "use_rslora": True},
        {"r": 2, "rank_pattern": {"down_proj": 4}, "alpha_pattern": {"layers.1.self_attn.q_proj": 20}},
        {"r": 2, "rank_pattern": {r"layers\.0\..*": 3}, "alpha_pattern": {"^model.layers.0.+v_proj": 9}},
        {"r": 4, "target_modules": ["q_proj"]},
        {"r": 4, "layers_to_transform": [1]},
        {"r": 4, "dtype": torch.bfloat16},
        {"r": 4, "dtype": torch.float16},
    ],
    ids=lambda config: "-".join(f"{k}={v}" for k, v in config.items() if k != "r")[:40],
)
def test_adapters_of_other_shapes(
    model: QEFFAutoPeftModelForCausalLM, llama: Base, tmp_path: Path, config: dict[str, Any]
) -> None:
    """Smaller rank, patterns, fewer modules and narrow floats, in the package of a plain adapter of rank 4."""
    adapter = save_adapter(llama, tmp_path / "adapter", 7, **({"target_modules": TARGETS["llama"]} | config))
    expected = reference(llama, adapter)
    assert expected != reference(llama, None)
    model.load_adapter(adapter, "other")
    assert tokens(model, adapter_name="other") == expected


def test_replace_and_unload(model: QEFFAutoPeftModelForCausalLM, llama: Base, first: Path, second: Path) -> None:
    tokens(model)
    model.load_adapter(second, "first")  # the active one: the next call uses the new values
    assert tokens(model) == reference(llama, second)
    model.unload_adapter("first")
    assert (model.adapters, model.active_adapter) == ([], None)
    assert tokens(model) == reference(llama, None)
    model.load_adapter(first, "back")
    assert tokens(model, adapter_name="back") == reference(llama, first)


def test_continuous_batching_and_ragged_rows(llama: Base, first: Path, second: Path) -> None:
    model = QEFFAutoPeftModelForCausalLM.from_pretrained(first, continuous_batching=True)
    model.compile(full_batch_size=2, **SHAPE)
    model.load_adapter(second, "second")
    prompts = [sample_prompt(n, n) for n in (5, 11, 8)]
    ids, mask = np.zeros((3, 11), np.int64), np.zeros((3, 11), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 11 - len(prompt) :], mask[row, 11 - len(prompt) :] = prompt, 1
    for name, adapter in (("default", first), ("second", second)):
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, adapter_name=name)
        assert out[:, 11:].tolist() == [reference(llama, adapter, prompt) for prompt in prompts]


def test_a_model_in_memory(llama: Base, first: Path, second: Path) -> None:
    """All adapters of a `PeftModel` come along, the active one active; the model itself is left alone."""
    peft_model = PeftModel.from_pretrained(copy.deepcopy(llama.hf), str(first), adapter_name="one")
    peft_model.load_adapter(str(second), "two")
    peft_model.set_adapter("two")
    before = {name: parameter.clone() for name, parameter in peft_model.named_parameters()}
    model = QEFFAutoPeftModelForCausalLM(peft_model)
    assert (model.adapters, model.active_adapter) == (["one", "two"], "two")
    model.compile(**SHAPE)
    assert tokens(model) == reference(llama, second)
    assert tokens(model, adapter_name="one") == reference(llama, first)
    after = dict(peft_model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert peft_model.active_adapters == ["two"]
    peft_model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="unmerge_adapter"):
        QEFFAutoPeftModelForCausalLM(peft_model)


def test_validate_compares_with_peft(model: QEFFAutoPeftModelForCausalLM, second: Path) -> None:
    model.load_adapter(second, "second")
    for name in ("first", "second", None):
        model.set_adapter(name)
        report = model.validate({"input_ids": np.array([PROMPT])}, tokens=4)
        assert report.ok, str(report)


# ---------------------------------------------------------------------------------- what is compiled


def test_adapters_share_the_export_and_every_byte_of_the_program(
    llama: Base, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    same = save_adapter(llama, tmp_path / "same", 9, r=4, lora_alpha=1, target_modules=TARGETS["llama"])
    one = QEFFAutoPeftModelForCausalLM.from_pretrained(first, cache_home_dir=home).compile(**SHAPE)
    # The second model must find the graph: tracing is not there any more.
    monkeypatch.delattr("QEfficient.exporter.program.export_causal")
    two = QEFFAutoPeftModelForCausalLM.from_pretrained(same, cache_home_dir=home).compile(**SHAPE)
    assert one != two
    assert len(list((home / "exports").iterdir())) == 1
    names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    shared = {name for name in names if (one / name).samefile(two / name)}
    assert {name.parts[0] for name in names - shared} == {"adapters", "manifest.json", "entry.json"}
    again = QEFFAutoPeftModelForCausalLM.from_pretrained(first, cache_home_dir=home).compile(**SHAPE)
    assert again == one


def test_max_rank_and_target_modules(llama: Base, first: Path, tmp_path: Path) -> None:
    wide = save_adapter(llama, tmp_path / "wide", 5, r=6, target_modules=[*TARGETS["llama"], "k_proj"])
    model = QEFFAutoPeftModelForCausalLM.from_pretrained(first)
    package = model.compile(max_rank=6, target_modules=["k_proj"], **SHAPE)
    shapes = {p.name: p.shape for p in Manifest.load(package).parameters}
    assert shapes["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"] == (6, 64)
    assert shapes["lora_scaling"] == (8,)
    model.load_adapter(wide, "wide")
    assert tokens(model, adapter_name="wide") == reference(llama, wide)
    assert tokens(model) == reference(llama, first)
    with pytest.raises(OptionError, match="max_rank=2 is less than the rank 6 of the adapter 'wide'"):
        model.compile(max_rank=2, **SHAPE)


def test_a_base_model_compiled_for_adapters_to_come(llama: Base, second: Path) -> None:
    model = QEFFAutoPeftModelForCausalLM.from_pretrained(llama.checkpoint, max_rank=2, target_modules="all-linear")
    model.compile(**SHAPE)
    assert (model.adapters, model.active_adapter) == ([], None)
    assert tokens(model) == reference(llama, None)
    model.load_adapter(second, "second")
    assert tokens(model, adapter_name="second") == reference(llama, second)
    bare = QEFFAutoPeftModelForCausalLM.from_pretrained(llama.checkpoint)
    with pytest.raises(OptionError, match="max_rank and target_modules"):
        bare.compile(**SHAPE)


# ---------------------------------------------------------------------------------- packages

TORCH_FREE = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft", "safetensors"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Refuse())
import numpy as np
import QEfficient

package_dir, second, prompt, new = json.loads(sys.argv[1])
with QEfficient.load(package_dir) as package:
    def tokens(**arguments):
        return package.generate(input_ids=np.array([prompt]), max_new_tokens=new, **arguments)[0, len(prompt):].tolist()
    answers = [package.adapters, package.active_adapter, tokens()]
    package.load_adapter(second, "second")
    answers += [tokens(adapter_name="second"), tokens()]
    package.set_adapter("second")
    answers.append(tokens())
    with package.disable_adapter():
        answers.append(tokens())
    package.unload_adapter("second")
    answers += [tokens(), package.adapters]
print(json.dumps(answers))
"""


def test_a_package_runs_and_swaps_without_torch(
    model: QEFFAutoPeftModelForCausalLM, llama: Base, first: Path, second: Path, tmp_path: Path
) -> None:
    package = model.save_pretrained(tmp_path / "package")
    request = json.dumps([str(package), str(second), PROMPT, NEW])
    done = subprocess.run(
        [sys.executable, "-c", TORCH_FREE, request], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    a, b, base = reference(llama, first), reference(llama, second), reference(llama, None)
    assert json.loads(done.stdout) == [["first"], "first", a, b, a, b, base, base, ["first"]]


def test_a_saved_package_has_the_adapters_of_now(
    model: QEFFAutoPeftModelForCausalLM, llama: Base, second: Path, tmp_path: Path
) -> None:
    model.load_adapter(second, "second")
    model.set_adapter("second")
    with load(model.save_pretrained(tmp_path / "two")) as package:
        assert (package.adapters, package.active_adapter) == (["first", "second"], "second")
        assert tokens(package) == reference(llama, second)
    model.unload_adapter("first")
    model.set_adapter(None)
    with load(model.save_pretrained(tmp_path / "one")) as package:
        assert (package.adapters, package.active_adapter) == (["second"], None)
        assert tokens(package) == reference(llama, None)


def test_a_changed_adapter_in_a_package_is_refused(model: QEFFAutoPeftModelForCausalLM, tmp_path: Path) -> None:
    package = model.save_pretrained(tmp_path / "package")
    file = package / "adapters" / "first" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(PackageError, match="was changed after it was compiled"):
        load(package)
    file.unlink()
    with pytest.raises(PackageError, match="is missing"):
        load(package)


def test_a_package_without_adapters_says_so(llama: Base, first: Path, tmp_path: Path) -> None:
    model = QEFFAutoModelForCausalLM.from_pretrained(llama.checkpoint)
    with load(model.compile(**SHAPE)) as package:
        assert (package.adapters, package.active_adapter) == ([], None)
        with pytest.raises(OptionError, match="compiled without adapters"):
            package.load_adapter(first, "first")
        with pytest.raises(OptionError, match="no adapter 'first'"):
            package.generate(input_ids=np.array([PROMPT]), max_new_tokens=1, adapter_name="first")


# ---------------------------------------------------------------------------------- bad input


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, directory / "adapter_model.safetensors")

    return edit


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def _pickle_only(directory: Path) -> None:
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()


def _truncate(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _other_module(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("lora_A", "lora_B"):
        tensors[f"{Q[:-6]}qq_proj.{part}.weight"] = tensors.pop(f"{Q}.{part}.weight")


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_B.weight"][0, 0] = float("nan")


BAD = {
    "pickled": (_pickle_only, ModelLoadError, r"only pickled tensors \(adapter_model\.bin\)"),
    "no tensors": (lambda d: (d / "adapter_model.safetensors").unlink(), ModelLoadError, "has no adapter_model"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), ModelLoadError, "has no adapter_config.json"),
    "config is not JSON": (lambda d: (d / "adapter_config.json").write_text("{"), ModelLoadError, "not a JSON object"),
    "cut off": (_truncate, ModelLoadError, "cut off"),
    "not safetensors": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 99), ModelLoadError, "not"),
    "missing half": (edit_tensors(lambda t: t.pop(f"{Q}.lora_A.weight")), ModelLoadError, "only lora_B"),
    "rank contradicts": (edit_config(r=3), ModelLoadError, "contradicts itself"),
    "alpha is text": (edit_config(lora_alpha="8"), ModelLoadError, "must be a positive number"),
    "not a number": (edit_tensors(_nan), ModelLoadError, "not finite"),
    "integers": (
        edit_tensors(lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].to(torch.int8)})),
        ModelLoadError,
        "as I8",
    ),
    "unknown target": (edit_tensors(_other_module), InputError, "qq_proj.*Did you mean 'model.layers.0.self_attn.q_pr"),
    "embedding": (
        edit_tensors(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 9)})),
        UnsupportedModelError,
        "adapter of an embedding",
    ),
    "DoRA": (edit_config(use_dora=True), UnsupportedModelError, "uses DoRA"),
    "modules_to_save": (edit_config(modules_to_save=["lm_head"]), UnsupportedModelError, "uses modules_to_save"),
    "bias": (edit_config(bias="all"), UnsupportedModelError, "biases"),
    "PiSSA": (edit_config(init_lora_weights="pissa"), UnsupportedModelError, "pissa"),
    "prompt tuning": (edit_config(peft_type="PROMPT_TUNING"), UnsupportedModelError, "'PROMPT_TUNING'"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_unusable_adapter_is_named_and_changes_nothing(
    model: QEFFAutoPeftModelForCausalLM, first: Path, tmp_path: Path, case: str
) -> None:
    spoil, error, hint = BAD[case]
    directory = tmp_path / "bad"
    shutil.copytree(first, directory)
    spoil(directory)
    before = tokens(model)
    with pytest.raises(error, match=hint) as caught:
        model.load_adapter(directory, "bad")
    assert "\n" not in str(caught.value)
    with load(model.qpc_path) as package, pytest.raises(error, match=hint):
        package.load_adapter(directory, "bad")
    assert model.adapters == ["first"]
    assert tokens(model) == before


def test_rank_and_base_that_do_not_fit(model: QEFFAutoPeftModelForCausalLM, llama: Base, tmp_path: Path) -> None:
    large = save_adapter(llama, tmp_path / "large", 1, r=5, target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"rank 5, more than the 4 .* compile with max_rank=5"):
        model.load_adapter(large, "large")
    hf = tiny_causal_lm("llama", hidden_size=32)
    other = save_adapter(Base(hf, llama.checkpoint), tmp_path / "other", 1, r=4, target_modules=["q_proj"])
    with pytest.raises(InputError, match="fits another base model"):
        model.load_adapter(other, "other")
    # The same before anything is traced: the adapter's configuration names the wrong base.
    wrong = QEFFAutoPeftModelForCausalLM.from_pretrained(other, cache_home_dir=tmp_path / "home")
    with pytest.raises(InputError, match="fits another base model"):
        wrong.compile(**SHAPE)
    assert wrong.qpc_path is None
    assert not list((tmp_path / "home" / "exports").glob("*"))
    gpt2 = Base(tiny_causal_lm("gpt2"), llama.checkpoint)
    foreign = save_adapter(gpt2, tmp_path / "gpt2", 1, r=4, target_modules=["c_attn"])
    with pytest.raises(UnsupportedModelError, match=r"no module 'transformer\.h\.0\.attn\.c_attn' to adapt"):
        QEFFAutoPeftModelForCausalLM.from_pretrained(foreign, cache_home_dir=tmp_path / "home").compile(**SHAPE)


def test_names_and_options(model: QEFFAutoPeftModelForCausalLM, first: Path, second: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no adapter 'frist'.*Did you mean 'first'"):
        model.set_adapter("frist")
    with pytest.raises(OptionError, match=r"no adapter 'frist'.*Did you mean 'first'"):
        tokens(model, adapter_name="frist")
    with pytest.raises(OptionError, match="no adapter 'second': loaded are"):
        model.unload_adapter("second")
    for name in ("", "../up", ".hidden", "a/b", 3, "x" * 101):
        with pytest.raises(OptionError, match="name must be"):
            model.load_adapter(second, name)
    with pytest.raises(ModelLoadError, match="does not exist"):
        model.load_adapter(tmp_path / "nothing", "nothing")
    with pytest.raises(OptionError, match="Did you mean 'max_rank'"):
        QEFFAutoPeftModelForCausalLM.from_pretrained(first, max_rnk=4)
    for rank in (0, -1, True, 2.0):
        with pytest.raises(OptionError, match="max_rank must be"):
            QEFFAutoPeftModelForCausalLM.from_pretrained(first, max_rank=rank)
    with pytest.raises(UnsupportedModelError, match=r"no module 'q_porj'.*Did you mean 'q_proj'"):
        model.compile(target_modules=["q_porj"], **SHAPE)
    with pytest.raises(UnsupportedModelError, match="'self_attn' of LlamaForCausalLM is not a linear layer"):
        model.compile(target_modules=["self_attn"], **SHAPE)
    assert model.target_modules == ()  # a refused option is not remembered


def test_where_the_base_model_is(llama: Base, first: Path, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    shutil.copytree(first, lost)
    edit_config(base_model_name_or_path=str(tmp_path / "gone"))(lost)
    with pytest.raises(ModelLoadError, match="pass base_model="):
        QEFFAutoPeftModelForCausalLM.from_pretrained(lost)
    edit_config(base_model_name_or_path=None)(lost)
    with pytest.raises(ModelLoadError, match="does not name its base model: pass base_model="):
        QEFFAutoPeftModelForCausalLM.from_pretrained(lost)
    model = QEFFAutoPeftModelForCausalLM.from_pretrained(lost, base_model=llama.checkpoint)
    assert model.adapters == ["default"]
    with pytest.raises(ModelLoadError, match=r"has no adapter_config\.json"):
        QEFFAutoPeftModelForCausalLM.from_pretrained(llama.checkpoint, base_model=llama.checkpoint)


def test_other_kinds_of_adapters_in_memory(llama: Base) -> None:
    prompt_tuned = get_peft_model(
        copy.deepcopy(llama.hf), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    headed = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    embedded = LoraConfig(r=2, target_modules=["embed_tokens"])
    cases = [(prompt_tuned, "'PROMPT_TUNING'")]
    cases += [
        (get_peft_model(copy.deepcopy(llama.hf), config), hint)
        for config, hint in ((headed, "modules_to_save"), (dora, "DoRA"), (embedded, "embedding"))
    ]
    for peft_model, hint in cases:
        with pytest.raises(QEfficientError, match=hint):
            QEFFAutoPeftModelForCausalLM(peft_model)

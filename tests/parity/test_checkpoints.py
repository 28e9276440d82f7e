"""From a checkpoint on disk: every dtype and layout gives Hugging Face's tokens, and no weight is copied."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import (
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
    PreTrainedModel,
)

from QEfficient import (
    QEFFAutoModel,
    QEFFAutoModelForCausalLM,
    QEFFAutoModelForSequenceClassification,
    load,
)
from QEfficient.errors import ExportError, ModelLoadError, UnsupportedModelError

PROMPT = sample_prompt(11)
NEW = 8
OPTIONS = {"ctx_len": 32, "prefill_seq_len": 8}


def hf(directory: Path, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    return auto.from_pretrained(directory, dtype=torch.float32).eval()


def tokens_of(model: QEFFAutoModelForCausalLM, count: int = NEW) -> list[int]:
    return model.generate(input_ids=np.array([PROMPT]), max_new_tokens=count)[0, len(PROMPT) :].tolist()


def compiled(directory: Path, **more: Any) -> QEFFAutoModelForCausalLM:
    model = QEFFAutoModelForCausalLM.from_pretrained(directory, **more)
    model.compile(**OPTIONS)
    return model


def external(path: Path) -> dict[str, tuple[str, int, int, list[int]]]:
    """Initializer -> (file, offset, length, shape) for everything outside an ONNX file."""
    out = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            out[tensor.name] = (where["location"], int(where["offset"]), int(where["length"]), list(tensor.dims))
    return out


def in_files(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read by the safetensors library."""
    out = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return out


def places(directory: Path) -> dict[str, tuple[str, int, int]]:
    """Tensor -> (file, offset, length), from the headers as the safetensors format defines them."""
    out = {}
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            out[name] = (path.name, 8 + size + begin, end - begin)
    return out


# ---------------------------------------------------------------------------------- dtypes and layouts

PLAIN = {
    "fp32": ("llama", {}),
    "bf16 in shards": ("llama", {"dtype": torch.bfloat16, "max_shard_size": "50KB"}),
    "fp16": ("llama", {"dtype": torch.float16}),
    "tied llama": ("llama_tied", {}),
    "tied gemma2": ("gemma2", {}),
    "tied gpt2 in shards": ("gpt2", {"max_shard_size": "100KB"}),
    "mamba2 bf16": ("mamba2", {"dtype": torch.bfloat16}),
}
EXPERTS = {
    "mixtral bf16 in shards": ("mixtral", {"dtype": torch.bfloat16, "max_shard_size": "100KB"}),
    "qwen3_moe": ("qwen3_moe", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "jamba": ("jamba", {}),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of its own: in the shared one an equal checkpoint of another test may be there already, and linked."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module", params=PLAIN)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, how = PLAIN[request.param]
    return save_tiny(tiny_causal_lm(name), tmp_path_factory.mktemp("plain") / name, **how)


@pytest.fixture(scope="module", params=EXPERTS)
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, how = EXPERTS[request.param]
    return save_tiny(tiny_causal_lm(name), tmp_path_factory.mktemp("experts") / name, **how)


def test_plain_checkpoint_equals_hugging_face(plain: Path, home: Path) -> None:
    assert tokens_of(compiled(plain, cache_home_dir=home)) == greedy_reference(hf(plain), PROMPT, NEW)[0]


def test_weights_are_referenced_where_they_are(plain: Path, home: Path) -> None:
    """D44, D46, D54: hard links to the checkpoint's own files, its own dtypes, its own names, a small graph."""
    model = compiled(plain, cache_home_dir=home)
    path = model.onnx_path
    owners = {place: name for name, place in places(plain).items()}
    tensors, found = in_files(plain), external(path)
    assert len(owners) == len(tensors)
    used = []
    for name, (location, offset, length, shape) in found.items():
        assert os.path.samefile(path.parent / location, plain / location), "a hard link, not a copy"
        used.append(owners[location, offset, length])
        assert shape == list(tensors[used[-1]].shape)
        # Tied tensors have one name on disk and another one at the module that uses them first.
        assert name == used[-1] or name in ("lm_head.weight",)
    assert sorted(used) == sorted(tensors), "each of them, once"
    graph = onnx.load(path, load_external_data=False).graph
    assert sum(t.ByteSize() for t in graph.initializer if t.name not in found) < 4_000
    assert path.stat().st_size < 1_000 * len(graph.node)
    assert str(Path(torch.__file__).parent.parent).encode() not in path.read_bytes(), "no paths of this machine"
    # The package: the same inodes again.
    files = {p.name: p for p in (model.qpc_path / "weights").iterdir() if not p.name.startswith("rotary.")}
    for name, file in files.items():
        assert os.path.samefile(file, plain / name)
    assert set(files) == {p.name for p in plain.glob("*.safetensors")}


def test_names_are_the_modules_own(tmp_path: Path) -> None:
    found = external(compiled(save_tiny(tiny_causal_lm("llama"), tmp_path / "llama")).onnx_path)
    assert "model.layers.0.self_attn.q_proj.weight" in found
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(found)
    tied = external(compiled(save_tiny(tiny_causal_lm("gpt2"), tmp_path / "gpt2")).onnx_path)
    assert "transformer.h.0.attn.c_attn.weight" in tied
    assert not {"lm_head.weight", "transformer.wte.weight"} <= set(tied), "one matrix, one tensor"


def test_experts_equal_hugging_face(experts: Path, home: Path) -> None:
    """One tensor per expert on disk, which transformers stacks while loading."""
    names = in_files(experts).keys()
    assert any(".experts.0." in name for name in names), "the checkpoint must need the conversion"
    model = compiled(experts, cache_home_dir=home)
    assert tokens_of(model) == greedy_reference(hf(experts), PROMPT, NEW)[0]
    found = external(model.onnx_path)
    linked = {location for location, *_ in found.values() if (experts / location).exists()}
    assert linked == {p.name for p in experts.glob("*.safetensors") if _has_plain(p)}
    for location in linked:
        assert os.path.samefile(model.onnx_path.parent / location, experts / location)
    converted = {location for location, *_ in found.values()} - linked
    assert len(converted) == 1, "what had to be converted is in one file of its own"
    own = sum(length for location, _, length, _ in found.values() if location in converted)
    per_expert = sum(t.numel() * t.element_size() for n, t in in_files(experts).items() if ".experts." in n)
    assert own == per_expert, "and nothing else is"


def _has_plain(path: Path) -> bool:
    """Whether a shard holds a tensor that needs no conversion."""
    with safe_open(path, framework="pt") as file:
        return any(".experts." not in name for name in file.keys())  # noqa: SIM118 - no mapping


# ---------------------------------------------------------------------------------- names of base and head classes


def test_base_model_out_of_a_classifier(tmp_path: Path) -> None:
    """`bert.encoder...` on disk, `encoder...` in the module."""
    directory = save_tiny(tiny_classifier("bert"), tmp_path / "classifier")
    assert all(name.startswith(("bert.", "classifier.")) for name in in_files(directory))
    reference = hf(directory, AutoModel)
    out = QEFFAutoModel.from_pretrained(directory).generate(input_ids=np.array([PROMPT]))["output"][0]
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([PROMPT])).last_hidden_state[0].numpy()
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_base_model_out_of_a_language_model(tmp_path: Path) -> None:
    directory = save_tiny(tiny_causal_lm("llama"), tmp_path / "llama")
    model = QEFFAutoModel.from_pretrained(directory, pooling="last")
    out = model.generate(input_ids=np.array([PROMPT]))["output"][0]
    with torch.no_grad():
        expected = hf(directory, AutoModel)(input_ids=torch.tensor([PROMPT])).last_hidden_state[0, -1].numpy()
    np.testing.assert_allclose(out, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_head_class_on_names_of_the_base_class(name: str, tmp_path: Path) -> None:
    """As on the hub: GPT-2's and BLOOM's files say `h.0...`, without `transformer.`, and have no head."""
    reference = tiny_causal_lm(name)
    directory = save_tiny(reference, tmp_path / name)
    tensors = {n.removeprefix("transformer."): t for n, t in in_files(directory).items() if n != "lm_head.weight"}
    assert any(n.startswith("h.0.") for n in tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model = compiled(directory)
    assert tokens_of(model) == greedy_reference(reference, PROMPT, NEW)[0]
    assert all(n.startswith("transformer.") or n == "lm_head.weight" for n in external(model.onnx_path))


def test_classifier_out_of_a_base_model_is_refused(tmp_path: Path) -> None:
    """A head that nobody trained must not be made up."""
    directory = save_tiny(tiny_encoder("bert"), tmp_path / "bert")
    with pytest.raises(UnsupportedModelError, match="no classification head"):
        QEFFAutoModelForSequenceClassification.from_pretrained(directory)
    with pytest.raises(UnsupportedModelError):
        QEFFAutoModelForCausalLM.from_pretrained(directory)


def test_classifier_of_a_checkpoint(tmp_path: Path) -> None:
    directory = save_tiny(tiny_classifier("deberta-v2"), tmp_path / "deberta", dtype=torch.bfloat16)
    reference = hf(directory, AutoModelForSequenceClassification)
    model = QEFFAutoModelForSequenceClassification.from_pretrained(directory)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([PROMPT])).logits.numpy()
    np.testing.assert_allclose(model.generate(input_ids=np.array([PROMPT]))["logits"], expected, atol=1e-5)


def test_a_missing_weight_is_an_error(tmp_path: Path) -> None:
    """transformers would draw it at random and go on."""
    directory = save_tiny(tiny_causal_lm("llama"), tmp_path / "llama")
    tensors = in_files(directory)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        compiled(directory)


def test_a_weight_of_another_shape_is_an_error(tmp_path: Path) -> None:
    directory = save_tiny(tiny_causal_lm("llama"), tmp_path / "llama")
    tensors = in_files(directory)
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ExportError, ModelLoadError), match=r"model\.norm\.weight"):
        compiled(directory)


# ---------------------------------------------------------------------------------- identity


def test_other_weights_at_the_same_path(tmp_path: Path) -> None:
    """D1: same configuration, same sizes, same path, another answer; and the first one's again when it is back."""
    home, directory = tmp_path / "home", tmp_path / "model"
    answers, packages = [], []
    for seed in (0, 1, 0):
        save_tiny(tiny_causal_lm("llama", seed), directory)
        model = compiled(directory, cache_home_dir=home)
        answers.append(tokens_of(model))
        packages.append(model.qpc_path)
        assert answers[-1] == greedy_reference(tiny_causal_lm("llama", seed), PROMPT, NEW)[0]
    assert answers[0] == answers[2] != answers[1]
    assert packages[0] == packages[2] != packages[1]


def test_one_object_sees_that_its_files_changed(tmp_path: Path) -> None:
    directory = save_tiny(tiny_causal_lm("llama", 0), tmp_path / "model")
    model = compiled(directory)
    first = tokens_of(model)
    save_tiny(tiny_causal_lm("llama", 1), directory)
    model.compile(**OPTIONS)
    assert tokens_of(model) == greedy_reference(tiny_causal_lm("llama", 1), PROMPT, NEW)[0] != first


def test_a_copied_package_outlives_its_checkpoint(tmp_path: Path) -> None:
    """`compile_dir` and `save_pretrained` give files of their own: writing into the checkpoint cannot reach them."""
    reference = tiny_causal_lm("llama")
    directory = save_tiny(reference, tmp_path / "model")
    model = QEFFAutoModelForCausalLM.from_pretrained(directory, cache_home_dir=tmp_path / "home")
    model.compile(compile_dir=tmp_path / "package", **OPTIONS)
    weights = directory / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b"\x00" * 4096)
    shutil.rmtree(directory)
    with load(tmp_path / "package") as package:
        out = package.generate(input_ids=np.array([PROMPT]), max_new_tokens=NEW)
    assert out[0, len(PROMPT) :].tolist() == greedy_reference(reference, PROMPT, NEW)[0]


def test_a_moved_checkpoint_keeps_its_key(tmp_path: Path) -> None:
    """D5: nothing is compiled twice because a directory got another name."""
    home = tmp_path / "home"
    directory = save_tiny(tiny_causal_lm("llama"), tmp_path / "here")
    tiny_tokenizer(directory)
    first = compiled(directory, cache_home_dir=home)
    moved = directory.rename(tmp_path / "there")
    second = compiled(moved, cache_home_dir=home)
    assert (second.onnx_path, second.qpc_path) == (first.onnx_path, first.qpc_path)
    # Who wrote the configuration does not matter either; what it says does.
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0.0", "_name_or_path": "x"}))
    assert compiled(moved, cache_home_dir=home).qpc_path == first.qpc_path
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert compiled(moved, cache_home_dir=home).qpc_path != first.qpc_path


def test_a_moved_cache_keeps_its_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_tiny(tiny_causal_lm("llama"), tmp_path / "model")
    first = compiled(directory, cache_home_dir=tmp_path / "home")
    answer = tokens_of(first)
    (tmp_path / "home").rename(tmp_path / "elsewhere")
    second = QEFFAutoModelForCausalLM.from_pretrained(directory, cache_home_dir=tmp_path / "elsewhere")
    monkeypatch.setattr(second, "_write_graph", lambda *args: pytest.fail("exported again"))
    second.compile(**OPTIONS)
    assert second.qpc_path.name == first.qpc_path.name
    assert tokens_of(second) == answer


@pytest.mark.parametrize("change", ["tokenizer", "generation_config"])
def test_side_files_are_in_the_key(tmp_path: Path, change: str) -> None:
    """They are part of the package."""
    directory = save_tiny(tiny_causal_lm("llama"), tmp_path / "model")
    tiny_tokenizer(directory)
    first = compiled(directory)
    if change == "tokenizer":
        tiny_tokenizer(directory, specials=("<pad>", "<bos>", "</s>", "<unk>"))
    else:
        (directory / "generation_config.json").write_text('{"eos_token_id": 5}')
    second = compiled(directory)
    assert second.qpc_path != first.qpc_path
    name = "tokenizer.json" if change == "tokenizer" else "generation_config.json"
    assert json.loads((second.qpc_path / name).read_text()) == json.loads((directory / name).read_text())


def test_memory_and_disk_give_the_same_tokens(tmp_path: Path) -> None:
    """A model in memory is exported as it is now: changed weights are another key and another answer."""
    reference = tiny_causal_lm("llama")
    model = QEFFAutoModelForCausalLM(reference)
    model.compile(**OPTIONS)
    first = model.qpc_path
    assert tokens_of(model) == tokens_of(compiled(save_tiny(reference, tmp_path / "model")))
    changed = copy.deepcopy(reference)
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight.mul_(-1)
    other = QEFFAutoModelForCausalLM(changed)
    other.compile(**OPTIONS)
    assert other.qpc_path != first
    assert tokens_of(other) == greedy_reference(changed, PROMPT, NEW)[0]


WARM = """
import json, sys, time
start = time.perf_counter()
import numpy as np
from QEfficient import QEFFAutoModelForCausalLM
model = QEFFAutoModelForCausalLM.from_pretrained(sys.argv[1], cache_home_dir=sys.argv[2])
package = model.compile(ctx_len=32, prefill_seq_len=8)
heavy = [n for n in ("torch", "transformers", "onnxscript", "accelerate") if n in sys.modules]
out = model.generate(input_ids=np.array([json.loads(sys.argv[3])]), max_new_tokens=8)
after = [n for n in ("torch", "transformers", "onnxscript", "accelerate") if n in sys.modules]
print(json.dumps([str(package), heavy, after, out[0].tolist()]))
"""


def test_warm_start_needs_no_torch(tmp_path: Path) -> None:
    """D7: when the package is there, neither the checkpoint nor torch is loaded to find it and to run it."""
    directory = save_tiny(tiny_causal_lm("llama"), tmp_path / "model")
    tiny_tokenizer(directory)
    model = compiled(directory, cache_home_dir=tmp_path / "home")
    command = [sys.executable, "-c", WARM, str(directory), str(tmp_path / "home"), json.dumps(PROMPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    package, heavy, after, ids = json.loads(done.stdout.splitlines()[-1])
    assert package == str(model.qpc_path)
    assert heavy == []
    assert after == []
    assert ids[len(PROMPT) :] == tokens_of(model)

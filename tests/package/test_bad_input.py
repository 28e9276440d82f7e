"""Every mistake a user can make ends in one sentence of a documented type, early, and leaves nothing behind."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import sample_prompt, save_tiny, tiny_config
from transformers import AutoModelForMaskedLM, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import QEfficient
from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM, QEFFAutoModelForSequenceClassification
from QEfficient.errors import (
    ArtifactWriteError,
    ContextLengthError,
    ExportError,
    InputError,
    ModelLoadError,
    OptionError,
    QEfficientError,
    UnsupportedModelError,
)
from QEfficient.models.source import CheckpointSource, MemorySource

Causal, Encoder, Classifier = QEFFAutoModelForCausalLM, QEFFAutoModel, QEFFAutoModelForSequenceClassification


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache home of this test's own, named by the environment as users do."""
    home = tmp_path / "qeff-home"
    monkeypatch.setenv("QEFF_HOME", str(home))
    return home


@pytest.fixture
def no_work(monkeypatch):
    """Fails when weights are hashed or a model is built: what must be refused has to be refused before."""

    def expensive(*args):
        pytest.fail("expensive work began before the mistake was found")

    for source in (CheckpointSource, MemorySource):
        for step in ("identity", "ghost", "weights", "load"):
            monkeypatch.setattr(source, step, expensive)


def nothing_left(home: Path) -> bool:
    """No entry, finished or not, lies under the home: locks and remembered digests may."""
    return not [p for p in home.rglob("*") if p.is_file() and p.relative_to(home).parts[0] not in ("locks", "digests")]


def refused(use, expected: type[QEfficientError], *words: str) -> str:
    with pytest.raises(QEfficientError) as caught:
        use()
    assert type(caught.value) is expected
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?", ")"))
    for word in words:
        assert word in message, message
    return message


# ---------------------------------------------------------------------------------------- where the model is


def edited(llama, tmp_path, remove=(), **config) -> Path:
    """A copy of the Llama checkpoint with other entries in config.json."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(llama.checkpoint, copy)
    body = json.loads((copy / "config.json").read_text())
    body = {key: value for key, value in (body | config).items() if key not in remove}
    (copy / "config.json").write_text(json.dumps(body))
    return copy


@pytest.mark.parametrize("cls", [Causal, Encoder, Classifier])
def test_directories_that_are_no_checkpoint(cls, tmp_path, home, no_work):
    refused(lambda: cls.from_pretrained(tmp_path / "not there"), ModelLoadError, "not there", "existing directory")
    refused(lambda: cls.from_pretrained("./nowhere/at/all"), ModelLoadError, "./nowhere/at/all", "existing directory")
    (tmp_path / "empty").mkdir()
    refused(lambda: cls.from_pretrained(tmp_path / "empty"), ModelLoadError, "empty", "expected config.json")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"")
    refused(lambda: cls.from_pretrained(tmp_path / "empty"), ModelLoadError, "no config.json")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "empty" / "model.safetensors").unlink()
    refused(lambda: cls.from_pretrained(tmp_path / "empty"), ModelLoadError, "no weights", "model.safetensors")
    refused(lambda: cls.from_pretrained(tmp_path / "empty" / "config.json"), ModelLoadError, "is a file", "directory")
    refused(lambda: cls.from_pretrained(""), ModelLoadError, "empty", "'org/name'")
    refused(lambda: cls.from_pretrained("  "), ModelLoadError, "empty", "'org/name'")
    refused(lambda: cls.from_pretrained(5), ModelLoadError, "int", "directory")
    assert nothing_left(home)


@pytest.mark.parametrize("name", ["someone/some-model", "some-model"])
def test_hub_id_without_network_or_local_copy(name, tmp_path, home, monkeypatch, no_work):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = (name, "cannot be reached", "pass a directory")
    refused(lambda: Causal.from_pretrained(name, cache_dir=tmp_path / "hub"), ModelLoadError, *words)
    assert nothing_left(home)


def test_unreachable_hub(tmp_path):
    """HF_HUB_OFFLINE and an address where nobody listens, as a shell sets them."""
    script = """
import sys
from QEfficient import QEFFAutoModelForCausalLM
from QEfficient.errors import ModelLoadError
try:
    QEFFAutoModelForCausalLM.from_pretrained("someone/some-model")
except ModelLoadError as error:
    print(error)
"""
    for settings in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_HOME": str(tmp_path / "hf"), "QEFF_HOME": str(tmp_path / "home"), **settings}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        assert len(done.stdout.splitlines()) == 1, done
        assert "someone/some-model is no local directory" in done.stdout
        assert "the hub cannot be reached" in done.stdout


@pytest.mark.parametrize("name", ["--wrong..name", "two words", "-a/b", "a/b/c", "back\\slash", "x" * 200])
def test_malformed_hub_ids(name, home, no_work):
    refused(lambda: Causal.from_pretrained(name), ModelLoadError, name, "directory", "hub id such as 'org/name'")


# ---------------------------------------------------------------------------------------- what the checkpoint holds


def test_pickled_weights_only(llama, tmp_path, home, no_work):
    copy = edited(llama, tmp_path)
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    words = ("pytorch_model.bin", "can run code", "safe_serialization=True")
    refused(lambda: Causal.from_pretrained(copy), ModelLoadError, *words)
    assert nothing_left(home)


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_truncated_weights(llama, tmp_path, home, no_work, size):
    copy = edited(llama, tmp_path)
    data = (copy / "model.safetensors").read_bytes()[:size]
    (copy / "model.safetensors").write_bytes(data)
    refused(lambda: Causal.from_pretrained(copy), ModelLoadError, "model.safetensors", "cut off")
    assert nothing_left(home)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b"\xff\xfe",
        b'{"a": 5}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    ],
)
def test_weights_with_a_broken_header(llama, tmp_path, home, no_work, header):
    copy = edited(llama, tmp_path)
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    refused(lambda: Causal.from_pretrained(copy), ModelLoadError, "model.safetensors", "not a valid safetensors file")


def test_missing_shard(llama, tmp_path, home, no_work):
    copy = save_tiny(llama.hf, tmp_path / "sharded", max_shard_size="150KB")
    shards = sorted(copy.glob("*.safetensors"))
    assert len(shards) >= 3
    shards[1].unlink()
    refused(lambda: Causal.from_pretrained(copy), ModelLoadError, f"lacks 1 of {len(shards)}", shards[1].name)
    (copy / "model.safetensors.index.json").write_text("{")
    refused(lambda: Causal.from_pretrained(copy), ModelLoadError, "index.json", "download it again")
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    refused(lambda: Causal.from_pretrained(copy), ModelLoadError, "../../secret", "refused")
    assert nothing_left(home)


def test_incomplete_weights(llama, tmp_path, home):
    """Found when the names of model and checkpoint are compared: nothing is traced."""
    copy = edited(llama, tmp_path, num_hidden_layers=3)
    model = Causal.from_pretrained(copy)
    refused(model.export, ExportError, "lacks 9 of the model's weights", "model.layers.2.")
    assert nothing_left(home)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"text"'])
def test_invalid_config(llama, tmp_path, home, no_work, content):
    copy = edited(llama, tmp_path)
    (copy / "config.json").write_text(content)
    refused(lambda: Causal.from_pretrained(copy), ModelLoadError, "config.json", "download or save")


def test_config_values_transformers_refuses(llama, tmp_path, home):
    model = Causal.from_pretrained(edited(llama, tmp_path, num_attention_heads="many"))
    refused_with = ("checkpoint", "config.json", "num_attention_heads")
    with pytest.raises(ModelLoadError) as caught:
        model.export()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in refused_with)
    assert nothing_left(home)


def test_unknown_model_type(llama, tmp_path, home, monkeypatch):
    monkeypatch.setattr(CheckpointSource, "weights", lambda *args: pytest.fail("weights were read"))
    copy = edited(llama, tmp_path, model_type="nonesuch", architectures=["NonesuchForCausalLM"])
    refused(lambda: Causal.from_pretrained(copy).export(), ModelLoadError, str(copy), "`nonesuch`", "out of date")
    refused(lambda: Causal.from_pretrained(copy).compile(), ModelLoadError, "`nonesuch`")
    assert nothing_left(home)


@pytest.mark.parametrize("entry", [{"quant_method": "gptq"}, {}, "awq"])
def test_quantized_checkpoint(llama, tmp_path, home, no_work, entry):
    if not entry:  # an empty entry, as some tools write it, means: not quantized
        Causal.from_pretrained(edited(llama, tmp_path, quantization_config=entry))
        return
    copy = edited(llama, tmp_path, quantization_config=entry)
    method = entry["quant_method"] if isinstance(entry, dict) else "unknown method"
    refused(lambda: Causal.from_pretrained(copy), ModelLoadError, f"quantized ({method})", "16- or 32-bit checkpoint")


def test_encoders_in_the_causal_class(bert, tmp_path, home, no_work):
    refused(lambda: Causal.from_pretrained(bert.checkpoint), UnsupportedModelError, "BertModel", "use QEFFAutoModel")
    masked = AutoModelForMaskedLM.from_config(tiny_config("bert"))
    copy = save_tiny(masked, tmp_path / "masked")
    refused(lambda: Causal.from_pretrained(copy), UnsupportedModelError, "BertForMaskedLM", "use QEFFAutoModel")
    refused(lambda: Causal(bert.hf), UnsupportedModelError, "BertModel", "use QEFFAutoModel")
    assert nothing_left(home)


def test_masked_language_model_in_memory(home):
    """It has a head over the vocabulary, but keeps no cache: found before anything is traced."""
    masked = AutoModelForMaskedLM.from_config(tiny_config("bert"))
    refused(lambda: Causal(masked).export(), UnsupportedModelError, "BertForMaskedLM", "token by token")
    assert nothing_left(home)


def test_encoder_decoders_in_the_causal_class(tmp_path, home, no_work):
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "t5")
    words = ("T5ForConditionalGeneration", "decoder")
    refused(lambda: Causal.from_pretrained(tmp_path / "t5"), UnsupportedModelError, *words)
    refused(lambda: Causal(model), UnsupportedModelError, *words)


def test_models_without_a_classification_head(llama, bert, home, no_work):
    for built, name in ((bert, "BertModel"), (llama, "LlamaForCausalLM")):
        words = (name, "no classification head", "QEFFAutoModel")
        refused(lambda built=built: Classifier.from_pretrained(built.checkpoint), UnsupportedModelError, *words)
        refused(lambda built=built: Classifier(built.hf), UnsupportedModelError, *words)


@pytest.mark.parametrize("cls", [Causal, Encoder, Classifier])
def test_things_that_are_no_transformers_model(cls, home, no_work):
    for thing, name in ((torch.nn.Linear(2, 2), "Linear"), ("a/path", "str"), (None, "NoneType")):
        words = (name, f"{cls.__name__}.from_pretrained")
        refused(lambda thing=thing: cls(thing), ModelLoadError, *words)


# ---------------------------------------------------------------------------------------- options


CAUSAL_OPTIONS = {
    "context of the model": ({"ctx_len": 129}, ["ctx_len=129", "128 positions", "lower it"]),
    "prompt step of the model": ({"prefill_seq_len": 129}, ["prefill_seq_len=129", "128"]),
    "prompt step of the context": ({"ctx_len": 32, "prefill_seq_len": 33}, ["prefill_seq_len=33", "ctx_len=32"]),
    "two batch sizes": ({"batch_size": 2, "full_batch_size": 4}, ["batch_size=2", "full_batch_size=4", "alone"]),
    "few rows": ({"full_batch_size": 4, "kv_cache_batch_size": 3}, ["kv_cache_batch_size=3", "full_batch_size=4"]),
    "rows alone": ({"kv_cache_batch_size": 3}, ["kv_cache_batch_size needs full_batch_size"]),
    "unknown": ({"ctx_length": 32}, ["'ctx_length'", "Did you mean 'ctx_len'?"]),
    "mxfp6": ({"mxfp6": True}, ["'mxfp6'", "Did you mean 'mxfp6_matmul'?"]),
    "seq_len": ({"seq_len": 32}, ["seq_len is for encoders", "ctx_len"]),
    "target": ({"target": "hots"}, ["'hots'", "Did you mean 'host'?"]),
    "target type": ({"target": 5}, ["target", "5"]),
    "zero": ({"ctx_len": 0}, ["ctx_len must be at least 1"]),
    "text": ({"ctx_len": "32"}, ["ctx_len must be an integer", "'32'"]),
    "bool": ({"batch_size": True}, ["batch_size must be an integer"]),
}


@pytest.mark.parametrize(("options", "words"), CAUSAL_OPTIONS.values(), ids=CAUSAL_OPTIONS)
def test_causal_options(llama, home, no_work, options, words):
    refused(lambda: Causal.from_pretrained(llama.checkpoint).compile(**options), OptionError, *words)
    refused(lambda: Causal(llama.hf).compile(**options), OptionError, *words)
    assert nothing_left(home)


def test_continuous_batching_needs_slots(llama, home, no_work):
    model = Causal.from_pretrained(llama.checkpoint, continuous_batching=True)
    refused(lambda: model.compile(ctx_len=32), OptionError, "continuous batching", "pass full_batch_size")


ENCODER_OPTIONS = {
    "ctx_len": ({"ctx_len": 32}, ["ctx_len is for causal models", "seq_len"]),
    "prefill_seq_len": ({"prefill_seq_len": 32}, ["prefill_seq_len is for causal models"]),
    "full_batch_size": ({"full_batch_size": 2}, ["full_batch_size is for causal models"]),
    "too long": ({"seq_len": [16, 129]}, ["seq_len=129", "128 positions"]),
    "none": ({"seq_len": []}, ["seq_len", "non-empty"]),
    "unknown": ({"seqlen": 16}, ["'seqlen'", "Did you mean 'seq_len'?"]),
}


@pytest.mark.parametrize(("options", "words"), ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_encoder_options(bert, home, no_work, options, words):
    refused(lambda: Encoder.from_pretrained(bert.checkpoint).compile(**options), OptionError, *words)
    assert nothing_left(home)


def test_limits_only_the_export_knows(home):
    """A config that leaves out what equals its class's default: the same sentence comes, later."""
    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    model.save_pretrained(home.parent / "small")
    path = home.parent / "small" / "config.json"
    body = json.loads(path.read_text())
    assert body.pop("max_position_embeddings") == 512
    path.write_text(json.dumps(body))
    wrapped = Encoder.from_pretrained(path.parent)
    refused(lambda: wrapped.compile(seq_len=513), OptionError, "seq_len=513", "512 positions", "lower it")
    assert not (home / "packages").exists()


def test_unknown_arguments_of_from_pretrained(llama, home, no_work):
    use = lambda **arguments: Causal.from_pretrained(llama.checkpoint, **arguments)
    refused(lambda: use(revison="main"), OptionError, "'revison'", "Did you mean 'revision'?")
    refused(lambda: use(torch_dtype="float16"), OptionError, "'torch_dtype'")


def first_token(hidden, mask):
    return hidden[:, 0]


def test_poolings(bert, home, no_work):
    use = lambda pooling: Encoder.from_pretrained(bert.checkpoint, pooling=pooling)
    refused(lambda: use("men"), OptionError, "'men'", "Did you mean 'mean'?")
    refused(lambda: Encoder(bert.hf, pooling="avg"), OptionError, "'avg'", "one of ['mean', 'cls', 'max', 'last']")
    refused(lambda: use(5), OptionError, "pooling=5")
    column = 3
    refused(lambda: use(lambda hidden, mask: hidden[:, column]), OptionError, "pooling", "captured variables")
    refused(lambda: use(lambda hidden, mask, c=3: hidden[:, c]), OptionError, "pooling", "default arguments")
    refused(lambda: use(torch.nn.Identity()), OptionError, "pooling", "plain function")
    use(first_token)


def test_poolings_are_told_apart():
    """D2: two functions with one name and one source line are two functions."""
    from QEfficient.models.keys import callable_identity

    pair = [lambda hidden, mask: hidden[:, 0], lambda hidden, mask: hidden[:, 1]]  # fmt: skip
    again = [lambda hidden, mask: hidden[:, 0], lambda hidden, mask: hidden[:, 1]]  # fmt: skip
    first, second = map(callable_identity, pair)
    assert first != second
    assert [callable_identity(function) for function in again] != [second, first]
    assert callable_identity(first_token) == callable_identity(first_token)


def test_transform_names(llama, home, no_work):
    model = Causal.from_pretrained(llama.checkpoint)
    refused(lambda: model.compile(transforms=["FP16Clp"]), OptionError, "FP16Clp", "FP16Clip")


# ---------------------------------------------------------------------------------------- input


def no_run(*arguments):
    raise AssertionError("the program ran before its input was checked")


def test_prompt_longer_than_the_context(llama, monkeypatch):
    with QEfficient.load(llama.package) as package:
        monkeypatch.setattr(package.session, "run", no_run)
        text = "a " * 60
        for arguments in ({"prompts": ["a", text]}, {"prompts": text, "generation_len": 2}):
            words = ("does not fit ctx_len=48", "shorten it or compile with a larger ctx_len")
            refused(lambda a=arguments: package.generate(**a), ContextLengthError, *words)
        ids = np.array([sample_prompt(50)])
        refused(lambda: package.generate(ids), ContextLengthError, "prompt of 50 tokens", "ctx_len=48")


def test_input_longer_than_the_encoder_takes(bert, monkeypatch):
    with QEfficient.load(bert.package) as package:
        ids = np.array([sample_prompt(129)])
        short = np.zeros_like(ids)
        short[0, :128] = 1
        assert package.generate(input_ids=ids, attention_mask=short)["output"].shape == (1, 64)
        monkeypatch.setattr(package.session, "run", no_run)
        words = ("129 tokens", "128", "truncation=True", "seq_len")
        refused(lambda: package.generate(input_ids=ids), InputError, *words)


ENCODER_INPUTS = {
    "nothing": ({}, ["input_ids is missing"]),
    "unknown": ({"input_ids": [[1, 2]], "token_types": [[0, 0]]}, ["'token_types'", "token_type_ids"]),
    "a list": ([[1, 2]], ["mapping", "list"]),
    "floats": ({"input_ids": [[1.5, 2.0]]}, ["input_ids", "integers"]),
    "one row": ({"input_ids": [1, 2]}, ["rank 2", "(2,)"]),
    "ragged": ({"input_ids": [[1, 2], [3]]}, ["unequal length"]),
    "empty": ({"input_ids": np.zeros((0, 4), np.int64)}, ["input_ids is empty"]),
    "vocabulary": ({"input_ids": [[1, 128]]}, ["vocabulary of 128"]),
    "negative": ({"input_ids": [[-1, 2]]}, ["vocabulary of 128"]),
    "mask": ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, ["attention_mask", "(1, 1)"]),
    "mask of zeros": ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, ["row 0 has no tokens"]),
    "types": ({"input_ids": [[1, 2]], "token_type_ids": [[0]]}, ["token_type_ids", "(1, 1)"]),
}


@pytest.mark.parametrize(("inputs", "words"), ENCODER_INPUTS.values(), ids=ENCODER_INPUTS)
def test_encoder_inputs(bert, monkeypatch, inputs, words):
    with QEfficient.load(bert.package) as package:
        monkeypatch.setattr(package.session, "run", no_run)
        refused(lambda: package.generate(inputs), InputError, *words)


def test_texts_to_embed(bert):
    with QEfficient.load(bert.package) as package:
        for texts in ("one string", [], [1], ["a", None]):
            refused(lambda texts=texts: package.embed(texts), InputError, "non-empty list of strings")
        for n in (0, -1, 2.5, True, "8"):
            refused(lambda n=n: package.embed(["a"], batch_size=n), InputError, "batch_size must be", repr(n))


# ---------------------------------------------------------------------------------------- the disk


CHILD = """
import json, os, resource, sys
from pathlib import Path
from QEfficient import QEFFAutoModelForCausalLM
from QEfficient.errors import ArtifactWriteError

home = Path(sys.argv[2])

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def attempt(use):
    try:
        use()
        error = None
    except ArtifactWriteError as found:
        error = str(found)
    left = [str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()] if home.is_dir() else []
    return {"error": error, "left": [p for p in left if p.split("/")[0] not in ("locks", "digests")]}
"""


def in_child(script: str, checkpoint: Path, home: Path, *prefix: str) -> list[dict]:
    command = [*prefix, sys.executable, "-c", CHILD + script, str(checkpoint), str(home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def no_space(report: dict, home: Path) -> None:
    assert report["error"] is not None
    assert "\n" not in report["error"]
    assert "no space left" in report["error"]
    assert str(home) in report["error"]
    assert "cache gc" in report["error"]
    assert "QEFF_HOME" in report["error"]


def test_file_size_limit_while_exporting_and_compiling(llama, tmp_path):
    """The limit of a process stands for a full disk: the same refusal of a write, at a place of our choice."""
    script = """
model = QEFFAutoModelForCausalLM.from_pretrained(sys.argv[1], cache_home_dir=home)
limit(20_000)
reports = [attempt(model.export)]
limit(resource.RLIM_INFINITY)
reports.append(attempt(model.export))
limit(20_000)
reports.append(attempt(lambda: model.compile(ctx_len=32)))
limit(resource.RLIM_INFINITY)
reports.append(attempt(lambda: model.compile(ctx_len=32)))
print(json.dumps(reports))
"""
    home = tmp_path / "home"
    full_export, export, full_compile, compiled = in_child(script, llama.checkpoint, home)
    no_space(full_export, home)
    assert full_export["left"] == []
    assert export["error"] is None
    no_space(full_compile, home)
    assert full_compile["left"] == export["left"]
    assert compiled["error"] is None
    assert any(name.startswith("packages/") for name in compiled["left"])


def mounts_work() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not mounts_work(), reason="this machine lets no process mount a file system of its own")
def test_full_and_read_only_disks(llama, tmp_path):
    """Real ones, in a mount namespace of their own."""
    home = tmp_path / "disk" / "home"
    home.mkdir(parents=True)

    def mounted(options: str) -> tuple[str, ...]:
        # The arguments of the child follow as "$@".
        return ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o {options} none "{home.parent}" && "$@"', "sh")

    script = """
home.mkdir(exist_ok=True)
model = QEFFAutoModelForCausalLM.from_pretrained(sys.argv[1], cache_home_dir=home)
print(json.dumps([attempt(lambda: model.compile(ctx_len=32))]))
"""
    (report,) = in_child(script, llama.checkpoint, home, *mounted("size=100k"))
    no_space(report, home)
    assert report["left"] == []
    script = """
model = QEFFAutoModelForCausalLM.from_pretrained(sys.argv[1], cache_home_dir=home)
print(json.dumps([attempt(lambda: model.compile(ctx_len=32)), attempt(model.export), "torch" in sys.modules]))
"""
    *reports, torch_loaded = in_child(script, llama.checkpoint, home.parent, *mounted("ro"))
    for report in reports:
        assert report["error"] is not None
        assert "\n" not in report["error"]
        assert str(home.parent) in report["error"]
        assert "QEFF_HOME" in report["error"]
    assert not torch_loaded


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_home_without_permission(llama, home, no_work):
    home.mkdir(mode=0o555)
    words = (str(home), "from QEFF_HOME", "not writable", "set QEFF_HOME")
    refused(lambda: Causal.from_pretrained(llama.checkpoint).compile(), ArtifactWriteError, *words)


@pytest.mark.parametrize("below", [False, True])
def test_home_that_is_a_file(llama, home, monkeypatch, no_work, below):
    home.write_text("not a directory")
    path = home / "deeper" if below else home
    monkeypatch.setenv("QEFF_HOME", str(path))
    words = (str(path), "from QEFF_HOME", "not a directory", "set QEFF_HOME")
    for use in (
        lambda: Causal.from_pretrained(llama.checkpoint).compile(ctx_len=32),
        lambda: Causal.from_pretrained(llama.checkpoint).generate(prompts="a"),
        lambda: Encoder(llama.hf).export(),
    ):
        refused(use, ArtifactWriteError, *words)
    assert home.read_text() == "not a directory"

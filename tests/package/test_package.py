"""A package is self-contained, says what it is, and is refused when a single byte of it is not what was compiled."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from tiny_models import greedy_reference, sample_prompt, save_tiny, tiny_causal_lm, tiny_tokenizer

import QEfficient
from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM
from QEfficient.errors import ModelLoadError, OptionError, PackageError
from QEfficient.targets.manifest import Manifest

PROMPT = np.array([sample_prompt()])


def seal(body: dict) -> dict:
    """The manifest with the digest its format asks for: canonical JSON of everything else."""
    body = {key: value for key, value in body.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return body | {"digest": blake3(text.encode()).hexdigest()}


def edit_manifest(directory, **changes) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(seal(json.loads(path.read_text()) | changes)))


def refused(directory, *words: str, **arguments) -> str:
    with pytest.raises(PackageError) as caught:
        QEfficient.load(directory, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    return message


def test_runs_without_checkpoint_and_cache(tmp_path):
    hf = tiny_causal_lm("llama")
    checkpoint, home, copy = tmp_path / "checkpoint", tmp_path / "home", tmp_path / "elsewhere" / "package"
    save_tiny(hf, checkpoint)
    tiny_tokenizer(checkpoint)
    model = QEFFAutoModelForCausalLM.from_pretrained(checkpoint, cache_home_dir=home)
    model.compile(ctx_len=32)
    ids = model.generate(PROMPT, max_new_tokens=8)
    text = model.generate(prompts=["the others"], generation_len=8).texts
    assert model.save_pretrained(copy) == copy
    shutil.rmtree(checkpoint)
    shutil.rmtree(home)
    files = [path for path in copy.rglob("*") if not path.is_dir()]
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in files)
    assert not any(path.name == "entry.json" for path in files)
    moved = tmp_path / "moved again"
    copy.rename(moved)
    with QEfficient.load(moved) as package:
        found = package.generate(PROMPT, max_new_tokens=8)
        assert package.generate(prompts=["the others"], generation_len=8).texts == text
    assert found.tolist() == ids.tolist()
    assert found[0, 12:].tolist() == greedy_reference(hf, PROMPT[0].tolist(), 8)[0]


def test_manifest(llama):
    body = json.loads((llama.package / "manifest.json").read_text())
    assert (body["format"], body["format_version"]) == ("qefficient-package", 2)
    assert (body["target"], body["task"], body["program"]) == ("host", "text-generation", "program.onnx")
    assert body["model"]["architecture"] == "LlamaForCausalLM"
    assert (body["model"]["vocab_size"], body["model"]["max_positions"]) == (128, 128)
    assert body["model"]["parameters"] == sum(p.numel() for p in llama.hf.parameters())
    ids = {"dtype": "int64", "shape": ["batch_size", "seq_len"]}
    assert body["inputs"] == [{"name": name, **ids} for name in ("input_ids", "position_ids")]
    assert body["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch_size", 1, 128]}]
    names = [f"past_{kind}.{layer}" for layer in range(2) for kind in ("key", "value")]
    state = {"dtype": "float32", "shape": ["batch_size", 2, "ctx_len", 16], "kind": "kv", "in_place": True}
    assert body["states"] == [{"input": name, "output": f"{name}_RetainedState", **state} for name in names]
    anything, context = {"minimum": 1, "maximum": None}, {"minimum": 48, "maximum": 48}
    one = {"minimum": 1, "maximum": 1}
    assert body["specializations"] == [
        {
            "name": name,
            "symbols": {"batch_size": rows, "seq_len": {"minimum": 1, "maximum": longest}, "ctx_len": context},
            "program": "",
            "by_row": by_row,
        }
        for name, longest, rows, by_row in (("Prefill", 8, one, True), ("Decode", 1, anything, False))
    ]
    assert (body["options"]["ctx_len"], body["options"]["prefill_seq_len"]) == (48, 8)
    attention = next(record for record in body["transforms"] if record["name"] == "FuseAttention")
    assert attention["facts"]["fused"]["GroupQueryAttention"] == 2
    for library in ("torch", "transformers", "onnxruntime"):
        assert body["libraries"][library] == importlib.metadata.version(library)
    assert body["libraries"]["qefficient"] == QEfficient.__version__
    on_disk = {path.relative_to(llama.package).as_posix(): path for path in llama.package.rglob("*") if path.is_file()}
    assert set(body["files"]) == set(on_disk) - {"manifest.json", "entry.json"}
    assert {"program.onnx", "weights/model.safetensors", "tokenizer.json", "config.json"} <= set(body["files"])
    for name, record in body["files"].items():
        data = on_disk[name].read_bytes()
        assert record == {"size": len(data), "blake3": blake3(data).hexdigest()}
    assert seal(body) == body


def test_manifest_lists_transforms_and_encoder_shapes(bert, shared_home):
    model = QEFFAutoModel.from_pretrained(bert.checkpoint, pooling="mean", cache_home_dir=shared_home)
    package = model.compile(seq_len=[8, 32], batch_size=4, transforms=["FP16Clip"])
    body = json.loads((package / "manifest.json").read_text())
    asked, *wanted = [record["name"] for record in body["transforms"]]
    assert asked == "FP16Clip"  # the user's first, then what the target wants
    assert wanted == ["FuseNorms", "FuseSiLU", "FuseEncoderAttention"]
    assert [spec["name"] for spec in body["specializations"]] == ["seq_len_8", "seq_len_32"]
    assert body["specializations"][1]["symbols"]["seq_len"] == {"minimum": 1, "maximum": 32}
    assert body["specializations"][0]["symbols"]["batch_size"] == {"minimum": 1, "maximum": 4}
    assert body["outputs"] == [{"name": "output", "dtype": "float32", "shape": ["batch_size", 64]}]
    assert body["model"]["pooling"] == "mean"


def test_one_flipped_byte_in_any_file(llama_copy):
    files = [path for path in llama_copy.rglob("*") if path.is_file() and path.name != "entry.json"]
    assert len(files) >= 7
    for path in files:
        original = path.read_bytes()
        for place in (0, len(original) // 2, len(original) - 1):
            changed = bytearray(original)
            changed[place] ^= 0x04
            path.write_bytes(changed)
            refused(llama_copy, str(path))
        path.write_bytes(original)
    QEfficient.load(llama_copy).close()


def test_every_byte_of_the_manifest_counts(llama_copy):
    path = llama_copy / "manifest.json"
    original = path.read_bytes()
    for place in range(len(original) - 1):  # the last is the line break at the end of the file
        changed = bytearray(original)
        changed[place] ^= 0x01
        path.write_bytes(changed)
        with pytest.raises(PackageError, match=r"manifest\.json"):
            Manifest.load(llama_copy)


@pytest.mark.parametrize("verify", [True, False])
def test_missing_and_cut_files(llama_copy, verify):
    weights = llama_copy / "weights" / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1])
    refused(llama_copy, str(weights), "bytes", verify=verify)
    weights.write_bytes(original + b"\0")
    refused(llama_copy, str(weights), "bytes", verify=verify)
    weights.unlink()
    refused(llama_copy, "weights/model.safetensors is missing", verify=verify)
    weights.mkdir()
    refused(llama_copy, "weights/model.safetensors is missing", verify=verify)


def test_without_verification_only_the_content_is_not_read(llama, llama_copy):
    weights = llama_copy / "weights" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-4:] = bytes(4)
    weights.write_bytes(changed)
    refused(llama_copy, str(weights))
    with QEfficient.load(llama_copy, verify=False) as package:
        assert package.generate(PROMPT, max_new_tokens=3).shape == (1, 15)


def test_unreadable_side_file_without_verification(llama_copy):
    path = llama_copy / "generation_config.json"
    for content in (b"{", b"[]", b"\xff"):
        path.write_bytes(content.ljust(path.stat().st_size))
        refused(llama_copy, str(path), verify=False)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "additional_chat_templates"])
def test_a_side_file_nobody_compiled_is_refused(llama_copy, name):
    """It would change what the package answers, and no digest covers it; other files (README.md) do no harm."""
    (llama_copy / "README.md").write_text("about this package")
    QEfficient.load(llama_copy).close()
    (llama_copy / name).mkdir() if "." not in name else (llama_copy / name).write_text("{}")
    refused(llama_copy, str(llama_copy / name), "remove it")


def test_newer_format(llama_copy):
    edit_manifest(llama_copy, format_version=3)
    refused(llama_copy, "package format 3", "reads up to 2", "upgrade")
    edit_manifest(llama_copy, format_version="1")
    refused(llama_copy, "format")


def test_foreign_directories(tmp_path, llama_copy):
    refused(tmp_path / "nowhere", "nowhere", "not a directory")
    refused(llama_copy / "program.onnx", "program.onnx", "not a directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no manifest.json")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for content in ('{"manifest_version": 3, "name": "an extension"}', "[1, 2]", '"text"', "null"):
        (foreign / "manifest.json").write_text(content)
        refused(foreign, "manifest.json", "something else")
    for content in ("", "{", "not json"):
        (foreign / "manifest.json").write_text(content)
        refused(foreign, "manifest.json", "not valid JSON")
    ours = json.loads((llama_copy / "manifest.json").read_text())
    for missing in ("inputs", "states", "specializations", "files", "program", "target"):
        body = seal({key: value for key, value in ours.items() if key != missing})
        (foreign / "manifest.json").write_text(json.dumps(body))
        refused(foreign, "manifest.json")
    (foreign / "manifest.json").write_text(json.dumps(seal(ours | {"inputs": 5})))
    refused(foreign, "manifest.json")


def test_names_outside_the_package(llama_copy, tmp_path):
    (tmp_path / "secret").write_text("secret")
    files = json.loads((llama_copy / "manifest.json").read_text())["files"]
    record = {"size": 6, "blake3": blake3(b"secret").hexdigest()}
    for name in ("../secret", "weights/../../secret", str(tmp_path / "secret")):
        edit_manifest(llama_copy, files=files | {name: record})
        refused(llama_copy, repr(name), "outside itself")
    edit_manifest(llama_copy, files=files, program="../secret")
    refused(llama_copy, "program")


def test_unknown_target_task_and_program(llama_copy):
    good = json.loads((llama_copy / "manifest.json").read_text())
    edit_manifest(llama_copy, target="quantum")
    refused(llama_copy, "'quantum'", "upgrade")
    edit_manifest(llama_copy, **{**good, "task": "poetry"})
    refused(llama_copy, "'poetry'", "upgrade")
    edit_manifest(llama_copy, **{**good, "program": "other.onnx"})
    refused(llama_copy, "lists no program")


def test_save_and_export_and_compile_into_a_full_directory(llama, tmp_path):
    """Refused before the model is compiled, and nothing is touched."""
    full, home = tmp_path / "full", tmp_path / "home"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    a_file = tmp_path / "file"
    a_file.write_text("x")
    model = QEFFAutoModelForCausalLM.from_pretrained(llama.checkpoint, cache_home_dir=home)
    refusals = {
        full: "exists and is not empty: choose a new directory",
        a_file: "is a file: choose a new directory",
        a_file / "under it": "is a file: choose a new directory",
        Path("/proc/nowhere"): "cannot be made",
    }
    for destination, words in refusals.items():
        for use in (
            lambda place: model.save_pretrained(place),
            lambda place: model.export(place),
            lambda place: model.compile(compile_dir=place, ctx_len=32),
        ):
            with pytest.raises(OptionError, match=words) as caught:
                use(destination)
            assert str(destination) in str(caught.value)
    assert [(path.name, path.read_text()) for path in full.iterdir()] == [("thesis.txt", "years of work")]
    assert a_file.read_text() == "x"
    assert not home.exists()


def test_copies_into_empty_and_new_directories(llama, shared_home, tmp_path):
    model = QEFFAutoModelForCausalLM.from_pretrained(llama.checkpoint, cache_home_dir=shared_home)
    empty = tmp_path / "empty"
    empty.mkdir()
    model.compile(compile_dir=empty, ctx_len=48, prefill_seq_len=8)
    model.save_pretrained(tmp_path / "new" / "deep")
    names = {path.relative_to(llama.package) for path in llama.package.rglob("*") if path.name != "entry.json"}
    for copy in (empty, tmp_path / "new" / "deep"):
        assert {path.relative_to(copy) for path in copy.rglob("*")} == names
        QEfficient.load(copy).close()
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("offline", [True, False])
def test_push_to_hub_without_a_network(llama, shared_home, monkeypatch, offline):
    if offline:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:  # nobody listens there
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    model = QEFFAutoModelForCausalLM.from_pretrained(llama.checkpoint, cache_home_dir=shared_home)
    model.compile(ctx_len=48, prefill_seq_len=8)
    with pytest.raises(ModelLoadError, match=r"could not be pushed to someone/model .*save_pretrained") as caught:
        model.push_to_hub("someone/model", token="hf_x")
    assert "\n" not in str(caught.value)
    assert ("OfflineModeIsEnabled" in str(caught.value)) == offline


def test_push_to_hub_checks_the_name_first(llama, tmp_path):
    model = QEFFAutoModelForCausalLM.from_pretrained(llama.checkpoint, cache_home_dir=tmp_path / "home")
    with pytest.raises(ModelLoadError, match="'a/b/c' is not a valid hub id"):
        model.push_to_hub("a/b/c")
    assert not (tmp_path / "home").exists()

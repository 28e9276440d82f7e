"""Merging: the written checkpoint answers as PEFT's base and adapter do, or nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import sample_prompt, save_tiny, tiny_causal_lm, tiny_classifier, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

import QEfficient
from QEfficient import QEFFAutoPeftModelForCausalLM
from QEfficient.cli.main import app
from QEfficient.engine.adapter_file import same_model
from QEfficient.errors import ArtifactWriteError, InputError, ModelLoadError, OptionError, TrainingError
from QEfficient.finetune.merge import merge_adapter

IDS = torch.tensor([sample_prompt(12)])


def adapted(model, place, **lora):
    """An adapter with weights that matter, saved; returns the PEFT model's logits."""
    torch.manual_seed(5)
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **lora}))
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(place)
    with torch.no_grad():
        return tuned.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.numpy()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float().numpy()


@pytest.fixture
def base(tmp_path):
    place = save_tiny(tiny_causal_lm("llama"), tmp_path / "base")
    tiny_tokenizer(place)
    return place


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_the_merged_model_is_a_plain_checkpoint(family, tmp_path):
    base = save_tiny(tiny_causal_lm(family), tmp_path / "base")
    targets = ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else "all-linear"
    expected = adapted(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", target_modules=targets)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert np.abs(plain - expected).max() > 0.1  # the adapter matters

    done = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(found, "peft_config")
    np.testing.assert_allclose(logits(found), expected, atol=1e-4)
    assert done.dtype == "float32"
    assert 0 <= done.relative_difference < 1e-5
    assert done.adapter_effect > 0.1
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["max_difference"] == done.max_difference


def test_the_base_comes_from_the_adapters_configuration_and_the_tokenizer_goes_along(base, tmp_path):
    adapted(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")  # PEFT writes the base's path
    done = merge_adapter(tmp_path / "adapter", tmp_path / "merged", prompts=["the sea", "of the town"])
    assert done.prompts == 2
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    tiny_tokenizer(tmp_path / "adapter", vocab_size=120)  # the adapter's own tokenizer wins
    merge_adapter(tmp_path / "adapter", tmp_path / "again")
    assert len(json.loads((tmp_path / "again" / "tokenizer.json").read_text())["model"]["vocab"]) == 120


def test_half_precision_is_kept_only_where_it_is_accurate_enough(tmp_path):
    base = save_tiny(tiny_causal_lm("llama"), tmp_path / "base", dtype=torch.bfloat16)
    expected = adapted(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter", target_modules=["q_proj"]
    )
    strict = merge_adapter(tmp_path / "adapter", tmp_path / "strict", base, tolerance=1e-4)
    loose = merge_adapter(tmp_path / "adapter", tmp_path / "loose", base, tolerance=0.1)
    assert (strict.dtype, loose.dtype) == ("float32", "bfloat16")
    assert "bfloat16 the logits would differ" in strict.notes[0]
    assert strict.relative_difference < 1e-5 < loose.relative_difference < 0.1
    for name, dtype in (("strict", torch.float32), ("loose", torch.bfloat16)):
        stored = load_file(tmp_path / name / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {dtype}
        assert AutoConfig.from_pretrained(tmp_path / name).dtype is dtype
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "strict")
    np.testing.assert_allclose(logits(exact), expected, atol=1e-4)
    rounded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "loose", dtype=torch.float32))
    assert np.abs(rounded - expected).max() == pytest.approx(loose.max_difference, rel=2)


def test_a_head_tied_to_the_embedding_is_refused(tmp_path):
    """Adding to the head would add to the embedding, which the adapter never touched."""
    base = save_tiny(tiny_causal_lm("llama", tie_word_embeddings=True), tmp_path / "base")
    adapted(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(TrainingError, match="merging would change the logits"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]  # nothing half-written either


def test_a_classifiers_head_is_merged(tmp_path):
    names = {0: "no", 1: "yes", 2: "maybe"}
    model = tiny_classifier("bert", id2label=names, label2id={v: k for k, v in names.items()})
    base = save_tiny(tiny_classifier("bert", seed=0, num_labels=2), tmp_path / "base")  # of other classes
    torch.manual_seed(0)
    weights = AutoModelForSequenceClassification.from_pretrained(
        base, config=model.config, ignore_mismatched_sizes=True
    )
    expected = adapted(weights, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["query", "value"])
    model.config.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base)
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert found.config.id2label == names
    np.testing.assert_allclose(logits(found), expected, atol=1e-5)


def test_what_cannot_be_merged_is_said_before_loading(base, tmp_path):
    place = tmp_path / "adapter"
    adapted(AutoModelForCausalLM.from_pretrained(base), place)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(OptionError, match="not empty"):
        merge_adapter(place, tmp_path / "used")
    with pytest.raises(OptionError, match="tolerance"):
        merge_adapter(place, tmp_path / "out", tolerance=0)
    with pytest.raises(ModelLoadError, match=r"is a full checkpoint and no adapter .*: there is nothing to merge"):
        merge_adapter(base, tmp_path / "out")
    with pytest.raises(InputError, match="prompts"):
        merge_adapter(place, tmp_path / "out", prompts=["ok", ""])
    other = save_tiny(tiny_causal_lm("llama", hidden_size=32, head_dim=8), tmp_path / "other")
    fits = r"does not fit .*other: model\.\S+\.weight has the shape \[4, 64\] in the adapter, and .* needs \[4, 32\]\."
    with pytest.raises(ModelLoadError, match=fits):
        merge_adapter(place, tmp_path / "out", other)
    settings = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ModelLoadError, match="pass base_model"):
        merge_adapter(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_missing_tensors_is_refused(base, tmp_path):
    place = tmp_path / "adapter"
    adapted(AutoModelForCausalLM.from_pretrained(base), place)
    tensors = load_file(place / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="lacks 1 of its tensors"):
        merge_adapter(place, tmp_path / "out")
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match="as safetensors"):
        merge_adapter(place, tmp_path / "out")


def test_a_destination_that_cannot_be_written_is_said_first(tmp_path):
    """The adapter does not even exist: nothing was looked at before."""
    file = tmp_path / "afile"
    file.touch()
    with pytest.raises(OptionError, match="afile is a file: choose a new directory"):
        merge_adapter(tmp_path / "none", file)
    with pytest.raises(OptionError, match=r"sub/deep cannot be made, for .*afile is a file"):
        merge_adapter(tmp_path / "none", file / "sub" / "deep")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_is_read_only_is_said_first(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(OptionError, match=r"merged cannot be made \(Permission denied\)"):
        merge_adapter(tmp_path / "none", tmp_path / "closed" / "merged")


def test_a_write_that_fails_says_nothing_about_the_cache(base, tmp_path, monkeypatch):
    adapted(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    for number, words in ((28, "no space left to write the merged model"), (5, "cannot be written to .*merged")):

        def fail(place, final, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("QEfficient.finetune.merge.publish", fail)
        with pytest.raises(ArtifactWriteError, match=words) as error:
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        assert "QEFF_HOME" not in str(error.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_another_base_of_the_same_shapes_is_warned_of(base, tmp_path):
    adapted(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    other = save_tiny(tiny_causal_lm("llama", seed=9), tmp_path / "another")
    done = merge_adapter(tmp_path / "adapter", tmp_path / "merged", other)
    assert f"warning: the adapter was trained on {base} and is merged into {other}" in str(done)
    moved = shutil.copytree(base, tmp_path / "elsewhere" / "base")
    assert "warning" not in str(merge_adapter(tmp_path / "adapter", tmp_path / "again", moved))


def test_names_of_one_model():
    cached = "/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123"
    assert all(same_model("org/name", other) for other in ("org/name", "/models/name", "./name/", cached))
    assert same_model(".", str(Path.cwd()))
    assert not any(
        same_model("org/name", other) for other in ("org/other", "/models/other", cached.replace("name", "other"))
    )


def test_an_adapter_of_another_base_is_warned_of_when_loaded(base, tmp_path):
    adapted(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", target_modules=["q_proj"])
    other = save_tiny(tiny_causal_lm("llama", seed=9), tmp_path / "another")
    adapted(AutoModelForCausalLM.from_pretrained(other), tmp_path / "foreign", target_modules=["q_proj"])
    model = QEFFAutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", cache_home_dir=tmp_path / "home")
    model.compile(ctx_len=24, prefill_seq_len=8, progress=False)
    with pytest.warns(UserWarning, match="foreign was trained on .*another and is used on .*base"):
        model.load_adapter(tmp_path / "foreign", "foreign")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(input_ids=IDS.numpy(), max_new_tokens=1)  # said once is enough
        model.load_adapter(tmp_path / "adapter", "own")
        package = QEfficient.load(model.save_pretrained(tmp_path / "package"))
    with package:
        with pytest.warns(UserWarning, match="foreign was trained on"):
            package.load_adapter(tmp_path / "foreign", "again")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            package.load_adapter(tmp_path / "adapter", "more")


def test_rounding_that_takes_much_of_the_adapter_is_warned_of(tmp_path):
    base = save_tiny(tiny_causal_lm("llama"), tmp_path / "base", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted(model, tmp_path / "strong", target_modules="all-linear")
    assert not any(
        "warning" in note for note in merge_adapter(tmp_path / "strong", tmp_path / "a", tolerance=0.1).notes
    )
    place = shutil.copytree(tmp_path / "strong", tmp_path / "weak")
    tensors = load_file(place / "adapter_model.safetensors")
    weak = {name: tensor / 50 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(weak, place / "adapter_model.safetensors", metadata={"format": "pt"})
    done = merge_adapter(place, tmp_path / "b", tolerance=0.1)
    assert done.max_difference > 0.1 * done.adapter_effect
    (note,) = done.notes
    assert note.startswith("warning: rounding to bfloat16 changes the logits by")
    advised = float(note.partition("--tolerance ")[2].split()[0])
    again = merge_adapter(place, tmp_path / "c", tolerance=advised)  # the advice works
    assert again.dtype == "float32"
    assert again.max_difference < 0.01 * again.adapter_effect


def test_the_command(base, tmp_path):
    adapted(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    arguments = ["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged"), "--prompt", "the sea"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "logits of 1 prompts differ by at most" in result.stderr
    assert result.stdout.strip() == str(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code != 0
    assert "is not empty" in again.stderr

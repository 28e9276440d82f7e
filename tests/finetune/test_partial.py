"""Training some weights without an adapter: what is saved is a whole checkpoint, the rest of it untouched."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, save_tiny, tiny_causal_lm, tiny_tokenizer
from transformers import AutoModelForCausalLM

from QEfficient.errors import OptionError
from QEfficient.finetune import QEffConfig, QEfficient, QEffTrainingArgs
from QEfficient.finetune.model_files import BaseFiles, write_model
from QEfficient.safetensors_io import read_header

ROWS = [{"prompt": f"{word} is", "completion": f" {word[::-1]}"} for word in ("one", "two", "three", "four", "five")]
IDS = torch.arange(4, 20)[None] * 5 % VOCAB_SIZE


def run(model, output, trainable, steps=3, **settings):
    args = QEffTrainingArgs(
        output, max_steps=steps, batch_size=2, learning_rate=1e-2, report_to="none", disable_tqdm=True, plot=False,
        **{"save_strategy": "no", "lr_scheduler_type": "constant", **settings},
    )  # fmt: skip
    config = QEffConfig(str(model), ROWS, train_frac=1.0, max_ctx_len=32, trainable=trainable, lora_config=None)
    qe = QEfficient(config, args)
    tuned, _ = qe.refine(say=lambda line: None)
    return qe, tuned


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float().numpy()


@pytest.mark.parametrize(
    ("family", "dtype", "pattern"),
    [
        ("llama", torch.float32, "model.layers.1.*"),
        ("llama", torch.bfloat16, "model.layers.1.mlp.*"),
        # Tied to the head.
        pytest.param("gemma2", torch.float32, "model.embed_tokens.weight", marks=pytest.mark.sweep),
        # Its experts are stacked when loaded.
        pytest.param("qwen3_moe", torch.float32, "model.layers.0.self_attn.*", marks=pytest.mark.sweep),
    ],
)
def test_the_output_is_a_whole_checkpoint(family, dtype, pattern, tmp_path):
    base, out = save_tiny(tiny_causal_lm(family), tmp_path / "base", dtype=dtype), tmp_path / "out"
    tiny_tokenizer(base)
    qe, tuned = run(base, out, (pattern,))
    assert qe.proof is not None
    assert qe.proof.passed

    found, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    np.testing.assert_allclose(logits(found), logits(tuned), atol=1e-6)
    before = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).named_parameters())
    assert qe.trainer is not None
    trained = {qe.trainer._step.file_names[name] for name, _ in qe.trainer._step.named_parameters()}
    assert trained
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter.float(), before[name]) is (name not in trained), name
    stored = {name: ref.dtype for name, ref in read_header(out / "model.safetensors").items()}
    assert {stored[name] for name in trained} == {"F32"}
    assert {kind for name, kind in stored.items() if name not in trained} == {
        {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    }


def test_it_runs_compiled_and_keeps_the_generation_settings(tmp_path):
    base, out = save_tiny(tiny_causal_lm("llama"), tmp_path / "base"), tmp_path / "out"
    tiny_tokenizer(base)
    qe, tuned = run(base, out, ("model.layers.1.*",))
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    prompt = qe.data_manager.prompt_ids("one is")
    end = qe.data_manager.tokenizer.eos_token_id  # answers were trained to end with it
    with torch.no_grad():
        expected = tuned.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0
        )
    text = qe.data_manager.tokenizer.decode(expected[0, len(prompt) :], skip_special_tokens=True)
    assert qe.generate("one is", max_new_tokens=8) == text


def test_checkpoints_are_whole_too_and_resume(tmp_path):
    base = save_tiny(tiny_causal_lm("llama"), tmp_path / "base")
    tiny_tokenizer(base)
    saving = {"save_strategy": "steps", "save_steps": 2}
    run(base, tmp_path / "cut", ("model.layers.1.*",), steps=2, **saving)
    halfway = AutoModelForCausalLM.from_pretrained(tmp_path / "cut" / "checkpoint-2")
    assert np.abs(logits(halfway) - logits(AutoModelForCausalLM.from_pretrained(base))).max() > 0
    _, resumed = run(base, tmp_path / "cut", ("model.layers.1.*",), steps=4, **saving)
    _, straight = run(base, tmp_path / "whole", ("model.layers.1.*",), steps=4, **saving)
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), straight.state_dict().values(), strict=True)
    )


def test_patterns_that_match_nothing(tmp_path):
    base = save_tiny(tiny_causal_lm("llama"), tmp_path / "base")
    tiny_tokenizer(base)
    with pytest.raises(OptionError, match=r"no parameter is called 'model.layer\.1\.\*'"):
        run(base, tmp_path / "out", ("model.layer.1.*",))


def test_frozen_weights_are_streamed(tmp_path):
    """Writing takes the memory of the trained tensors, however large the others are."""
    big = torch.arange(16 << 20, dtype=torch.float32)  # 64 MiB
    save_file({"big": big, "small": torch.ones(4), "also": torch.ones(2)}, tmp_path / "base.safetensors")
    find = lambda workspace: read_header(tmp_path / "base.safetensors")
    tracemalloc.start()
    write_model({"small": np.full(4, 2, np.float32)}, tmp_path / "new.safetensors", BaseFiles(find, {"also": "small"}))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    found = load_file(tmp_path / "new.safetensors")
    assert set(found) == {"big", "small"}  # "also" shares the trained tensor
    assert torch.equal(found["big"], big)
    assert torch.equal(found["small"], torch.full((4,), 2.0))

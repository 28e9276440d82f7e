"""Variants of adapters through the whole path: trained, read by PEFT, generated with, merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from step_models import base_model, counted, step_gradients, torch_gradients, torch_logprobs
from tiny_models import greedy_reference, save_tiny, tiny_causal_lm, tiny_tokenizer
from transformers import AutoModelForCausalLM

from QEfficient import QEFFAutoPeftModelForCausalLM
from QEfficient.errors import ModelLoadError, OptionError, UnsupportedModelError
from QEfficient.finetune import QEffConfig, QEfficient, QEffModelManager, QEffTrainingArgs
from QEfficient.finetune.merge import merge_adapter
from QEfficient.finetune.presets import fitted

ROWS = [{"prompt": f"{word} is", "completion": f" {word[::-1]}"} for word in ("one", "two", "three", "four", "five")]
#: The tiny tokenizer's ids of "t" and "is".
TOKENS = [87, 115]

VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora and tokens": {
        "r": 4, "lora_alpha": 16, "use_dora": True, "target_modules": ["k_proj", "up_proj"],
        "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS},
    },
    "ia3": {"peft_type": "IA3"},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("variants") / "base"
    # In 16 bits, which are computed with in 32.
    return tiny_tokenizer(save_tiny(tiny_causal_lm("llama", num_hidden_layers=1), place, dtype=torch.float16))


def arguments(output: Path, **more: Any) -> QEffTrainingArgs:
    return QEffTrainingArgs(
        output, max_steps=3, batch_size=2, report_to="none", disable_tqdm=True, plot=False,
        **{"save_strategy": "no", "lr_scheduler_type": "constant", "learning_rate": 0.1, **more},
    )  # fmt: skip


def configuration(base: Path, lora: Any) -> QEffConfig:
    return QEffConfig(str(base), ROWS, train_frac=1.0, max_ctx_len=32, lora_config=lora)


def logits(model: Any, batch: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"][:1]).logits.numpy()


@pytest.mark.parametrize(
    "name", [pytest.param("rslora", marks=pytest.mark.sweep), *(name for name in VARIANTS if name != "rslora")]
)
def test_from_training_to_merging(name: str, base: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", configuration(base, VARIANTS[name])
    qe = QEfficient(config, arguments(out, learning_rate=0.5 if name == "ia3" else 0.1))
    qe.refine(say=lambda line: None, load=False)
    assert qe.proof is not None
    assert qe.proof.passed

    # PEFT reads it, and at the trained point both have the same loss and gradients.
    fresh: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    read: Any = PeftModel.from_pretrained(fresh, str(out), is_trainable=True).eval()
    assert qe.trainer is not None
    loaded = next(iter(qe.trainer.get_train_dataloader()))
    batch = {name: loaded[name] for name in ("input_ids", "attention_mask", "labels")}
    found, mine = step_gradients(qe.trainer._step, batch)
    wanted = -torch_logprobs(read, batch).sum() / counted(batch)
    theirs = torch_gradients(read, wanted)
    assert found == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert mine.keys() == theirs.keys()
    for tensor, gradient in theirs.items():
        assert np.abs(gradient).max() > 1e-4, tensor  # the adapter is past its start, where some are 0
        np.testing.assert_allclose(mine[tensor], gradient, rtol=1e-4, atol=1e-6, err_msg=tensor)

    # It generates what PEFT generates, which is not what the base does.
    assert qe.data_manager is not None
    tokenizer, prompt = qe.data_manager.tokenizer, qe.data_manager.prompt_ids("one is")
    tokens = greedy_reference(read, prompt, 6)[0]
    text = qe.generate("one is", max_new_tokens=6, eos_token_id=None)
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert tokens != greedy_reference(AutoModelForCausalLM.from_pretrained(base).eval(), prompt, 6)[0]

    # Merging is PEFT's merging.
    assert merge_adapter(out, tmp_path / "merged", tolerance=2e-5).dtype == "float32"  # 16 bits would not be exact
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(logits(merged, batch), logits(read.merge_and_unload(), batch), atol=1e-4)

    if name == "rslora":
        assert read.peft_config["default"].use_rslora
        return
    with pytest.raises(OptionError, match="trains outside of LoRA"):  # a scaling of 0 would leave part of it
        qe.trainer._step.logprobs(batch, adapter=False)
    with pytest.raises(UnsupportedModelError, match="merge") as refused:
        QEFFAutoPeftModelForCausalLM.from_pretrained(out)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("start", [True, False, "gaussian"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_starts_as_pefts(family: str, start: Any, tmp_path: Path) -> None:
    """Magnitudes are norms of weights that are never loaded as a model, adapter included; GPT-2's lie transposed."""
    place = tiny_tokenizer(save_tiny(base_model(family), tmp_path / "base", dtype=torch.bfloat16))
    targets = ["c_attn", "wte"] if family == "gpt2" else ["q_proj", "down_proj", "embed_tokens"]
    config = configuration(place, {"r": 4, "use_dora": True, "target_modules": targets, "init_lora_weights": start})
    manager = QEffModelManager(config, arguments(tmp_path / "out"))
    mine = manager.init_model().trained
    reference: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    theirs = dict(get_peft_model(reference, manager.peft_config()).named_parameters())
    modules = dict(reference.named_modules())
    magnitudes = {name: found for name, found in mine.items() if "lora_magnitude_vector" in name}
    for name in mine.keys() - magnitudes.keys():
        theirs[name].data.copy_(mine[name])  # the same A and B, which are drawn at random
    for name, found in magnitudes.items():
        layer: Any = modules[name.partition(".lora_magnitude_vector")[0].removeprefix("base_model.model.")]
        weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
        axis = 1 if isinstance(layer.get_base_layer(), torch.nn.Linear) else 0
        torch.testing.assert_close(found, weight.norm(dim=axis))
    assert len(magnitudes) == 2 * (len(targets) - 1) + 1


def test_what_lora_config_chooses_in_peft(base: Path, tmp_path: Path) -> None:
    """Numbers of layers, modules left out, modules trained whole: the same tensors train as in PEFT."""
    place = tiny_tokenizer(save_tiny(base_model("llama"), tmp_path / "base"))
    chosen = [
        {"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]},
        {"layers_to_transform": 0, "layers_pattern": "layers", "target_modules": ["o_proj"]},
        {"exclude_modules": ["v_proj", "lm_head"], "target_modules": "all-linear"},
        {"modules_to_save": ["norm", "embed_tokens"], "target_modules": ["q_proj"]},
        {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "target_modules": ["q_proj"]},
    ]
    found = []
    for options in chosen:
        manager = QEffModelManager(configuration(place, options), arguments(tmp_path / "out"))
        model = manager.init_model()
        reference: Any = get_peft_model(base_model("llama"), manager.peft_config())
        expected = {n: p for n, p in reference.named_parameters() if p.requires_grad}
        assert {n: p.shape for n, p in model.trained.items()} == {n: p.shape for n, p in expected.items()}
        for name, parameter in model.trained.items():
            if ".lora_A." not in name:  # drawn at random
                torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)
        found.append(len(model.trained))
    assert found == [4, 2, 24, 10, 3, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peft_type": "IA3", "target_modules": ["q_prj"], "feedforward_modules": []}, "Did you mean 'q_proj'"),
        ({"modules_to_save": ["lm_heat"]}, "modules_to_save has 'lm_heat'.* Did you mean 'lm_head'"),
        ({"trainable_token_indices": [5, 128]}, "trainable_token_indices has 128, and the model has 128 tokens"),
        ({"trainable_token_indices": {"embed": [5]}}, "has 'embed', and LlamaForCausalLM has no such module"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "does not fit|match nothing"),
        ({"init_lora_weights": "pissa"}, "needs the base weights"),
    ],
)
def test_what_does_not_fit_the_model(options: dict[str, Any], words: str, base: Path, tmp_path: Path) -> None:
    manager = QEffModelManager(configuration(base, options), arguments(tmp_path / "out"))
    with pytest.raises(OptionError, match=words) as error:
        manager.init_model()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        peft.VeraConfig(), peft.LoHaConfig(), peft.LoKrConfig(), peft.AdaLoraConfig(total_step=10), peft.OFTConfig(),
        peft.PrefixTuningConfig(num_virtual_tokens=4), peft.PromptTuningConfig(num_virtual_tokens=4),
        peft.LNTuningConfig(),
    ],
    ids=lambda config: config.peft_type.value,
)  # fmt: skip
def test_other_kinds_of_adapters_are_refused(config: Any, tmp_path: Path) -> None:
    kind = config.peft_type.value
    words = f"peft_type='{kind}', and only LoRA .also with use_rslora or use_dora. and IA3 can be trained"
    config.save_pretrained(tmp_path)
    for given in (config, {"peft_type": kind}, tmp_path / "adapter_config.json"):
        with pytest.raises(OptionError, match=words):
            QEffConfig("m", "d.jsonl", lora_config=given)


def test_a_quantized_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "quantized")
    settings = json.loads((copy / "config.json").read_text())
    for method in ("gptq", "awq", "bitsandbytes", "fp8"):
        entry = {"quantization_config": {"quant_method": method}}
        (copy / "config.json").write_text(json.dumps(settings | entry))
        with pytest.raises(ModelLoadError, match=rf"quantized \({method}\).*use the 16- or 32-bit checkpoint"):
            QEfficient(configuration(copy, {"r": 4}), arguments(tmp_path / "out")).refine(say=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_words_of_other_tools_for_precision_and_place() -> None:
    assert QEffTrainingArgs("out", load_in_4bit=True).base_weights == "int4"
    assert QEffTrainingArgs("out", load_in_8bit=True, load_in_4bit=False).base_weights == "int8"
    assert QEffTrainingArgs("out", torch_dtype="float32", dtype="auto", load_in_8bit=None).base_weights == "fp32"
    assert (
        QEffTrainingArgs("out", device="cpu").target == QEffTrainingArgs("out", target_device="host").target == "host"
    )


def test_a_preset_leaves_doras_base_weights() -> None:
    tried: list[Any] = []

    def measure(options: Any) -> Any:
        tried.append(options.get("base_weights", "fp32"))
        return SimpleNamespace(peak_mb=100.0, step_mb=50.0)

    for use_dora, expected in ((True, {"fp32"}), (False, {"fp32", "int8", "int4"})):
        tried.clear()
        with pytest.raises(OptionError, match="no batch of this run fits"):
            fitted({"model_id": "m", "dataset_name": "d", "lora_config": {"use_dora": use_dora}}, 10.0, measure)
        assert set(tried) == expected


def test_pefts_own_ia3_objects_and_files(tmp_path: Path) -> None:
    wanted = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    wanted.save_pretrained(tmp_path)
    for given in (wanted, tmp_path / "adapter_config.json", json.loads((tmp_path / "adapter_config.json").read_text())):
        options = QEffConfig("m", "d.jsonl", lora_config=given).peft_options()
        assert options is not None
        assert options.pop("peft_type") == "IA3"
        assert peft.IA3Config(**options).to_dict() == wanted.to_dict()


def test_dora_and_quantized_weights_contradict(base: Path, tmp_path: Path) -> None:
    """The weights whose norms are needed could not be quantized, so the option would do next to nothing."""
    args = arguments(tmp_path / "out", base_weights="int4")
    with pytest.raises(OptionError, match="base_weights='int4' and use_dora contradict"):
        QEfficient(configuration(base, {"use_dora": True}), args).refine(say=lambda line: None)
    assert not (tmp_path / "out").exists()

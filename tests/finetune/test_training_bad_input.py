"""What cannot be trained is refused in one sentence, before the first step, and nothing is skipped silently."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from step_models import base_model, compiled, step_gradients, token_batch, with_lora
from tiny_models import tiny_causal_lm, tiny_encoder
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from QEfficient.errors import (
    ExportError,
    InputError,
    ModelLoadError,
    OptionError,
    PackageError,
    QEfficientError,
    ShapeError,
    TrainingError,
    UnsupportedModelError,
)
from QEfficient.finetune import CompiledStep, QEffConfig, QEfficient, QEffTrainingArgs, StepOptions, StepSession

ROWS = [{"prompt": f"a b {n}:", "completion": "c d"} for n in range(12)]


def run(model: Path, output: Path, data: Any = ROWS, **options: Any) -> QEfficient:
    """Two steps on the data; options of both kinds."""
    how = {"batch_size", "learning_rate", "validate", "target", "seed", "max_steps", "base_weights"} & options.keys()
    args = {"max_steps": 2, "batch_size": 4, "num_cores": 1, **{name: options.pop(name) for name in how}}
    settings = {"max_ctx_len": 64, "lora_config": {"r": 4, "target_modules": "all-linear"}, **options}
    qe = QEfficient(QEffConfig(str(model), data, **settings), QEffTrainingArgs(output, **args))
    qe.refine(load=False, say=lambda message: None)
    return qe


def refused(model: Path, output: Path, words: str, kind: type[Exception] = OptionError, **options: Any) -> None:
    """The error has one line; the output directory has neither a checkpoint nor a compiled step."""
    with pytest.raises(kind, match=words) as error:
        run(model, output, **options)
    assert "\n" not in str(error.value)
    assert not list(output.glob("checkpoint-*"))
    assert not (output / "qpc").exists()
    assert not (output / "adapter_model.safetensors").exists()


@pytest.fixture
def changed(tiny_checkpoint: Path, tmp_path: Path) -> Callable[[str, dict[str, Any]], Path]:
    """A copy of the checkpoint with entries of one of its JSON files changed; None removes an entry."""

    def change(name: str, entries: dict[str, Any]) -> Path:
        place = tmp_path / "changed"
        shutil.copytree(tiny_checkpoint, place, dirs_exist_ok=True)
        body = json.loads((place / name).read_text()) | entries
        (place / name).write_text(json.dumps({key: value for key, value in body.items() if value is not None}))
        return place

    return change


# ---------------------------------------------------------------------------------- data


def test_all_labels_masked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, n + 8], "labels": [-100] * 4} for n in range(8)]
    refused(tiny_checkpoint, tmp_path / "out", "trained", InputError, data=rows)


def test_some_rows_without_labels_are_counted_not_hidden(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """They are left out, and the report says how many and why."""
    rows = [{"input_ids": [5, 6, 7, n + 8], "labels": [-100, 6, 7, n + 8]} for n in range(8)]
    rows[2]["labels"] = [-100] * 4
    run(tiny_checkpoint, tmp_path / "out", data=rows, train_frac=1.0, validate=False)
    train = json.loads((tmp_path / "out" / "data_report.json").read_text())["splits"]["train"]
    assert (train["rows_in"], train["rows"], sum(train["dropped"].values())) == (8, 7, 1)


def test_a_tokenizer_without_an_end_token(changed: Any, tmp_path: Path) -> None:
    model = changed("tokenizer_config.json", {"eos_token": None})
    refused(model, tmp_path / "out", "end")


def test_a_tokenizer_without_a_padding_token(changed: Any, tmp_path: Path) -> None:
    """That is no error: another token pads, which is said, and what it is changes no number."""
    model = changed("tokenizer_config.json", {"pad_token": None})
    run(model, tmp_path / "a")
    notes = json.loads((tmp_path / "a" / "data_report.json").read_text())["notes"]
    assert any("no padding token, so its eos_token pads" in note for note in notes)
    run(changed("tokenizer_config.json", {"pad_token": "<pad>"}), tmp_path / "b")
    tuned = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b")]
    assert all(torch.equal(tuned[0][name], tensor) for name, tensor in tuned[1].items())


def test_a_context_shorter_than_the_longest_answer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "a", "completion": "word " * 30}]
    refused(tiny_checkpoint, tmp_path / "out", "max_ctx_len", InputError, data=rows, max_ctx_len=32)


def test_a_context_longer_than_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    refused(tiny_checkpoint, tmp_path / "out", "max_ctx_len=129 is more than the 128 positions", max_ctx_len=129)


def test_no_data_and_no_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    refused(tiny_checkpoint, tmp_path / "out", "row", InputError, data=[])
    refused(tmp_path / "missing", tmp_path / "out", "missing", ModelLoadError)


# ---------------------------------------------------------------------------------- what trains


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_prj"], r"target_modules \['q_prj'\] match nothing in LlamaForCausalLM.*'q_proj'.* Did you mean 'q_proj'"),
        (["v_proj", "gate"], r"target_modules \['gate'\] match nothing .* Did you mean 'gate_proj'"),
        ("no_such_suffix$", "match nothing in LlamaForCausalLM"),
    ],
)
def test_lora_names_that_match_nothing(tiny_checkpoint: Path, tmp_path: Path, targets: Any, words: str) -> None:
    refused(tiny_checkpoint, tmp_path / "out", words, lora_config={"r": 4, "target_modules": targets})


def test_patterns_that_match_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = {"lora_config": None, "trainable": ("model.norm.weigth",)}
    refused(tiny_checkpoint, tmp_path / "out", r"no parameter is called 'model\.norm\.weigth'", **options)


def test_lora_that_needs_the_base_weights_to_start(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    refused(tiny_checkpoint, tmp_path / "out", "init_lora_weights='pissa'", lora_config=lora)


def test_dropout_is_recorded_said_and_off(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.5}
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.5 is recorded, and training uses 0"):
        run(tiny_checkpoint, tmp_path / "a", lora_config=lora)
    notes = json.loads((tmp_path / "a" / "data_report.json").read_text())["notes"]
    assert any("lora_dropout=0.5" in note for note in notes)
    run(tiny_checkpoint, tmp_path / "b")
    tuned = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b")]
    assert all(torch.equal(tuned[0][name], tensor) for name, tensor in tuned[1].items())


def test_the_models_own_dropout_is_off() -> None:
    """GPT-2 has dropout of 0.1 in three places: the step is that of the model in evaluation mode."""
    step = compiled(with_lora("gpt2").train())
    batch = token_batch([9, 6])
    first, gradients = step_gradients(step, batch)
    assert first == step_gradients(step, batch)[0]
    still = compiled(with_lora("gpt2").eval())
    assert still.packages.train == step.packages.train
    assert any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: torch.nn.Linear(3, 3), "a transformers or PEFT model, got Linear"),
        (lambda: None, "a transformers or PEFT model, got NoneType"),
        (lambda: tiny_encoder("bert").requires_grad_(True), "BertModel has no language-model head"),
        (
            lambda: AutoModelForSeq2SeqLM.from_config(
                AutoConfig.for_model(
                    "t5", vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                    decoder_start_token_id=0,
                )
            ),
            "encoder-decoder",
        ),
        (
            lambda: get_peft_model(
                base_model("llama"), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
            ),
            "PROMPT_TUNING cannot train",
        ),
    ],
    ids=["linear", "none", "no head", "encoder-decoder", "prompt tuning"],
)  # fmt: skip
def test_a_model_that_cannot_be_trained(model: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as error:
        CompiledStep.from_model(model(), progress=False)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- operators


class Odd(torch.nn.Module):
    """An activation whose backward pass has no form in ONNX."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.lgamma(x * x + 1)


def test_an_operator_without_a_form_in_onnx() -> None:
    model = base_model("llama", seed=1)
    model.model.layers[0].mlp.act_fn = Odd()
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ExportError, match=r"operator aten::lgamma\.default, which has no rule") as error:
        CompiledStep.from_model(tuned, progress=False)
    assert "\n" not in str(error.value)


def test_a_convolution_is_named() -> None:
    """LFM2 mixes tokens with convolutions."""
    model = get_peft_model(tiny_causal_lm("lfm2"), LoraConfig(r=2, target_modules=["in_proj"]))
    with pytest.raises(ExportError, match=r"aten::convolution\.default"):
        CompiledStep.from_model(model, progress=False)


def test_a_model_with_torchs_own_attention() -> None:
    """Asked for scaled_dot_product_attention, a model still trains: the step brings its attention."""
    model = tiny_causal_lm("llama", num_hidden_layers=2, attn_implementation="sdpa").requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    eager = base_model("llama").requires_grad_(False)
    eager.model.norm.weight.requires_grad_(True)
    batch = token_batch([9, 6])
    losses = [step_gradients(compiled(each), batch)[0] for each in (model, eager)]
    assert losses[0] == losses[1]


def test_a_model_without_a_tokenizer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_checkpoint, tmp_path / "bare")
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelLoadError, match=r"bare has no tokenizer files: copy tokenizer\.json .* tokenizer_name\.$"):
        run(model, tmp_path / "out")


def test_an_adapter_in_place_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="is an adapter, not a whole model: run `qefficient merge"):
        run(tmp_path, tmp_path / "out")


# ---------------------------------------------------------------------------------- while it runs


def test_weights_that_are_no_numbers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The proof says so before training; without it, the first loss does. Nothing is saved in either case."""
    model = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="differs from torch autograd"):
        run(model, tmp_path / "a")
    with pytest.raises(TrainingError, match="nan before the first optimizer step: the base weights"):
        run(model, tmp_path / "b", validate=False)
    for name in ("a", "b"):
        assert not list((tmp_path / name).glob("checkpoint-*"))
        assert not (tmp_path / name / "adapter_model.safetensors").exists()


_SMALL_MEMORY = """
    import resource, sys
    sys.path[:0] = sys.argv[1:3]
    import torch
    torch.set_num_threads(1)
    from step_models import compiled, with_lora, token_batch, step_gradients
    from QEfficient.errors import TrainingError
    step = compiled(with_lora("llama"))
    small = token_batch([9, 6])
    before = step_gradients(step, small)[0]
    used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
    try:
        step(**token_batch([128] * 600))
    except TrainingError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(step_gradients(step, small)[0] == before)
"""


def test_out_of_memory() -> None:
    """A process with little memory: a sentence that says what to lower, and the step stays usable."""
    compiled(with_lora("llama")).close()  # so that the process below finds the package
    here = Path(__file__).parent
    command = [sys.executable, "-c", textwrap.dedent(_SMALL_MEMORY), str(here), str(here.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    said, usable = done.stdout.strip().splitlines()
    assert said.startswith("there is not enough memory for a step of 600 rows of 128 tokens: lower batch_size")
    assert usable == "True"


def test_a_batch_larger_than_the_package() -> None:
    step = compiled(with_lora("llama"), batch_size=2, seq_len=16)
    assert step_gradients(step, token_batch([16, 9]))[0] > 0
    with pytest.raises(ShapeError, match="batch_size=3 does not fit"):
        step(**token_batch([4, 4, 4]))
    with pytest.raises(ShapeError, match="seq_len=17 does not fit"):
        step(**token_batch([17]))


def test_a_closed_step() -> None:
    step = compiled(with_lora("llama"))
    step.close()
    with pytest.raises(QEfficientError, match="closed"):
        step(**token_batch([4, 4]))


def test_parameters_of_another_dtype() -> None:
    """A step trains in float32; a parameter cast to something else is named, not read as garbage."""
    step = compiled(with_lora("llama"))
    step.half()
    with pytest.raises(InputError, match=r"parameter .*lora_A.* must be float32"):
        step(**token_batch([4, 4]))


# ---------------------------------------------------------------------------------- options and packages


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_weights": "int5"}, "base_weights"),
        ({"batch_size": 0}, "batch_size"),
        ({"seq_len": 2.5}, "seq_len"),
        ({"teacher_top": -1}, "teacher_top"),
        ({"loss_chunks": 0}, "loss_chunks"),
    ],
)
def test_step_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        StepOptions(**options)


def test_an_unknown_target() -> None:
    with pytest.raises(OptionError, match="Did you mean 'host'"):
        CompiledStep.from_model(with_lora("llama"), target="hots", progress=False)


def test_what_is_no_training_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="not a directory"):
        StepSession(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PackageError):
        StepSession(tmp_path / "empty")


def test_a_tampered_package(tmp_path: Path) -> None:
    """Opened by hand, a package's files are compared with their digests."""
    source = compiled(with_lora("llama")).packages.train
    place = shutil.copytree(source, tmp_path / "package")
    program = place / "program.onnx"
    program.chmod(0o644)
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(bytes(content))
    with pytest.raises(PackageError, match=r"program\.onnx"):
        StepSession(place)


def test_the_facade_is_given_something_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = QEffConfig(str(tiny_checkpoint), ROWS, max_ctx_len=64)
    with pytest.raises(OptionError, match="takes a QEffConfig first, got str"):
        QEfficient(str(tiny_checkpoint))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="args must be QEffTrainingArgs, got dict"):
        QEfficient(config, {"output_dir": "x"})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="needs QEffTrainingArgs"):
        QEfficient(config).refine()
    with pytest.raises(OptionError, match="nothing was tuned yet"):
        QEfficient(config).load_tuned()
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OptionError, match="is a file: choose a directory"):
        QEfficient(config, QEffTrainingArgs(file)).refine()


def test_prompts_that_leave_no_room(tiny_checkpoint: Path) -> None:
    qe = QEfficient(QEffConfig(str(tiny_checkpoint), ROWS, max_ctx_len=64))
    with pytest.raises(InputError, match="prompt is empty"):
        qe.generate("")
    with pytest.raises(InputError, match="max_length=3 leaves no room"):
        qe.generate("a b c d e f", max_length=3)

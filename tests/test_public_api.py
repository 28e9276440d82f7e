"""What `import QEfficient` offers, what it costs, and the module functions."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import greedy_reference, sample_prompt, save_tiny, tiny_causal_lm, tiny_encoder

import QEfficient
from QEfficient.errors import OptionError, UnsupportedModelError

HEAVY = ("torch", "transformers", "onnxruntime", "onnx_ir", "onnxscript", "numpy", "rich", "typer")


def test_import_loads_nothing_heavy():
    code = f"import sys, QEfficient; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [n for n in QEfficient.__all__ if n != "__version__"])
def test_every_public_name_resolves_and_stays_callable(name):
    # `export` once named both a function and a sub-package: whichever was imported last would win.
    import QEfficient.exporter.program

    value = getattr(QEfficient, name)
    assert callable(value)
    assert getattr(QEfficient, name) is value
    assert name in dir(QEfficient)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'QEFFAutoModelForEverything'"):
        _ = QEfficient.QEFFAutoModelForEverything


def test_module_functions_from_object_to_text(tmp_path):
    model = tiny_causal_lm("qwen2")
    prompt = sample_prompt(9, 3)
    onnx_path = QEfficient.export(model, tmp_path / "export", cache_home_dir=tmp_path / "home")
    assert onnx_path == tmp_path / "export" / "model.onnx"
    package = QEfficient.compile(onnx_path, tmp_path / "package", ctx_len=32, cache_home_dir=tmp_path / "home")
    with QEfficient.load(package) as loaded:
        ids = loaded.generate(input_ids=np.array([prompt]), max_new_tokens=10)
    assert ids[0, len(prompt) :].tolist() == greedy_reference(model, prompt, 10)[0]


def test_compile_takes_only_our_exports(tmp_path):
    stray = tmp_path / "model.onnx"
    stray.write_bytes(b"not a model")
    with pytest.raises(OptionError, match="was not made by export"):
        QEfficient.compile(stray)
    with pytest.raises(OptionError, match="does not exist"):
        QEfficient.compile(tmp_path / "nothing.onnx")


def test_transform_gives_the_same_numbers_and_leaves_the_model_alone():
    model = tiny_encoder("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    ids = torch.tensor([sample_prompt(8, 0)])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    found = QEfficient.transform(model)(ids, mask)
    assert torch.allclose(found, expected, atol=1e-5)
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_task_is_told_from_the_architecture(tmp_path):
    from QEfficient.api import wrap

    checkpoint = save_tiny(tiny_encoder("bert"), tmp_path / "bert")
    assert type(wrap(checkpoint)).__name__ == "QEFFAutoModel"
    assert type(wrap(tiny_causal_lm("gpt2"))).__name__ == "QEFFAutoModelForCausalLM"
    with pytest.raises(UnsupportedModelError, match="no task 'translation'"):
        wrap(checkpoint, task="translation")

"""Weights as kernels read them, kept in the package: they are what runs here, and what does not fit is not used."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_models import sample_prompt, tiny_causal_lm, tiny_encoder

from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM
from QEfficient.engine.package import open_package
from QEfficient.errors import OptionError, PackageError

SHAPE = {"ctx_len": 48, "prefill_seq_len": 8, "progress": False}


@pytest.fixture(scope="module")
def model() -> QEFFAutoModelForCausalLM:
    return QEFFAutoModelForCausalLM(tiny_causal_lm("llama_tied", hidden_size=96, intermediate_size=160))


@pytest.fixture(scope="module", params=["int4", "int8"])
def weights(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def packed(model, weights) -> Path:
    return model.compile(**SHAPE, weights=weights)


@pytest.fixture(scope="module")
def plain(model, weights) -> Path:
    return model.compile(**SHAPE, weights=weights, prepack=False)


@pytest.fixture
def copied(packed, tmp_path) -> Path:
    """A package whose files may be changed."""
    return Path(shutil.copytree(packed, tmp_path / "package"))


def entries(package: Path) -> Iterator[tuple[onnx.TensorProto, onnx.StringStringEntryProto]]:
    for tensor in onnx.load(package / "program.onnx", load_external_data=False).graph.initializer:
        yield from ((tensor, entry) for entry in tensor.external_data if entry.key.startswith("prepacked_"))


def logits(package: Path) -> np.ndarray:
    """float32 [20, vocab]: a prompt, token by token."""
    with open_package(package, verify=False) as opened:
        opened.session.begin({"batch_size": 1, "ctx_len": 48})
        return np.stack(
            [
                opened.session.run({"input_ids": np.array([[t]]), "position_ids": np.array([[at]])}, "Decode")[
                    "logits"
                ][0, 0].copy()
                for at, t in enumerate(sample_prompt(20, 3))
            ]
        )


def test_every_matrix_is_kept_both_ways_and_no_byte_lies_twice(packed, plain):
    found = list(entries(packed))
    assert len({tensor.name for tensor, _ in found if tensor.name.endswith(".quantized")}) >= 9
    assert not list(entries(plain))
    assert not (plain / "weights/prepacked.bin").exists()
    size = (packed / "weights/prepacked.bin").stat().st_size
    taken = []
    for tensor, entry in found:
        own = {e.key: e.value for e in tensor.external_data}
        assert own["location"] == "weights/prepacked.bin"
        taken.append((int(own["offset"]), int(own["length"])))
        for piece in entry.value.split("|")[1:]:
            offset, length, _ = piece.split(";")
            taken.append((int(offset), int(length)))
    taken = sorted(set(taken))
    assert all(offset % 64 == 0 for offset, _ in taken)
    assert all(a + length <= b for (a, length), (b, _) in itertools.pairwise(taken))
    assert sum(taken[-1]) <= size
    # Originals are in this file instead of the others, not besides.
    names = [path.name for path in (packed / "weights").iterdir()]
    rest = sum((packed / "weights" / name).stat().st_size for name in names if name != "prepacked.bin")
    assert rest < sum(path.stat().st_size for path in (plain / "weights").iterdir())
    body = json.loads((packed / "manifest.json").read_text())
    assert "weights/prepacked.bin" in body["files"]
    assert body["options"]["prepack"] is True


def test_the_answers_are_those_of_the_package_without(packed, plain):
    np.testing.assert_array_equal(logits(packed), logits(plain))
    prompt = np.array([sample_prompt(30, 5)])
    with open_package(packed) as one, open_package(plain) as other:
        tokens = [package.generate(input_ids=prompt, max_new_tokens=12).tolist() for package in (one, other)]
    assert tokens[0] == tokens[1]


def test_the_kept_layout_is_what_runs(copied, packed):
    """Changed bytes change the answer: the layout is read from the file, not made again."""
    with open(copied / "weights/prepacked.bin", "r+b") as file:
        for _, entry in entries(copied):
            offset, length, _ = entry.value.split("|")[1].split(";")
            file.seek(int(offset))
            file.write(bytes(int(length)))
    assert np.abs(logits(copied) - logits(packed)).max() > 1e-3


def test_a_layout_of_another_processor_is_not_used(copied, packed):
    """Its key is another one: kernels then arrange the weights themselves, and the answer is the same."""
    path = copied / "program.onnx"
    proto = onnx.load(path, load_external_data=False)
    with open(copied / "weights/prepacked.bin", "r+b") as file:
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if not entry.key.startswith("prepacked_"):
                    continue
                key, place = entry.value.split("|", 1)
                offset, length, _ = place.split("|")[0].split(";")
                file.seek(int(offset))
                file.write(bytes(int(length)))
                entry.value = f"{key[:-1]}{(int(key[-1]) + 1) % 10}|{place}"
    onnx.save(proto, path)
    assert path.stat().st_size == (packed / "program.onnx").stat().st_size
    np.testing.assert_array_equal(logits(copied), logits(packed))


def test_a_changed_layout_is_noticed(copied):
    with open(copied / "weights/prepacked.bin", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(PackageError, match=r"prepacked\.bin"):
        open_package(copied)


def test_float_packages_have_one_form(model):
    assert model.compile(**SHAPE) == model.compile(**SHAPE, prepack=False)
    with pytest.raises(OptionError, match="prepack must be True or False"):
        model.compile(**SHAPE, prepack="yes")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_encoders(kind):
    encoder = QEFFAutoModel(tiny_encoder("bert", hidden_size=96), pooling="mean")
    ids = np.random.default_rng(0).integers(3, 100, (3, 11))
    outputs = []
    for prepack in (True, False):
        with open_package(encoder.compile(weights=kind, prepack=prepack, progress=False)) as package:
            outputs.append(package.generate(input_ids=ids)["output"])
    np.testing.assert_array_equal(*outputs)

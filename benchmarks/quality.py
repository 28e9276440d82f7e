"""What a precision costs in quality: perplexity, divergence from float32 and agreement of the demo model, per engine.

The text is given, not generated. It is cut into windows; the first half of each goes in as a prompt does, the second
half token by token, and only what is said about the second half counts. So both ways of running a package take part:
the state comes from the prompt's program, the scores from the decode step's.

    python benchmarks/quality.py                                  this library, every precision
    python benchmarks/quality.py --peer llama=path/to/python      llama.cpp as well
    python benchmarks/quality.py --text test.jsonl                on a text of your own
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from shapes import DEMO_MODEL, ROOT, demo_shape

from QEfficient.evaluate.perplexity import log_softmax

if TYPE_CHECKING:
    from peers.contenders import Contender
    from peers.prepare import Run

#: Word problems the demo model has not seen: made by ``examples/sample_data.py``, in the form it was trained on.
SAMPLES = ROOT / "QEfficient" / "finetune" / "samples" / "arithmetic.jsonl"
WINDOW, PROMPT = 256, 128


def perplexity(logits: np.ndarray, targets: np.ndarray) -> float:
    """exp of the mean negative log-likelihood: logits [..., positions, vocabulary], targets int [..., positions]."""
    chosen = np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)
    return float(np.exp(-chosen.mean()))


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of ``other`` from ``reference``, in nats; both [..., positions, vocabulary]."""
    expected, found = log_softmax(reference), log_softmax(other)
    return float((np.exp(expected) * (expected - found)).sum(axis=-1).mean())


def agreement(reference: np.ndarray, other: np.ndarray) -> float:
    """Share of positions with the same most likely token."""
    return float((reference.argmax(axis=-1) == other.argmax(axis=-1)).mean())


def cosine(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine similarity of the rows of two matrices."""
    lengths = np.linalg.norm(reference, axis=1) * np.linalg.norm(other, axis=1)
    return (reference * other).sum(axis=1) / lengths


def windows(file: Path | None, count: int) -> list[list[int]]:
    """Windows of WINDOW + 1 tokens of the demo model's own tokenizer: each token but the last predicts the next.

    Args:
        file: ``.jsonl`` with question and answer, or plain text; None takes the bundled word problems.

    Raises:
        ValueError: the text is too short.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    ids = tokenizer.encode(text_of(file or SAMPLES)).ids
    found = [ids[start : start + WINDOW + 1] for start in range(0, len(ids) - WINDOW, WINDOW)]
    if len(found) < count:
        raise ValueError(f"{file or SAMPLES} has text for {len(found)} windows of {WINDOW} tokens, {count} are needed")
    return found[:count]


def text_of(file: Path) -> str:
    """Plain text as it is; of a ``.jsonl`` questions and answers in the form the demo model was trained on."""
    raw = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        return raw
    rows = [json.loads(line) for line in raw.splitlines() if line.strip()]
    return "".join(f"Question: {entry['question']}\nAnswer: {entry['answer']}<|endoftext|>" for entry in rows)


def measure_quality(run: Run, contenders: Sequence[Contender], texts: Sequence[list[int]]) -> list[dict[str, Any]]:
    """A row per contender, and one of ours in float32, asked for or not: what the others are compared with."""
    from peers.contenders import GENERATORS
    from peers.prepare import prepare, row
    from peers.process import PeerError

    shape, rows = demo_shape(), []
    targets = np.array([window[PROMPT + 1 :] for window in texts])
    reference: np.ndarray | None = None
    for contender in dict.fromkeys([GENERATORS[0], *contenders]):
        try:
            prepared = prepare(run, contender, DEMO_MODEL, shape.name, shape.context)
            run.say(f"quality: {contender.title}")
            logits = _logits(run, prepared, texts)
        except PeerError as error:
            if contender.engine not in run.missing:
                run.say(f"  {contender.title}: {error}")
            rows.append(row(contender, error=str(error)))
            continue
        if reference is None and contender.precision == "fp32":
            reference = logits
        found = {"perplexity": perplexity(logits, targets), "positions": targets.size, "bytes": prepared.bytes}
        if reference is not None:
            found |= {"kl": divergence(reference, logits), "top1": agreement(reference, logits)}
        rows.append(row(contender, **found))
    return rows


def _logits(run: Run, prepared: Any, texts: Sequence[list[int]]) -> np.ndarray:
    from peers.process import Worker

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.npy"
        worker = Worker(run.launch(prepared.contender.engine))
        try:
            worker.ask(do="load", **prepared.setup(run.threads, WINDOW))
            fed = [window[:WINDOW] for window in texts]
            worker.ask(do="logits", windows=fed, prompt=PROMPT, out=str(out))
            found: np.ndarray = np.load(out)
            return found
        finally:
            worker.close()


def main() -> None:
    from performance import add_run_arguments, start_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--text", type=Path, help="text to score: .jsonl with question and answer, or plain text")
    parser.add_argument("--windows", type=int, default=16, help=f"windows of {WINDOW} tokens (default: %(default)s)")
    options = parser.parse_args()
    from peers.contenders import GENERATORS
    from peers.report_quality import quality_table

    run = start_run(parser, options)
    chosen = [c for c in GENERATORS if c.engine in run.versions and c.group in options.classes]
    print("\n".join(quality_table(measure_quality(run, chosen, windows(options.text, options.windows)))))


if __name__ == "__main__":
    main()

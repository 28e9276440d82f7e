"""Compares small random-weight models of many families with Hugging Face and writes the table in docs/models.md.

Each causal model is exported and checked for: one prompt fed in chunks, a ragged padded batch, generation up to the
last slot of the context, and continuous batching with fewer slots than prompts; always greedy tokens against Hugging
Face's ``generate`` on each prompt alone. Encoders: padded batches against each row alone.

    python benchmarks/model_coverage.py --output docs/models.md
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from tiny_models import (
    CAUSAL_TYPES,
    CLASSIFIER_TYPES,
    ENCODER_TYPES,
    EXTRA_CAUSAL_TYPES,
    greedy_reference,
    sample_prompt,
    tiny_causal_lm,
    tiny_classifier,
    tiny_encoder,
)

from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM, QEFFAutoModelForSequenceClassification
from QEfficient.errors import QEfficientError
from QEfficient.onnx_io import load_model

console = Console(stderr=True)
CONTEXT, CHUNK, LENGTHS = 32, 5, (12, 7, 3)


def causal_row(name: str, home: Path) -> dict[str, str]:
    """All checks of one causal model."""
    model = tiny_causal_lm(name)
    prompts = [sample_prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = [greedy_reference(model, prompt, 20)[0] for prompt in prompts]
    longest = greedy_reference(model, prompts[0], CONTEXT - LENGTHS[0] + 1)[0]
    ours = QEFFAutoModelForCausalLM(model, cache_home_dir=home)
    began = time.perf_counter()
    path = ours.export(progress=False)
    seconds = time.perf_counter() - began
    ours.compile(ctx_len=CONTEXT, prefill_seq_len=CHUNK, progress=False)
    width = max(LENGTHS)
    ids, mask = np.zeros((len(prompts), width), np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1

    def rows_equal(model: QEFFAutoModelForCausalLM) -> bool:
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20)
        return all(out[row, width:].tolist() == tokens for row, tokens in enumerate(expected))

    first = np.array([prompts[0]])
    single = ours.generate(input_ids=first, max_new_tokens=20)[0, width:].tolist() == expected[0]
    full = ours.generate(input_ids=first, max_new_tokens=len(longest))[0, width:].tolist() == longest
    batched = QEFFAutoModelForCausalLM(model, cache_home_dir=home)
    batched.compile(ctx_len=CONTEXT + 8, prefill_seq_len=CHUNK, full_batch_size=2, progress=False)
    kinds = {state.kind for state in ours._ready().manifest.states}
    return {
        "model": name,
        "state": "+".join(sorted(kinds)),
        "chunked prompt": verdict(single),
        "ragged batch": verdict(rows_equal(ours)),
        "last slot": verdict(full),
        "continuous batching": verdict(rows_equal(batched)),
        "nodes": str(len(load_model(path).graph)),
        "export": f"{seconds:.0f} s",
    }


def encoder_row(name: str, model: QEFFAutoModel | QEFFAutoModelForSequenceClassification) -> dict[str, str]:
    """Parity of one encoder."""
    report = model.validate()
    worst = max(stage.max_rel for stage in report.stages)
    return {"model": name, "equal to Hugging Face": verdict(report.ok), "largest relative difference": f"{worst:.0e}"}


def verdict(equal: bool) -> str:
    return "equal" if equal else "**differs**"


def markdown(rows: list[dict[str, str]]) -> list[str]:
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return [*lines, *("| " + " | ".join(row[key] for key in keys) + " |" for row in rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the page to this Markdown file")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    causal, encoders, failed = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        for name in [*CAUSAL_TYPES, *EXTRA_CAUSAL_TYPES]:
            try:
                causal.append(causal_row(name, home))
                console.print(causal[-1])
            except QEfficientError as error:
                failed.append(f"- `{name}`: {error}")
        for name in ENCODER_TYPES:
            encoders.append(encoder_row(name, QEFFAutoModel(tiny_encoder(name), cache_home_dir=home)))
        for name in CLASSIFIER_TYPES:
            wrapped = QEFFAutoModelForSequenceClassification(tiny_classifier(name), cache_home_dir=home)
            encoders.append(encoder_row(f"{name} (classifier)", wrapped))
    lines = [
        "# Models",
        "",
        "Exporting is not written per architecture; this page lists families that are compared with Hugging Face.",
        f"Made by `python benchmarks/model_coverage.py` on {time.strftime('%Y-%m-%d')} with random weights of 2 to 3"
        " small layers, scaled so that context matters, windows smaller than the prompts, float32.",
        "",
        "## Causal language models",
        "",
        f"Greedy tokens over {20} steps, prompts of {LENGTHS} tokens, prefill in chunks of {CHUNK}, context {CONTEXT}.",
        "*Last slot*: generation until the context is full. *Continuous batching*: three prompts through two slots.",
        "",
        *markdown(causal),
        "",
        "## Encoders and classifiers",
        "",
        "A padded batch against each row alone without padding; relative to the largest reference value.",
        "",
        *markdown(encoders),
    ]
    if failed:
        lines += ["", "## Not exportable", "", *failed]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

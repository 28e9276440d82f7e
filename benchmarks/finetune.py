"""Step time and peak memory of fine-tuning: the compiled step against PEFT with the transformers Trainer.

Every contender is a process of its own that loads the same checkpoint, adds the same LoRA adapter and sees the same
batches in the same order. Processes take turns: each runs a few optimizer steps while the others wait, round after
round, so that a slow minute of the machine hits all of them. Peak memory is the kernel's high-water mark of each
process. Compiled steps are built beforehand, in processes of their own, whose time and memory the page states when
nothing was cached. Weights are random, in the shape of SmolLM2-135M, which matters for neither figure. Run alone on the
machine.

    python benchmarks/finetune.py --output docs/finetuning_performance.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

console = Console(stderr=True)

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
#: Name -> what the worker runs. "trainer" is transformers' Trainer over a PEFT model; the others are this library.
CONTENDERS: dict[str, dict[str, Any]] = {
    "PEFT + HF Trainer, torch eager": {"engine": "trainer"},
    "PEFT + HF Trainer, torch.compile": {"engine": "trainer", "compile": True},
    "compiled step": {"engine": "refine"},
    "compiled step, recompute layers": {"engine": "refine", "recompute": "layers"},
    "compiled step, int8 base": {"engine": "refine", "base_weights": "int8"},
    "compiled step, int4 base": {"engine": "refine", "base_weights": "int4"},
    "compiled step, int4 base, recompute layers": {
        "engine": "refine", "base_weights": "int4", "recompute": "layers",
    },
    "kit (no torch)": {"engine": "kit"},
    "kit (no torch), int4 base": {"engine": "kit", "base_weights": "int4"},
}  # fmt: skip
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def batches(count: int, rows: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Question and answer rows with lengths as in grade-school arithmetic data; only answers are trained."""
    source = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        lengths = [(int(source.integers(40, 120)), int(source.integers(60, 160))) for _ in range(rows)]
        width = max(a + b for a, b in lengths)
        ids, mask = np.zeros((rows, width), np.int64), np.zeros((rows, width), np.int64)
        labels = np.full((rows, width), -100, np.int64)
        for row, (prompt, answer) in enumerate(lengths):
            end = prompt + answer
            ids[row, :end] = source.integers(0, SHAPE["vocab_size"], end)
            mask[row, :end] = 1
            labels[row, prompt:end] = ids[row, prompt:end]
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


# ---------------------------------------------------------------------- worker


def status(key: str) -> float:
    """A memory figure of this process in MB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith(key))


def worker(arguments: dict[str, Any]) -> None:
    """Prepares one contender, then runs as many optimizer steps as each line of stdin asks for."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    data = batches(arguments["batches"], arguments["rows"])
    began = time.perf_counter()
    engine = {"trainer": _trainer, "refine": _refine, "kit": _kit}[arguments["engine"]](arguments, data)
    next(engine)
    print(json.dumps({"ready": time.perf_counter() - began, "rss": status("VmRSS")}), flush=True)
    for line in sys.stdin:
        times, losses = [], []
        for _ in range(int(line)):
            start = time.perf_counter()
            losses.append(next(engine))
            times.append(time.perf_counter() - start)
        print(json.dumps({"times": times, "losses": losses, "peak": status("VmHWM")}), flush=True)


def _trainer(arguments: dict[str, Any], data: list[dict[str, np.ndarray]]) -> Any:
    import torch

    torch.set_num_threads(arguments["threads"])
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments["model"], dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**LORA))
    yield from _stepping(model, arguments, data, compiled=bool(arguments.get("compile")))


def _refine(arguments: dict[str, Any], data: list[dict[str, np.ndarray]]) -> Any:
    step = _compiled(arguments)
    yield from _stepping(step, arguments, data)


def _compiled(arguments: dict[str, Any]) -> Any:
    import torch
    from peft import LoraConfig

    torch.set_num_threads(arguments["threads"])
    from QEfficient.finetune.compiled_step import CompiledStep
    from QEfficient.finetune.step_checkpoint import from_checkpoint
    from QEfficient.finetune.step_package import StepOptions, build_step
    from QEfficient.models.source import CheckpointSource
    from QEfficient.store.store import ArtifactStore

    store = ArtifactStore(Path(arguments["home"]))
    source = CheckpointSource(Path(arguments["model"]), "benchmark")
    torch.manual_seed(0)
    model = from_checkpoint(source, "AutoModelForCausalLM", store.memo, peft_config=LoraConfig(**LORA))
    options = {k: arguments[k] for k in ("recompute", "base_weights", "loss_chunks") if k in arguments}
    packages = build_step(model, StepOptions(seq_len=512, **options), store)
    return CompiledStep(model, packages, threads=arguments["threads"])


def _stepping(model: Any, arguments: dict[str, Any], data: list[dict[str, np.ndarray]], compiled: bool = False) -> Any:
    """transformers' Trainer, paused after every optimizer step: it runs in a thread that hands losses over."""
    import queue
    import threading

    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    turns: queue.Queue[None] = queue.Queue()
    results: queue.Queue[float] = queue.Queue()
    losses: list[float] = []

    class Turns(TrainerCallback):
        def on_step_begin(self, *event: Any, **more: Any) -> None:
            turns.get()

        def on_step_end(self, *event: Any, **more: Any) -> None:
            results.put(losses[-1])

    class Measured(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            if arguments["engine"] == "refine":
                loss = model(**inputs, normaliser=float(more["num_items_in_batch"]))
            else:
                loss = super().compute_loss(model, inputs, **more)
            losses.append(float(loss.detach()))
            return loss

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(data) * 10_000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {name: torch.from_numpy(array) for name, array in data[index % len(data)].items()}

    with tempfile.TemporaryDirectory() as place:
        args = TrainingArguments(
            place, per_device_train_batch_size=1, max_steps=100_000, learning_rate=1e-4, weight_decay=0.01,
            use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False, train_sampling_strategy="sequential",
            torch_compile=compiled,
        )  # fmt: skip
        trainer = Measured(model, args, data_collator=lambda rows: rows[0], train_dataset=Rows(), callbacks=[Turns()])
        trainer.model_accepts_loss_kwargs = True
        threading.Thread(target=trainer.train, daemon=True).start()
        yield None
        while True:
            turns.put(None)
            yield results.get()


def build(arguments: dict[str, Any]) -> None:
    """Makes the packages of one contender, and its kit; prints seconds and peak memory."""
    began = time.perf_counter()
    step = _compiled(arguments)
    if arguments["engine"] == "kit":
        shutil.rmtree(arguments["kit"], ignore_errors=True)
        step.save_kit(arguments["kit"])
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": status("VmHWM")}))


def _kit(arguments: dict[str, Any], data: list[dict[str, np.ndarray]]) -> Any:
    from QEfficient.finetune.native import PackageTrainer

    trainer = PackageTrainer(arguments["kit"], weight_decay=0.01, max_norm=1.0, threads=arguments["threads"])
    yield None
    while True:
        for batch in data:
            yield trainer.step([batch], 1e-4).loss


# ---------------------------------------------------------------------- report


class Contender:
    """A worker process and what it measured."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.name = name
        self.built: dict[str, float] | None = None
        if arguments["engine"] != "trainer":
            making = [sys.executable, __file__, "--worker", json.dumps({**arguments, "build": True})]
            done = subprocess.run(making, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise RuntimeError(f"building {name} ended with code {done.returncode}")
            self.built = json.loads(done.stdout.splitlines()[-1])
        command = [sys.executable, __file__, "--worker", json.dumps(arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.times: list[float] = []
        self.losses: list[float] = []
        self.peak = 0.0
        ready = self._read()
        self.ready, self.loaded = ready["ready"], ready["rss"]

    def run(self, steps: int, count: bool) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        found = self._read()
        self.losses += found["losses"]
        self.peak = found["peak"]
        if count:
            self.times += found["times"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def bandwidth() -> float:
    """Read bandwidth of memory in GB/s with numpy on one core."""
    array = np.ones(1 << 26, np.float32)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        array.sum()
        best = max(best, array.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="markdown file to write; prints it otherwise")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a turn")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="*", help="contenders whose name contains one of these (the first always runs)")
    parser.add_argument("--with-compile", action="store_true", help="torch.compile too (takes minutes to compile)")
    parser.add_argument("--work", type=Path, help="directory for checkpoint and cache, kept for the next run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        arguments = json.loads(options.worker)
        (build if arguments.get("build") else worker)(arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(options, options.work or Path(scratch))
    if options.output:
        options.output.write_text(report, encoding="utf-8")
    else:
        print(report)


def measure(options: argparse.Namespace, work: Path) -> str:
    work.mkdir(parents=True, exist_ok=True)
    cold = not (work / "home").exists()
    model = work / "model"
    if not model.exists():
        write_model(model)
    shared = {
        "model": str(model), "home": str(work / "home"), "threads": options.threads, "rows": options.rows,
        "batches": options.rounds * options.steps + 2,
    }  # fmt: skip
    chosen = [
        name
        for number, (name, what) in enumerate(CONTENDERS.items())
        if (not what.get("compile") or options.with_compile)
        and (not options.only or number == 0 or any(part in name for part in options.only))
    ]
    running: list[Contender] = []
    failed: dict[str, str] = {}
    for name in chosen:
        console.print(f"preparing {name}")
        kit = work / f"kit-{CONTENDERS[name].get('base_weights', 'fp32')}"
        try:
            running.append(Contender(name, {**shared, **CONTENDERS[name], "kit": str(kit)}))
        except RuntimeError as error:
            failed[name] = str(error)
    speed = bandwidth()
    for turn in range(options.rounds + 1):
        for contender in running:
            # The first turn warms caches and is not counted.
            contender.run(options.steps if turn else 2, count=turn > 0)
        console.print(f"round {turn} of {options.rounds}: " + ", ".join(
            f"{statistics.median(c.times[-options.steps:] or [0]):.2f}" for c in running
        ))  # fmt: skip
    for contender in running:
        contender.close()
    return table(options, running, failed, speed, cold)


def write_model(place: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=0)).save_pretrained(place)


def table(
    options: argparse.Namespace, running: list[Contender], failed: dict[str, str], speed: float, cold: bool
) -> str:
    data = batches(options.rounds * options.steps + 2, options.rows)[2:]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in data) / len(data)
    trained = sum(int((batch["labels"] != -100).sum()) for batch in data) / len(data)
    base = running[0]
    asked = f"--rounds {options.rounds} --steps {options.steps} --rows {options.rows} --threads {options.threads}"
    asked += " --with-compile" * options.with_compile + (f" --only {' '.join(options.only)}" if options.only else "")
    lines = [
        "# Fine-tuning: step time and memory",
        "",
        f"`python benchmarks/finetune.py {asked}` wrote this page.",
        "",
        f"Machine: {cpu()}, {options.threads} threads, memory read at {speed:.1f} GB/s (one core, numpy).",
        f"Model: shape of SmolLM2-135M, random weights, fp32; LoRA rank {LORA['r']} on all linear layers; batches of "
        f"{options.rows} rows, on average {tokens:.0f} tokens of which {trained:.0f} are trained. AdamW, clipping, "
        f"{options.rounds} rounds of {options.steps} steps in turn; medians.",
        "",
        "| | step, s | spread, s | tokens/s | speed | peak memory, MB | memory | first loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for contender in running:
        # Step by step against the first contender: the same batch, seconds apart.
        ratio = statistics.median(a / b for a, b in zip(base.times, contender.times, strict=True))
        times = sorted(contender.times)
        middle = statistics.median(times)
        low, high = times[len(times) // 4], times[(3 * len(times)) // 4]
        lines.append(
            f"| {contender.name} | {middle:.2f} | {low:.2f}–{high:.2f} | {tokens / middle:,.0f} | {ratio:.2f}× | "
            f"{contender.peak:,.0f} | {contender.peak / base.peak:.2f}× | {contender.losses[0]:.5f} |"
        )
    lines += [f"| {name} | {why} | | | | | | |" for name, why in failed.items()]
    lines += [
        "",
        "*speed* is the median over steps of (time of the first row / time of this row) on the same batch; *memory* is "
        "the peak resident set of the whole process, Python and libraries included, as a share of the first row's. "
        "Every row but the kit's runs transformers' Trainer. The kit imports neither torch nor transformers.",
        "",
    ]
    made = [c.built for c in running if c.built]
    if made and cold:
        first, rest = made[0], made[1:] or made
        lines += [
            f"Building, once per model and options, before any of this: {first['seconds']:.0f} s and at most "
            f"{first['peak']:,.0f} MB for the first compiled step, {min(b['seconds'] for b in rest):.0f} to "
            f"{max(b['seconds'] for b in rest):.0f} s for the others, which share what was captured for it.",
            "",
        ]
    return "\n".join(lines)


def cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()

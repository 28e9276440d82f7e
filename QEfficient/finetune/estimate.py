"""What a run will need: peak memory and time per step, measured on its own largest and typical batches beforehand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from QEfficient.errors import TrainingError
from QEfficient.finetune.meter import current_rss_mb

if TYPE_CHECKING:
    from QEfficient.finetune.refine import QEfficient

#: Typical batches that are timed, after one that is not.
_TIMED = 3


@dataclass(frozen=True)
class Estimate:
    """Figures of a run before it starts.

    Attributes:
        peak_mb: expected peak resident memory of the training process.
        step_mb: of that, what one forward and backward pass over the largest batch adds to the loaded package.
        weights_mb: of that, the package (mapped from disk).
        state_mb: of that, trained tensors, their gradients and the optimizer's two moments.
        process_mb: of that, Python and its libraries as loaded now.
        step_seconds: median time of an optimizer step on typical batches, its micro-batches included.
        steps: optimizer steps of the run.
        largest: rows and tokens of the largest batch.
        trained_parameters, parameters: how many numbers train, and how many there are.
    """

    peak_mb: float
    step_mb: float
    weights_mb: float
    state_mb: float
    process_mb: float
    step_seconds: float
    steps: int
    largest: tuple[int, int]
    trained_parameters: int
    parameters: int

    def __str__(self) -> str:
        total = self.step_seconds * self.steps
        share = 100 * self.trained_parameters / max(self.parameters, 1)
        rows, tokens = self.largest
        parts = f"libraries {self.process_mb:,.0f}, weights {self.weights_mb:,.0f}, step {self.step_mb:,.0f}"
        return "\n".join(
            [
                f"peak memory  {self.peak_mb:,.0f} MB: {parts} (largest batch {rows} x {tokens} tokens), trained "
                f"tensors and optimizer {self.state_mb:,.0f}",
                f"step time    {self.step_seconds:.2f} s, {self.steps:,} steps: about {_duration(total)}, without "
                "evaluation and saving",
                f"trained      {self.trained_parameters:,} of {self.parameters:,} parameters ({share:.2f} %)",
            ]
        )


def estimate_run(run: QEfficient) -> Estimate:
    """Prepares data and the compiled step (both are cached for the run itself) and measures in a process of its own.

    Raises:
        the errors of preparing a run; TrainingError: the measurement failed, for example for lack of memory.
    """
    from QEfficient.finetune.arguments import QEffTrainingArgs
    from QEfficient.finetune.data.loader import BatchLoader
    from QEfficient.finetune.data.stream import StreamRows
    from QEfficient.finetune.methods.build import method_of
    from QEfficient.progress import bar

    args = run.args or QEffTrainingArgs()
    run.args = args
    manager, data = run.parts()
    prepared, _ = data.prepare_dataset()
    train = prepared.sample if isinstance(prepared, StreamRows) else prepared
    if run.config.task == "seq_classification":
        manager.set_classes(data.label_names, data.pad_token_id)
    with bar(f"preparing {run.config.model_id}") as report:
        model = manager.init_model()
        packages = manager.compile(report)
    rows = args.per_device_train_batch_size
    loader = data.get_dataloader(train, rows)
    assert isinstance(loader, BatchLoader)
    order = np.argsort(-np.asarray(train.lengths), kind="stable")[:rows]
    method = method_of(run.config)
    largest = method.plain(data.collate([train[int(i)] for i in order], pad_token_id=data.pad_token_id))
    typical = [method.plain(batch) for batch, _ in zip(loader, range(_TIMED + 1), strict=False)]
    tensors = {model.file_names[name]: p.detach().numpy() for name, p in model.trained.items()}
    if model.scaling is not None:
        tensors["lora_scaling"] = model.scaling
    found = _measure(packages.train, [largest, *typical], tensors)
    trained = sum(p.numel() for p in model.trained.values())
    micro = args.gradient_accumulation_steps
    per_epoch = math.ceil(len(loader) / micro)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    # Parameter, gradient, the copy handed to autograd, and two moments; float32.
    state = 5 * 4 * trained / 1e6
    process = current_rss_mb()
    times = found["times"][2:] or found["times"][-1:]
    return Estimate(
        peak_mb=process + found["weights_mb"] + found["step_mb"] + state,
        step_mb=found["step_mb"],
        weights_mb=found["weights_mb"],
        state_mb=state,
        process_mb=process,
        step_seconds=float(np.median(times)) * micro,
        steps=steps,
        largest=(largest["input_ids"].shape[0], largest["input_ids"].shape[1]),
        trained_parameters=trained,
        parameters=int(model.facts.get("parameters") or 0),
    )


def _measure(package: Path, batches: list[dict[str, np.ndarray]], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        arrays = {f"{number}/{name}": array for number, batch in enumerate(batches) for name, array in batch.items()}
        np.savez(Path(place, "batches.npz"), **arrays)  # type: ignore[arg-type]
        np.savez(Path(place, "tensors.npz"), **tensors)  # type: ignore[arg-type]
        command = [sys.executable, "-m", "QEfficient.finetune.estimate", str(package), place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        killed = done.returncode < 0
        why = "it was killed, probably for lack of memory" if killed else (lines[-1] if lines else "unknown reason")
        raise TrainingError(
            f"the largest batch could not be run ({why}): lower batch_size or max_ctx_len, or use --recompute and "
            "--base-weights int4."
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _child(package: str, place: str) -> None:
    """Runs in a process of its own, so that its peak is the step's."""
    import time

    from QEfficient.finetune.meter import peak_rss_mb
    from QEfficient.finetune.step_session import StepSession

    with np.load(Path(place, "tensors.npz")) as file:
        tensors = {name: file[name] for name in file.files}
    with np.load(Path(place, "batches.npz")) as file:
        batches: dict[str, dict[str, np.ndarray]] = {}
        for key in file.files:
            number, _, name = key.partition("/")
            batches.setdefault(number, {})[name] = file[key]
    before = current_rss_mb()
    with StepSession(package, verify=False) as session:
        session.set_parameters(tensors)
        loaded = current_rss_mb()
        times = []
        for number in sorted(batches, key=int):
            start = time.perf_counter()
            session.run(batches[number])
            times.append(time.perf_counter() - start)
    weights = sum(p.stat().st_size for p in Path(package).rglob("*") if p.is_file() and p.suffix != ".json") / 1e6
    # Mapped weights become resident while the step reads them: they count as weights, the rest as the step's.
    held = max(weights, loaded - before)
    print(json.dumps({"weights_mb": held, "step_mb": max(peak_rss_mb() - before - held, 0.0), "times": times}))


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2])

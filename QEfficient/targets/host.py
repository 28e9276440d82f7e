"""The host target: ONNX Runtime on this machine's CPU."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import onnxruntime as ort

from QEfficient.errors import OptionError, PackageError
from QEfficient.targets.base import Availability, CompileRequest
from QEfficient.targets.host_session import HostSession
from QEfficient.targets.manifest import DimRange, Manifest, Specialization
from QEfficient.targets.options import CompileOptions

PROGRAM_FILE = "program.onnx"

#: Prompt tokens per step when nothing is asked for: enough rows for the matrix kernels to reach their speed.
DEFAULT_PREFILL = 128
#: A training step keeps many activations for a while. Without the pattern planner, which would reserve the sum of what
#: a step uses, the peak halves; the arena stays, because taking fresh pages at every step costs a third of its time.
#: Weights stay mapped instead of being repacked; nodes run in the graph's order, which holds only without the runtime's
#: own rewrites, whose nodes come last whatever they hold alive; the same inputs give the same bits.
TRAINING_RUNTIME = {
    "memory_pattern": False,
    "prepacking": False,
    "order": "priority",
    "optimization": "none",
    "deterministic": True,
}


class HostTarget:
    """Compiles to an ONNX file plus weights that ONNX Runtime maps into memory."""

    name = "host"

    def check(self) -> Availability:
        cores = available_cores()
        detail = f"ONNX Runtime {ort.__version__} on {platform.machine()}, {cores} core{'s' if cores > 1 else ''}"
        return Availability(self.name, can_compile=True, can_run=True, detail=detail)

    def toolchain(self) -> dict[str, str]:
        return {"onnxruntime": ort.__version__}

    def transforms(self, task: str) -> tuple[str, ...]:
        return ()  # ONNX Runtime takes every operator we write

    def normalise(self, options: CompileOptions) -> CompileOptions:
        if options.dry_run:
            raise OptionError("the host target needs no SDK and compiles here: leave out dry_run.")
        options = options.replace(target=self.name)
        if options.ctx_len is None:
            return options
        prefill = options.prefill_seq_len or min(DEFAULT_PREFILL, options.ctx_len)
        return options.replace(prefill_seq_len=prefill)

    def specializations(self, options: CompileOptions, task: str) -> tuple[Specialization, ...]:
        """The host runs any shape inside a bound: nothing is padded to a compiled size."""
        if task == "training":
            length = max(options.seq_len) if options.seq_len else None
            return (
                Specialization(
                    "Train", {"batch_size": DimRange(1, options.batch_size), "seq_len": DimRange(1, length)}
                ),
            )
        if task != "text-generation":
            batch = DimRange(1, options.batch_size)
            return tuple(
                Specialization(f"seq_len_{length}", {"batch_size": batch, "seq_len": DimRange(1, length)})
                for length in options.seq_len or ()
            )
        if options.ctx_len is None or options.prefill_seq_len is None:
            raise OptionError("a causal package needs ctx_len and prefill_seq_len.")
        shared = {"ctx_len": DimRange.exactly(options.ctx_len)}
        rows = DimRange(1, options.batch_size)
        if options.full_batch_size is not None:
            shared["full_batch_size"] = DimRange.exactly(options.kv_cache_batch_size or options.full_batch_size)
            rows = DimRange(1, options.full_batch_size)
        prefill = {"batch_size": rows, "seq_len": DimRange(1, options.prefill_seq_len), **shared}
        decode = {"batch_size": rows, "seq_len": DimRange.exactly(1), **shared}
        return Specialization("Prefill", prefill), Specialization("Decode", decode)

    def compile(self, request: CompileRequest) -> Manifest:
        """Writes ``program.onnx`` and ``weights/``; marks the states that can be updated in their own buffer."""
        from QEfficient.onnx_io import load_model, save_model
        from QEfficient.targets.host_program import in_place_states
        from QEfficient.targets.program_files import place_weights

        model = load_model(request.onnx_path)
        place_weights(model, request)
        save_model(model, request.directory / PROGRAM_FILE)
        aliased = in_place_states(model, request.manifest.states)
        runtime = TRAINING_RUNTIME if request.manifest.task == "training" else {}
        return request.manifest.replace(program=PROGRAM_FILE, states=aliased, runtime=runtime)

    def load(self, directory: Path, manifest: Manifest, *, threads: int | None = None) -> HostSession:
        if manifest.target != self.name:
            raise PackageError(f"{directory} was compiled for {manifest.target!r}, not for this target.")
        return HostSession(directory, manifest, threads or available_cores())


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""The host target: ONNX Runtime on this machine's CPU."""

from __future__ import annotations

import dataclasses
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from QEfficient.errors import OptionError, PackageError
from QEfficient.targets import cloud_graph, simulation
from QEfficient.targets.base import Availability, CardSettings, CompileRequest
from QEfficient.targets.host_session import HostSession
from QEfficient.targets.manifest import DimRange, Manifest, Specialization
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.tuning import Tuning, available_cores

PROGRAM_FILE, PREFILL_FILE = "program.onnx", "prefill.onnx"
#: Decoding reads every weight for one row: fewer, larger products keep both cores reading.
DECODE_TRANSFORMS = ("FoldCasts", "MergeProducts")
#: A prompt has many rows: int8 products with a scale per row; nothing is returned, so no head and no last layer.
PREFILL_TRANSFORMS = ("FoldCasts", "StateOnly", "RowScaledProducts")
#: The int8 kernels of many rows are as fast on weights as they lie in the file, which then stay mapped and shared.
#: The pattern planner would keep a block of memory for every length of prompt it has seen.
PREFILL_RUNTIME = {"prepacking": False, "memory_pattern": False, "idle_spinning": False}
#: A prompt this short runs in the program that makes tokens: the other one need not be opened for it, which takes
#: longer than it saves, and its weights stay out of memory.
TAIL_TOKENS = 64
#: What ``mixed`` may add to the bytes of int4 for the weights that lose most.
MIXED_EXTRA = 0.3
#: Inputs that share a scale in int4 when nothing is asked for.
DEFAULT_GROUP = 128

#: Prompt tokens per step when nothing is asked for: enough rows for the matrix kernels to reach their speed.
DEFAULT_PREFILL = 256
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

    def transforms(self, task: str, options: CompileOptions) -> tuple[str, ...]:
        """Larger operators that compute the same, then the precision of weights that was asked for; or a simulation."""
        if options.simulate is not None:
            return simulation.transforms(options, task)
        if task == "training":
            return ()
        wanted = ["FuseNorms", "FuseSiLU"] if options.fuse else []
        # With batch_index rows of the batch are not rows of the state, which the fused attention takes for granted.
        if options.fuse and task == "text-generation" and options.full_batch_size is None:
            wanted.append(f"FuseAttention:ctx_len={options.ctx_len}")
        elif options.fuse:
            wanted.append("FuseEncoderAttention")
        if options.weights == "int8":
            wanted.append("QuantizeWeights:bits=8,group_size=channel")
        elif options.weights in ("int4", "mixed"):
            extra = MIXED_EXTRA if options.weights == "mixed" else 0
            wanted.append(f"QuantizeWeights:bits=4,group_size={options.group_size},extra={extra}")
        if task != "text-generation" and options.weights == "int8":
            wanted.append("RowScaledProducts")  # an encoder has many rows in every call
        return tuple(wanted)

    def normalise(self, options: CompileOptions) -> CompileOptions:
        if options.dry_run:
            raise OptionError("the host target needs no SDK and compiles here: leave out dry_run.")
        options = options.replace(target=self.name, prepack=options.prepack and options.weights != "fp32")
        if options.simulate is not None:
            options = simulation.normalise(options)
        if options.weights in ("int4", "mixed"):
            options = options.replace(group_size=options.group_size or DEFAULT_GROUP)
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
        # One prompt at a time: no padding between prompts of different length, and a row of state is contiguous.
        by_row = options.fuse and options.full_batch_size is None
        rows = DimRange(1, options.batch_size)
        prompts = DimRange.exactly(1) if by_row else rows
        if options.full_batch_size is not None:
            shared["full_batch_size"] = DimRange.exactly(options.kv_cache_batch_size or options.full_batch_size)
            rows = prompts = DimRange(1, options.full_batch_size)
        prefill = {"batch_size": prompts, "seq_len": DimRange(1, options.prefill_seq_len), **shared}
        decode = {"batch_size": rows, "seq_len": DimRange.exactly(1), **shared}
        return Specialization("Prefill", prefill, by_row=by_row), Specialization("Decode", decode)

    def compile(self, request: CompileRequest) -> Manifest:
        """Writes the programs and ``weights/``; marks the states that can be updated in their own buffer."""
        from QEfficient.onnx_io import load_model, save_model
        from QEfficient.targets.host_program import in_place_states
        from QEfficient.targets.prepacked import prepack, record_entries
        from QEfficient.targets.program_files import place_weights

        manifest, options = request.manifest, request.options
        programs, runtime = {}, TRAINING_RUNTIME if manifest.task == "training" else {}
        specializations = manifest.specializations
        if manifest.task == "text-generation" and options.fuse and options.weights != "fp32":
            programs[PROGRAM_FILE] = request.variant(PROGRAM_FILE, DECODE_TRANSFORMS)
            if options.full_batch_size is None:
                programs[PREFILL_FILE] = request.variant(PREFILL_FILE, PREFILL_TRANSFORMS)
                runtime = {"programs": {PREFILL_FILE: PREFILL_RUNTIME}}
                specializations = _two_programs(specializations)
        else:
            programs[PROGRAM_FILE] = load_model(request.onnx_path)
            if options.simulate is not None:
                cloud_graph.refuse_dependent(programs[PROGRAM_FILE], manifest)
        # Weights of prompts are read as they lie in the file (PREFILL_RUNTIME).
        first, *others = programs.values()
        with tempfile.TemporaryDirectory(dir=request.directory) as scratch:
            if options.prepack:
                request.progress("prepacking weights", 0, 1)
                prepack(first, others, Path(scratch), runtime)
            place_weights(list(programs.values()), request)
        for file, model in programs.items():
            save_model(model, request.directory / file)
            record_entries(model, request.directory / file)
        states = in_place_states(list(programs.values()), manifest.states)
        return manifest.replace(program=PROGRAM_FILE, states=states, runtime=runtime, specializations=specializations)

    def load(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        tuning: Tuning | None = None,
        card: CardSettings | None = None,
    ) -> HostSession:
        if card is not None and card.device_ids is not None:
            raise OptionError(f"{directory} runs on the host: leave out device_ids.")
        if manifest.target != self.name:
            raise PackageError(f"{directory} was compiled for {manifest.target!r}, not for this target.")
        if tuning is None:
            tuning = Tuning(threads or available_cores())
        elif threads is not None:
            tuning = dataclasses.replace(tuning, threads=threads)
        return HostSession(directory, manifest, tuning)


def _two_programs(specializations: Sequence[Specialization]) -> tuple[Specialization, ...]:
    """Prefill runs the program that only writes state; the last tokens of a prompt run the whole one, as Tail."""
    prefill, decode = specializations
    tail = {**prefill.symbols, "seq_len": DimRange(1, TAIL_TOKENS)}
    return (
        dataclasses.replace(prefill, program=PREFILL_FILE),
        Specialization("Tail", tail, by_row=True),
        decode,
    )

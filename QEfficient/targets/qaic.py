"""The Cloud AI 100 target: what its compiler takes, written to its contract; compiled where the Apps SDK is."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import NoReturn

from QEfficient.errors import OptionError, QEfficientError, TargetUnavailableError
from QEfficient.suggest import did_you_mean
from QEfficient.targets.base import Availability, CompileRequest
from QEfficient.targets.manifest import DimRange, Manifest, Specialization
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.qaic_command import BINARY_DIR, inference_command, training_command
from QEfficient.targets.qaic_files import (
    CUSTOM_IO,
    RETAINED,
    SPECIALIZATIONS,
    custom_io_entries,
    custom_io_text,
    read_custom_io,
    specializations_text,
)
from QEfficient.targets.qaic_sdk import CURRENT, HOW_TO_GET, LEGACY, PROFILES, ROOT, Profile, find_sdk, run_compiler
from QEfficient.targets.tuning import Tuning

ONNX_FILE = "model.onnx"
COMMAND_JSON, COMMAND_TEXT = "command.json", "command.txt"
BINARY = f"{BINARY_DIR}/programqpc.bin"
#: Cores of one SoC of a Cloud AI 100 Ultra card; a Standard card has 14.
MAX_CORES = 16
#: Prompt tokens per step when nothing is asked for. Every prompt is padded to a multiple of it, so it is short.
DEFAULT_PREFILL = 32
_ENCODERS = {"feature-extraction": "Embedding", "text-classification": "SeqClassification"}


class QaicTarget:
    """Writes a graph and the compiler's other input into a package and, where the Apps SDK is, compiles it.

    Without the SDK only a dry run is possible: the same files, no binary, marked as a dry run in the manifest. This
    version has no runtime for the card, so no package of this target can be loaded yet.

    Args:
        root: where the SDK is installed.
        profile: ``legacy``, ``1.21`` or ``current``, the forms of an SDK release; None takes those of the SDK found.
            A dry run without an SDK takes ``current``, and ``legacy`` for a training step, the only form known to have
            compiled one.
        fp16: compute in 16 bits (``-convert-to-fp16``); otherwise in float32.
        custom_io: an IO list to use instead of the one written for the graph.
    """

    name = "qaic"

    def __init__(
        self, root: Path = ROOT, *, profile: str | None = None, fp16: bool = True, custom_io: Path | None = None
    ) -> None:
        if profile is not None and profile not in PROFILES:
            raise OptionError(
                f"profile must be one of {sorted(PROFILES)}, got {profile!r}.{did_you_mean(profile, PROFILES)}"
            )
        self._sdk = find_sdk(root)
        self._profile, self._fp16, self._custom_io = profile, fp16, custom_io

    def check(self) -> Availability:
        if self._sdk is None:
            detail = "no qaic-compile or qaic-exec here: only dry runs"
            return Availability(self.name, can_compile=False, can_run=False, detail=detail, missing=(HOW_TO_GET,))
        version = self._sdk.version or "of unknown version"
        detail = f"{self._sdk.compiler} {version} compiles; running on the card is not in this version"
        return Availability(self.name, can_compile=True, can_run=False, detail=detail)

    def toolchain(self) -> dict[str, str]:
        if self._sdk is None:
            return {"qaic": "not installed"}
        return {"qaic": f"{self._sdk.compiler.name} {self._sdk.version or 'unknown'}"}

    def transforms(self, task: str, options: CompileOptions) -> tuple[str, ...]:
        """A training step needs operators the compiler has, and constants that fit 16 bits."""
        return (f"FixTrainingOps:profile={self.name}", "FP16Clip") if task == "training" else ()

    def normalise(self, options: CompileOptions) -> CompileOptions:
        if options.weights != "fp32":
            raise OptionError(
                f"weights={options.weights!r} is for the host; on Cloud AI 100 mxfp6_matmul=True compresses weights."
            )
        cores = options.num_cores or MAX_CORES
        if cores > MAX_CORES:
            raise OptionError(
                f"num_cores={cores} is more than the {MAX_CORES} cores of a Cloud AI 100 device: lower it."
            )
        devices = options.num_devices or len(options.device_group or (0,))
        if devices > 1 or options.allow_mxint8_mdp_io:
            asked = f"{devices} devices" if devices > 1 else "allow_mxint8_mdp_io"
            raise OptionError(f"this version compiles for one Cloud AI 100 device: leave out {asked}.")
        # efficient-transformers writes -1 for "the compiler decides".
        mos = None if options.mos == -1 else options.mos
        if mos is not None and not 1 <= mos <= cores:
            raise OptionError(f"mos={mos} is not between 1 and the {cores} cores: change it, or leave it out.")
        prefill = options.prefill_seq_len
        if options.ctx_len is not None:
            prefill = prefill or min(DEFAULT_PREFILL, options.ctx_len)
        return options.replace(
            target=self.name,
            batch_size=options.batch_size or 1,
            num_cores=cores,
            num_devices=1,
            mos=mos,
            prefill_seq_len=prefill,
        )

    def specializations(self, options: CompileOptions, task: str) -> tuple[Specialization, ...]:
        """Exact sizes, because the compiler takes no others.

        A training step also fixes ``rows``, the places whose next token is predicted: every column but the first of
        every row, which is the most a batch can have. A batch with fewer fills up with rows of weight 0.
        """
        if options.mxint8_kv_cache and task != "text-generation":
            raise OptionError("mxint8_kv_cache is for causal models: this one keeps no keys and values.")
        rows = options.batch_size or 1
        if task == "training":
            if options.seq_len is None or len(options.seq_len) > 1:
                raise OptionError("a training step for Cloud AI 100 has one exact length: pass a single seq_len.")
            (length,) = options.seq_len
            return (_exact("Train", batch_size=rows, seq_len=length, rows=max(1, rows * (length - 1))),)
        if task in _ENCODERS:
            if not options.seq_len:
                raise OptionError("an encoder for Cloud AI 100 has exact lengths: pass seq_len.")
            several = len(options.seq_len) > 1
            return tuple(
                _exact(f"{_ENCODERS[task]}_{i}" if several else _ENCODERS[task], batch_size=rows, seq_len=length)
                for i, length in enumerate(options.seq_len)
            )
        if options.ctx_len is None or options.prefill_seq_len is None:
            raise OptionError("a causal package needs ctx_len and prefill_seq_len.")
        shared, prompts = {"ctx_len": options.ctx_len}, rows
        if options.full_batch_size is not None:
            # Prompts come in one at a time, answers grow in all slots together.
            shared["full_batch_size"] = options.kv_cache_batch_size or options.full_batch_size
            rows = options.full_batch_size
            prompts = rows if options.prefill_seq_len == 1 else 1
        prefill = _exact("Prefill", batch_size=prompts, seq_len=options.prefill_seq_len, **shared)
        if options.prefill_seq_len == 1:  # two entries of equal sizes could not be told apart
            return (prefill,)
        return prefill, _exact("Decode", batch_size=rows, seq_len=1, **shared)

    def compile(self, request: CompileRequest) -> Manifest:
        """Writes the graph, its weights, ``specializations.json``, ``custom_io.yaml`` and the command; runs it.

        A dry run stops before the last step. ``command.json`` and ``command.txt`` hold the command line, to be run in
        the package's directory.

        Raises:
            TargetUnavailableError: there is no SDK and no dry run was asked for.
            OptionError: the graph has a dimension that the options do not fix.
            PackageError: the graph is not valid.
            QEfficientError: the compiler failed.
        """
        options, place, sdk = request.options, request.directory, self._sdk
        if sdk is None and not options.dry_run:
            raise TargetUnavailableError(f"nothing can be compiled for Cloud AI 100 here: {HOW_TO_GET}.")
        training = request.manifest.task == "training"
        profile = self._chosen_profile(training)
        sizes = _fitting(request.manifest)
        manifest = request.manifest.replace(specializations=sizes)
        io_text = self._io_list(manifest)
        _write_graph(request)

        _write(place / SPECIALIZATIONS, specializations_text(sizes, profile.named))
        if io_text:
            _write(place / CUSTOM_IO, io_text)
        compiler = str(sdk.compiler if sdk else ROOT / "exec" / profile.executable)
        if training:
            command = training_command(compiler, profile, options, ONNX_FILE, sizes[0], fp16=self._fp16)
        else:
            held = bool(manifest.states or manifest.parameters)
            command = inference_command(
                compiler, profile, options, ONNX_FILE, retained=held, custom_io=bool(io_text), fp16=self._fp16
            )
        facts = {"profile": profile.name, "sdk": self.toolchain()["qaic"], "dry_run": options.dry_run}
        _write(place / COMMAND_JSON, json.dumps({**facts, "arguments": command}, indent=2) + "\n")
        _write(place / COMMAND_TEXT, shlex.join(command) + "\n")
        runtime = {"dry_run": options.dry_run, "fp16": self._fp16}
        if options.dry_run:
            return manifest.replace(program=ONNX_FILE, runtime=runtime)
        request.progress("compiling for Cloud AI 100", 0, 0)
        run_compiler(command, place)
        if not (place / BINARY).is_file():
            raise QEfficientError(f"{Path(compiler).name} ended well but wrote no {BINARY}: check the SDK.")
        return manifest.replace(program=BINARY, runtime=runtime)

    def load(
        self, directory: Path, manifest: Manifest, *, threads: int | None = None, tuning: Tuning | None = None
    ) -> NoReturn:
        """Raises TargetUnavailableError, always: this version has no runtime for the card."""
        if manifest.runtime.get("dry_run"):
            raise TargetUnavailableError(
                f"{directory} is a dry run, nothing in it was compiled: install the Cloud AI SDK and compile without "
                "dry_run, or compile for the host."
            )
        raise TargetUnavailableError(
            f"{directory} is for Cloud AI 100, and this version cannot use its Platform SDK's runtime yet: run it with "
            "the SDK's qaic-runner, or compile for the host."
        )

    def _chosen_profile(self, training: bool) -> Profile:
        if self._profile is not None:
            return PROFILES[self._profile]
        if self._sdk is not None:
            return self._sdk.profile
        return LEGACY if training else CURRENT

    def _io_list(self, manifest: Manifest) -> str:
        if self._custom_io is None:
            mxint8 = bool(manifest.options.get("mxint8_kv_cache"))
            return custom_io_text(custom_io_entries(manifest, fp16=self._fp16, mxint8_kv=mxint8))
        known = [spec.name for spec in (*manifest.inputs, *manifest.outputs)]
        known += [name for state in manifest.states for name in (state.input, state.output)]
        known += [name for spec in manifest.parameters for name in (spec.name, spec.name + RETAINED)]
        return read_custom_io(self._custom_io, known)


def _exact(name: str, **sizes: int) -> Specialization:
    return Specialization(name, {symbol: DimRange.exactly(size) for symbol, size in sizes.items()})


def _fitting(manifest: Manifest) -> tuple[Specialization, ...]:
    """The specializations with the symbols this graph has; a classifier's step has no ``rows``.

    Raises:
        OptionError: the graph has a symbol that nothing gives a size.
    """
    shapes = [spec.shape for spec in (*manifest.inputs, *manifest.parameters)]
    shapes += [state.shape for state in manifest.states]
    symbols = {dim for shape in shapes for dim in shape if isinstance(dim, str)}
    for specialization in manifest.specializations:
        loose = sorted(symbols - set(specialization.symbols))
        if loose:
            raise OptionError(
                f"the graph's dimension {loose[0]!r} has no size, and Cloud AI 100 takes exact sizes only: compile for "
                "the host."
            )
    return tuple(
        Specialization(s.name, {name: size for name, size in s.symbols.items() if name in symbols})
        for s in manifest.specializations
    )


def _write_graph(request: CompileRequest) -> None:
    """Writes ``model.onnx``, in which every parameter stays in device memory until it is sent again."""
    import onnx_ir as ir

    from QEfficient.onnx_io import load_model, save_model
    from QEfficient.targets.host_runtime import check_program
    from QEfficient.targets.program_files import place_weights

    model = load_model(request.onnx_path)
    place_weights([model], request)
    inputs = {value.name: value for value in model.graph.inputs}
    for spec in request.manifest.parameters:
        value = inputs[spec.name]
        kept = ir.Value(name=spec.name + RETAINED, type=value.type, shape=value.shape)
        model.graph.append(ir.Node("", "Identity", [value], outputs=[kept]))
        model.graph.outputs.append(kept)
    save_model(model, request.directory / ONNX_FILE)
    check_program(request.directory / ONNX_FILE)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

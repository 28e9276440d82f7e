"""The Cloud AI 100 target: what its compiler takes, written to its contract; compiled where the Apps SDK is."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from QEfficient.errors import OptionError, QEfficientError, TargetUnavailableError
from QEfficient.suggest import did_you_mean
from QEfficient.targets import cloud_graph, cloud_options, cloud_shapes
from QEfficient.targets.base import Availability, CardSettings, CompileRequest
from QEfficient.targets.cloud_graph import ONNX_FILE, write_graph
from QEfficient.targets.cloud_memory import estimate
from QEfficient.targets.cloud_shapes import file_symbols
from QEfficient.targets.cloud_tool import run_tool
from QEfficient.targets.manifest import Manifest, Specialization
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.qaic_binary import is_stand_in
from QEfficient.targets.qaic_command import BINARY_DIR, Inputs, inference_command, training_command
from QEfficient.targets.qaic_files import (
    CUSTOM_IO,
    RETAINED,
    SPECIALIZATIONS,
    custom_io_entries,
    custom_io_text,
    read_custom_io,
    specializations_text,
)
from QEfficient.targets.qaic_partition import contract_json, node_stages, pipeline, tensor_slices
from QEfficient.targets.qaic_precision import NODE_PRECISION, node_precision, node_precision_text
from QEfficient.targets.qaic_sdk import CURRENT, HOW_TO_GET, LEGACY, PROFILES, ROOT, Profile, find_sdk
from QEfficient.targets.qaic_session import QaicSession, open_session
from QEfficient.targets.qaic_vendor import runtime_missing
from QEfficient.targets.tuning import Tuning

if TYPE_CHECKING:
    import onnx_ir as ir

COMMAND_JSON, COMMAND_TEXT = "command.json", "command.txt"
BINARY = f"{BINARY_DIR}/programqpc.bin"
OWN_PARTITION = "mdp_load_partition_config.json"


class QaicTarget:
    """Writes a graph and the compiler's other input into a package and, where the Apps SDK is, compiles it.

    Without the SDK only a dry run is possible: the same files, no binary, marked as a dry run in the manifest. Loading
    needs the Platform SDK and a card.

    Args:
        root: where the SDK is installed.
        profile: ``legacy``, ``1.21`` or ``current``, the forms of an SDK release, unless ``sdk_profile`` says so; None
            takes those of the SDK found. A dry run without an SDK takes ``current``, and ``legacy`` for a training
            step, the only form known to have compiled one.
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
        self._root, self._profile, self._fp16, self._custom_io = root, profile, fp16, custom_io
        #: A compiler found on the PATH says where its SDK is; the runtime is part of the same one.
        self._runtime = root if self._sdk is None or (root / "dev").is_dir() else self._sdk.root

    def check(self) -> Availability:
        lacking = runtime_missing(self._runtime)
        to_run = () if lacking is None else (lacking,)
        if self._sdk is None or self._sdk.too_old:
            detail = "no qaic-compile or qaic-exec here: only dry runs"
            if self._sdk is not None:
                version = self._sdk.version or "of unknown version"
                detail = f"{self._sdk.compiler} {version} is older than what this version writes for"
            return Availability(self.name, False, not to_run, detail, (HOW_TO_GET, *to_run))
        detail = f"{self._sdk.compiler} {self._sdk.version or 'of unknown version'} compiles"
        return Availability(self.name, True, not to_run, detail, to_run)

    def toolchain(self) -> dict[str, str]:
        if self._sdk is None:
            return {"qaic": "not installed"}
        return {"qaic": f"{self._sdk.compiler.name} {self._sdk.version or 'unknown'}"}

    def transforms(self, task: str, options: CompileOptions) -> tuple[str, ...]:
        """What makes the graph the compiler takes out of the exported one; see `cloud_graph.transforms`."""
        return cloud_graph.transforms(options, task, fp16=self._fp16)

    def normalise(self, options: CompileOptions) -> CompileOptions:
        return cloud_options.normalise(options, self.name)

    def specializations(self, options: CompileOptions, task: str) -> tuple[Specialization, ...]:
        """Exact sizes, because the compiler takes no others; see `cloud_shapes.specializations`."""
        return cloud_shapes.specializations(options, task)

    def compile(self, request: CompileRequest) -> Manifest:
        """Writes the graph, its weights and the compiler's files (`_write_inputs`) and the command; runs it.

        A dry run stops before the last step. ``command.json`` and ``command.txt`` hold the command line, to be run in
        the package's directory.

        Raises:
            TargetUnavailableError: there is no SDK and no dry run was asked for.
            OptionError: the graph has a dimension that the options do not fix.
            PackageError: the graph is not valid.
            QEfficientError: the compiler failed, was killed or took too long.
        """
        options, place, sdk = request.options, request.directory, self._sdk
        if sdk is None and not options.dry_run:
            raise TargetUnavailableError(f"nothing can be compiled for Cloud AI 100 here: {HOW_TO_GET}.")
        training = request.manifest.task == "training"
        profile = self._chosen_profile(options, training)
        model, manifest = write_graph(request)
        given = self._write_inputs(model, manifest, options, profile, place)
        executable = self._root / "exec" / profile.executable
        compiler = str(sdk.compiler if sdk else executable)
        if training:
            sizes = manifest.specializations[0]
            command = training_command(compiler, profile, options, ONNX_FILE, sizes, fp16=self._fp16)
        else:
            command = inference_command(compiler, profile, options, given, fp16=self._fp16)
        facts = {"profile": profile.name, "sdk": self.toolchain()["qaic"], "dry_run": options.dry_run}
        _write(place / COMMAND_JSON, json.dumps({**facts, "arguments": command}, indent=2) + "\n")
        _write(place / COMMAND_TEXT, shlex.join(command) + "\n")
        memory = estimate(model, manifest, fp16=self._fp16).to_json()
        runtime = {"dry_run": options.dry_run, "fp16": self._fp16, "memory": memory}
        if options.dry_run:
            return manifest.replace(program=ONNX_FILE, runtime=runtime)
        request.progress("compiling for Cloud AI 100", 0, 0)
        run_tool(command, place, time_limit=options.compile_timeout)
        if not (place / BINARY).is_file():
            raise QEfficientError(f"{Path(compiler).name} ended well but wrote no {BINARY}: check the SDK.")
        return manifest.replace(program=BINARY, runtime=runtime, stand_in=is_stand_in(place / BINARY))

    def load(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        tuning: Tuning | None = None,
        card: CardSettings | None = None,
    ) -> QaicSession:
        """Opens a package on the card with the Platform SDK's runtime; see `qaic_session.open_session`."""
        return open_session(directory, manifest, self._runtime, card or CardSettings())

    def _chosen_profile(self, options: CompileOptions, training: bool) -> Profile:
        chosen = options.sdk_profile or self._profile
        if chosen is not None:
            return PROFILES[chosen]
        if self._sdk is not None:
            return self._sdk.profile
        return LEGACY if training else CURRENT

    def _write_inputs(
        self, model: ir.Model, manifest: Manifest, options: CompileOptions, profile: Profile, place: Path
    ) -> Inputs:
        """``specializations.json``, ``custom_io.yaml``, partition and precision files, as far as they are needed."""
        entries = [(s.name, file_symbols(s, options)) for s in manifest.specializations]
        _write(place / SPECIALIZATIONS, specializations_text(entries, profile.named))
        io_text = self._io_list(manifest)
        if io_text:
            _write(place / CUSTOM_IO, io_text)
        if options.node_precision_info is not None:
            _write(place / NODE_PRECISION, node_precision_text(node_precision(options.node_precision_info, model)))
        held = bool(manifest.states or manifest.parameters)
        given = Inputs(ONNX_FILE, retained=held, custom_io=bool(io_text))
        devices, cores, stages = options.num_devices or 1, options.num_cores or 1, options.mdp_num_partitions
        if options.mdp_load_partition_config is not None:
            _write(place / OWN_PARTITION, contract_json(options.mdp_load_partition_config))
            return dataclasses.replace(given, early_partition=OWN_PARTITION)
        if options.mdp_dump_partition_config or devices == 1:
            return given
        if stages is not None:
            file = f"mdp_disagg_{devices}d_{stages}p.json"
            _write(place / file, contract_json(pipeline(devices, cores, node_stages(model, stages))))
            return dataclasses.replace(given, early_partition=file)
        file = f"mdp_ts_{devices}.json"
        _write(place / file, contract_json(tensor_slices(devices, cores)))
        return dataclasses.replace(given, sliced_partition=file)

    def _io_list(self, manifest: Manifest) -> str:
        if self._custom_io is None:
            mxint8 = bool(manifest.options.get("mxint8_kv_cache"))
            return custom_io_text(custom_io_entries(manifest, fp16=self._fp16, mxint8_kv=mxint8))
        known = [spec.name for spec in (*manifest.inputs, *manifest.outputs)]
        known += [name for state in manifest.states for name in (state.input, state.output)]
        known += [name for spec in manifest.parameters for name in (spec.name, spec.name + RETAINED)]
        return read_custom_io(self._custom_io, known)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

"""The QNN target: a Cloud AI 100 program through the QNN tools (converter, then context-binary generator)."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import NoReturn

from QEfficient.errors import OptionError, QEfficientError, TargetUnavailableError
from QEfficient.targets import cloud_graph, cloud_options, cloud_shapes, qnn_files
from QEfficient.targets.base import Availability, CardSettings, CompileRequest
from QEfficient.targets.cloud_graph import ONNX_FILE, write_graph
from QEfficient.targets.cloud_memory import estimate
from QEfficient.targets.cloud_tool import run_tool
from QEfficient.targets.manifest import Manifest, Specialization
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.qaic import BINARY, COMMAND_JSON, COMMAND_TEXT, OWN_PARTITION
from QEfficient.targets.qaic_binary import is_stand_in
from QEfficient.targets.qaic_command import BINARY_DIR
from QEfficient.targets.qaic_partition import contract_json, tensor_slices
from QEfficient.targets.qnn_sdk import HOW_TO_GET, NOWHERE, VARIABLE, QnnSdk, find_qnn_sdk
from QEfficient.targets.tuning import Tuning

#: What the QNN path has no place for.
_NOT_HERE = (
    "mdp_num_partitions", "mdp_dump_partition_config", "node_precision_info", "use_onnx_subfunctions", "sdk_profile",
    "compiler_flags",
)  # fmt: skip


class QnnTarget:
    """The same graph and shapes as the ``qaic`` target, compiled by the QNN tools where ``QNN_SDK_ROOT`` says they are.

    Every file lies in the package it belongs to: two compiles share none. Without the SDK only a dry run is possible.
    """

    name = "qnn"

    def __init__(self) -> None:
        self._sdk = find_qnn_sdk()

    def check(self) -> Availability:
        if self._sdk is None:
            detail = f"{VARIABLE} is not set: only dry runs"
            return Availability(self.name, can_compile=False, can_run=False, detail=detail, missing=(HOW_TO_GET,))
        lacking = self._sdk.lacking()
        if lacking:
            detail = f"{VARIABLE} is {self._sdk.root}, which lacks {', '.join(Path(tool).name for tool in lacking)}"
            return Availability(self.name, can_compile=False, can_run=False, detail=detail, missing=(HOW_TO_GET,))
        detail = f"QNN {self._sdk.version or 'of unknown version'} in {self._sdk.root} compiles; running needs the card"
        return Availability(self.name, can_compile=True, can_run=False, detail=detail)

    def toolchain(self) -> dict[str, str]:
        if self._sdk is None or self._sdk.lacking():
            return {"qnn": "not installed"}
        return {"qnn": self._sdk.version or "unknown"}

    def transforms(self, task: str, options: CompileOptions) -> tuple[str, ...]:
        """The same graph as for ``qaic``; see `cloud_graph.transforms`."""
        return cloud_graph.transforms(options, task)

    def normalise(self, options: CompileOptions) -> CompileOptions:
        for field in _NOT_HERE:
            if getattr(options, field) not in (None, False, ()):
                raise OptionError(f"{field} is for target='qaic': the QNN tools take no such thing, leave it out.")
        if options.aic_hw_version == "ai200":
            raise OptionError("aic_hw_version='ai200' is for target='qaic': what QNN calls it is not documented.")
        qnn_files.check_config(options.qnn_config or {})
        return cloud_options.normalise(options, self.name)

    def specializations(self, options: CompileOptions, task: str) -> tuple[Specialization, ...]:
        """As for ``qaic``, but two at most."""
        if task == "training":
            raise OptionError("a training step is compiled with target='qaic': the QNN tools take no such graph.")
        found = cloud_shapes.specializations(options, task)
        if len(found) > qnn_files.MOST_GRAPHS:
            raise OptionError(
                f"the QNN tools make at most {qnn_files.MOST_GRAPHS} graphs and these options ask for {len(found)}: "
                "use target='qaic', or fewer lengths."
            )
        return found

    def compile(self, request: CompileRequest) -> Manifest:
        """Writes the graph, its weights, the tools' configuration and the two commands; runs them.

        Raises:
            TargetUnavailableError: there is no SDK and no dry run was asked for.
            OptionError: the options do not fit the graph. PackageError: the graph is not valid.
            QEfficientError: a tool failed, was killed or took too long.
        """
        options, place = request.options, request.directory
        if not options.dry_run and not self.check().can_compile:
            raise TargetUnavailableError(f"nothing can be compiled with QNN here: {HOW_TO_GET}.")
        sdk = self._sdk or QnnSdk(NOWHERE)
        model, manifest = write_graph(request)
        inputs = [str(value.name) for value in model.graph.inputs]
        outputs = [str(value.name) for value in model.graph.outputs]
        _write(place / qnn_files.CUSTOM_IO, qnn_files.custom_io_config(manifest, inputs, outputs))
        partition = self._partition(options, place)
        _write(place / qnn_files.BACKEND, qnn_files.backend_config(options, manifest, partition))
        _write(place / qnn_files.COMPILER, qnn_files.compiler_config(sdk))
        if options.mxint8_kv_cache:
            _write(place / qnn_files.DATA_FORMAT, qnn_files.data_format_config(manifest))
        config = options.qnn_config or {}
        commands = [
            qnn_files.converter_command(sdk, ONNX_FILE, config),
            qnn_files.generator_command(sdk, BINARY_DIR, config, data_format=options.mxint8_kv_cache),
        ]
        facts = {"sdk": self.toolchain()["qnn"], "dry_run": options.dry_run, "commands": commands}
        _write(place / COMMAND_JSON, json.dumps(facts, indent=2) + "\n")
        _write(place / COMMAND_TEXT, "".join(_shell(command) + "\n" for command in commands))
        runtime = {"dry_run": options.dry_run, "fp16": True, "memory": estimate(model, manifest, fp16=True).to_json()}
        if options.dry_run:
            return manifest.replace(program=ONNX_FILE, runtime=runtime)
        for number, command in enumerate(commands):
            request.progress(f"running {Path(command[0]).name}", number, len(commands))
            run_tool(command, place, time_limit=options.compile_timeout)
        _binary(place)
        return manifest.replace(program=BINARY, runtime=runtime, stand_in=is_stand_in(place / BINARY))

    def load(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        tuning: Tuning | None = None,
        card: CardSettings | None = None,
    ) -> NoReturn:
        """Raises TargetUnavailableError, always: how such a program names its inputs is not public."""
        kind = "is a dry run" if manifest.runtime.get("dry_run") else "was made by the QNN tools"
        raise TargetUnavailableError(
            f"{directory} {kind}, and this version cannot run what they make: compile for target='qaic' or 'host' to "
            "run it."
        )

    @staticmethod
    def _partition(options: CompileOptions, place: Path) -> str:
        """Writes a partition file where several devices share the model, and returns its name."""
        if options.mdp_load_partition_config is not None:
            _write(place / OWN_PARTITION, contract_json(options.mdp_load_partition_config))
            return OWN_PARTITION
        if (options.num_devices or 1) == 1:
            return ""
        _write(place / qnn_files.SLICING, contract_json(tensor_slices(options.num_devices or 1, None)))
        return qnn_files.SLICING


def _binary(place: Path) -> None:
    """Some releases append ``.bin`` once more."""
    twice = place / f"{BINARY}.bin"
    if twice.is_file() and not (place / BINARY).is_file():
        twice.rename(place / BINARY)
    if not (place / BINARY).is_file():
        raise QEfficientError(f"qnn-context-binary-generator ended well but wrote no {BINARY}: check the SDK.")


def _shell(command: list[str]) -> str:
    """A command for a shell; a dry run's stand for the SDK stays a variable of the shell's."""
    return " ".join(f'"{word}"' if word.startswith(NOWHERE) else shlex.quote(word) for word in command)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

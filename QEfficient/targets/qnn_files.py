"""The files the QNN tools take beside the graph, and their command lines, relative to the package they run in."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean
from QEfficient.targets.manifest import Dim, Manifest, Specialization
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.qaic_partition import contract_json
from QEfficient.targets.qnn_sdk import QnnSdk

CUSTOM_IO = "custom_io_config.yaml"
BACKEND, COMPILER = "qnn_compile_backend.json", "qnn_compiler_config.json"
DATA_FORMAT, SLICING = "qnn_data_format_config.json", "tensor_slicing.json"
DLC, CONTEXT = "model.dlc", "qnngraph.serialized"
#: Shapes come from the first two specializations: more graphs the tools do not make.
MOST_GRAPHS = 2

_EXTENSIONS = ("converter_args_extension", "context_binary_generator_args_extension")
_CONFIG_KEYS = (*_EXTENSIONS, "qnn_compilation_backend", "SKIP_QNN_CONVERTER_STEP")
#: What the extensions may not say, because this library says it.
_OURS = {
    _EXTENSIONS[0]: (
        "--input_network", "--output_path", "--config", "--float_bias_bitwidth", "--float_bitwidth",
        "--preserve_io_datatype", "--onnx_skip_simplification", "--target_backend",
    ),
    _EXTENSIONS[1]: (
        "--binary_file", "--backend_binary", "--output_dir", "--backend", "--model", "--dlc_path", "--config_file",
        "--data_format_config",
    ),
}  # fmt: skip
#: Further names the vendor documents, without their prefix.
_BACKEND_NAMES = (
    "buffer_dealloc_delay", "cluster_sizes", "combine_inputs", "combine_outputs", "compile_threads", "crc_stride",
    "do_host_preproc", "exclude_mxfp6_matmul", "max_out_channel_split", "mdp_load_partition_config",
)  # fmt: skip


def graph_names(specializations: Sequence[Specialization]) -> list[str]:
    """What the tools call the graphs they make, one for each specialization."""
    if len(specializations) == 1:
        return ["model"]
    return [f"model_configuration_{i}" for i in range(1, len(specializations) + 1)]


def custom_io_config(manifest: Manifest, inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """``custom_io_config.yaml``: types of all inputs and outputs in graph order, and the inputs' shapes.

    A shape is given once for each specialization where it differs, for ``input_ids`` and ``position_ids`` always. State
    travels as float16, or as bytes where it is MXINT8.
    """
    kinds, shapes = _types(manifest), _shapes(manifest)
    lines = ["Input Tensor Configuration:"]
    for name in inputs:
        lines += _entry(name, kinds[name])
        lines.append(f"    Shape: {_sizes(name, shapes[name], manifest.specializations)}")
    lines.append("Output Tensor Configuration:")
    for name in outputs:
        lines += _entry(name, kinds[name])
    return "\n".join(lines) + "\n"


def _entry(name: str, kind: str) -> list[str]:
    return [f"- Name: {name}", "  Desired Model Parameters:", f"    DataType: {kind}"]


def _types(manifest: Manifest) -> dict[str, str]:
    kinds = {spec.name: spec.dtype for spec in (*manifest.inputs, *manifest.outputs)}
    mxint8 = bool(manifest.options.get("mxint8_kv_cache"))
    for state in manifest.states:
        held = "uint8" if mxint8 and state.kind == "kv" else "float16" if "float" in state.dtype else state.dtype
        kinds |= {state.input: held, state.output: held}
    for spec in manifest.parameters:
        held = "float16" if "float" in spec.dtype else spec.dtype
        kinds |= {spec.name: held, f"{spec.name}_RetainedState": held}
    return kinds


def _shapes(manifest: Manifest) -> dict[str, tuple[Dim, ...]]:
    shapes = {spec.name: spec.shape for spec in (*manifest.inputs, *manifest.parameters)}
    return shapes | {state.input: state.shape for state in manifest.states}


def _sizes(name: str, shape: Sequence[Dim], specializations: Sequence[Specialization]) -> str:
    found = []
    for specialization in specializations:
        dims = [specialization.symbols[d].exact if isinstance(d, str) else d for d in shape]
        found.append(f"({', '.join(map(str, dims))}{',' if len(dims) == 1 else ''})")
    if len(set(found)) == 1 and name not in ("input_ids", "position_ids"):
        found = found[:1]
    return ", ".join(found)


def backend_config(options: CompileOptions, manifest: Manifest, partition: str) -> str:
    """``qnn_compile_backend.json``, with what the user's ``qnn_compilation_backend`` says instead."""
    content: dict[str, Any] = {
        "compiler_compilation_target": "hardware",
        "compiler_convert_to_FP16": True,
        "compiler_do_DDR_to_multicast": True,
        "compiler_enable_depth_first": options.aic_enable_depth_first,
        "compiler_hardware_version": "2.0",
        "compiler_mxfp6_matmul_weights": options.mxfp6_matmul,
        "compiler_mxint8_mdp_io": options.allow_mxint8_mdp_io,
        "compiler_num_of_cores": options.num_cores,
        "compiler_perfWarnings": False,
        "compiler_printDDRStats": False,
        "compiler_printPerfMetrics": False,
        "compiler_retained_state": bool(manifest.states or manifest.parameters),
        "compiler_stat_level": 10,
        "compiler_stats_batch_size": 1,
        "compiler_time_passes": False,
        "graph_names": graph_names(manifest.specializations),
    }
    if options.mos is not None:
        content["compiler_max_out_channel_split"] = str(options.mos)
    if partition:
        content["compiler_mdp_load_partition_config"] = partition
    given = (options.qnn_config or {}).get("qnn_compilation_backend", {})
    known = {*content, *(f"compiler_{name}" for name in _BACKEND_NAMES)}
    for key in given:
        if key not in known or key == "graph_names":
            raise OptionError(f"qnn_config: qnn_compilation_backend cannot set {key!r}.{did_you_mean(key, known)}")
    return contract_json({**content, **given})


def compiler_config(sdk: QnnSdk) -> str:
    """``qnn_compiler_config.json``: where the backend's configuration and its library are."""
    return contract_json({"backend_extensions": {"config_file_path": BACKEND, "shared_library_path": sdk.extensions}})


def data_format_config(manifest: Manifest) -> str:
    """``qnn_data_format_config.json``: the KV state is MXINT8, in every graph that is made."""
    held = [state for state in manifest.states if state.kind == "kv"]
    names = [*(state.input for state in held), *(state.output for state in held)]
    tensors = [{"tensor_name": name, "dataFormat": "QNN_TENSOR_DATA_FORMAT_MX"} for name in names]
    graphs = [{"graph_name": name, "tensors": tensors} for name in graph_names(manifest.specializations)]
    return json.dumps({"graphs": graphs}, indent=4)


def converter_command(sdk: QnnSdk, onnx: str, config: Mapping[str, Any]) -> list[str]:
    """ONNX to DLC."""
    return [
        sdk.converter,
        *("--input_network", onnx),
        *("--output_path", DLC),
        *("--config", CUSTOM_IO),
        *("--float_bias_bitwidth", "32"),
        *("--float_bitwidth", "16"),
        "--preserve_io_datatype",
        "--onnx_skip_simplification",
        *("--target_backend", "AIC"),
        *shlex.split(config.get(_EXTENSIONS[0], "")),
    ]


def generator_command(sdk: QnnSdk, binary_dir: str, config: Mapping[str, Any], *, data_format: bool) -> list[str]:
    """DLC to context binary; a log level of the user's replaces ours."""
    extension = shlex.split(config.get(_EXTENSIONS[1], ""))
    quiet = [] if any(word.split("=")[0] == "--log_level" for word in extension) else ["--log_level", "error"]
    return [
        sdk.generator,
        *("--binary_file", CONTEXT),
        *("--backend_binary", "programqpc.bin"),
        *("--output_dir", binary_dir),
        *("--backend", sdk.backend),
        *("--dlc_path", DLC),
        *("--config_file", COMPILER),
        *(("--data_format_config", DATA_FORMAT) if data_format else ()),
        *quiet,
        *extension,
    ]


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses a user's QNN configuration before anything is exported.

    Raises:
        OptionError: an unknown key, a value of another type, or an argument that is not the user's to give.
    """
    for key in config:
        if key not in _CONFIG_KEYS:
            hint = did_you_mean(key, _CONFIG_KEYS) or f" It has {', '.join(_CONFIG_KEYS)}."
            raise OptionError(f"qnn_config has no key {key!r}.{hint}")
    for key in _EXTENSIONS:
        text = config.get(key, "")
        if not isinstance(text, str):
            raise OptionError(f"qnn_config: {key} must be a text of arguments, got {type(text).__name__}.")
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise OptionError(f"qnn_config: {key} cannot be split into arguments ({error}).") from None
        for word in words:
            if word.split("=")[0] in _OURS[key]:
                raise OptionError(f"qnn_config: {key} may not say {word.split('=')[0]}, which compile() decides.")
    if not isinstance(config.get("qnn_compilation_backend", {}), Mapping):
        raise OptionError("qnn_config: qnn_compilation_backend must be an object of keys and values.")
    skip = config.get("SKIP_QNN_CONVERTER_STEP", False)
    if not isinstance(skip, bool):
        raise OptionError(f"qnn_config: SKIP_QNN_CONVERTER_STEP must be true or false, got {skip!r}.")
    if skip:
        raise OptionError(
            "qnn_config: SKIP_QNN_CONVERTER_STEP needs the model.dlc of another compile, and packages share no files: "
            "leave it out."
        )

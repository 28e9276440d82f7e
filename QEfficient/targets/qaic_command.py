"""The command line of the Cloud AI compiler, with paths relative to the package it runs in."""

from __future__ import annotations

from dataclasses import dataclass

from QEfficient.targets.manifest import Specialization
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.qaic_files import CUSTOM_IO, SPECIALIZATIONS
from QEfficient.targets.qaic_flags import arguments
from QEfficient.targets.qaic_precision import NODE_PRECISION
from QEfficient.targets.qaic_sdk import LEGACY, Profile

BINARY_DIR = "qpc"
MDP_DUMP = "mdp_dump.json"


@dataclass(frozen=True)
class Inputs:
    """What was written for the compiler besides the graph.

    Attributes:
        retained: the graph has states or parameters that stay in device memory.
        custom_io: whether there is an IO list.
        early_partition: a pipeline or a user's partition file, which stands before the options.
        sliced_partition: a tensor-slicing partition file, which stands after them.
    """

    onnx: str
    retained: bool
    custom_io: bool
    early_partition: str = ""
    sliced_partition: str = ""


def inference_command(
    compiler: str, profile: Profile, options: CompileOptions, given: Inputs, *, fp16: bool
) -> list[str]:
    """Sizes come from the specialization file. The order of the flags carries no meaning; it is fixed all the same."""
    if profile is LEGACY:
        return _legacy_command(compiler, options, given, fp16=fp16)
    return [
        compiler,
        "-aic-hw",
        f"-aic-hw-version={_hardware(profile, options)}",
        f"-m={given.onnx}",
        *_file("-mdp-load-partition-config", given.early_partition),
        *_switch("-retained-state", given.retained),
        *_switch("-convert-to-fp16", fp16),
        *_switch("-mxfp6-matmul", options.mxfp6_matmul),
        f"-aic-num-cores={options.num_cores}",
        *_tuning(options),
        *_more(options),
        *_switch("-compile-only", profile.compile_only),
        *_switch("-sub-functions", options.use_onnx_subfunctions),
        *_file("-mdp-load-partition-config", given.sliced_partition),
        f"-network-specialization-config={SPECIALIZATIONS}",
        *_switch(f"-custom-IO-list-file={CUSTOM_IO}", given.custom_io),
        f"-aic-binary-dir={BINARY_DIR}",
    ]


def _legacy_command(compiler: str, options: CompileOptions, given: Inputs, *, fp16: bool) -> list[str]:
    """The order in which the compile function for the older executable wrote its flags."""
    return [
        compiler,
        f"-m={given.onnx}",
        "-aic-hw",
        f"-aic-hw-version={LEGACY.hw_version}",
        f"-network-specialization-config={SPECIALIZATIONS}",
        *_switch("-convert-to-fp16", fp16),
        *_switch("-retained-state", given.retained),
        f"-aic-num-cores={options.num_cores}",
        *_switch(f"-custom-IO-list-file={CUSTOM_IO}", given.custom_io),
        "-compile-only",
        f"-aic-binary-dir={BINARY_DIR}",
        *_switch("-mxfp6-matmul", options.mxfp6_matmul),
        *([] if options.mos is None else [f"-mos={options.mos}"]),
        *_switch("-aic-enable-depth-first", options.aic_enable_depth_first),
        *_file("-mdp-load-partition-config", given.early_partition or given.sliced_partition),
        *_switch("-allow-mxint8-mdp-io", options.allow_mxint8_mdp_io),
        *_more(options),
    ]


def training_command(
    compiler: str, profile: Profile, options: CompileOptions, onnx: str, sizes: Specialization, *, fp16: bool
) -> list[str]:
    """A training step has one set of sizes, given by ``-onnx-define-symbol``, whose form no SDK release changed."""
    return [
        compiler,
        "-aic-hw",
        f"-aic-hw-version={_hardware(profile, options)}",
        *(f"-onnx-define-symbol={name},{size}" for name, size in sizes.symbols.items()),
        f"-aic-num-cores={options.num_cores}",
        *_tuning(options),
        *_more(options),
        *_switch("-compile-only", profile.compile_only),
        "-retained-state",
        *_switch("-convert-to-fp16", fp16),
        *_switch("-mxfp6-matmul", options.mxfp6_matmul),
        f"-m={onnx}",
        f"-custom-IO-list-file={CUSTOM_IO}",
        f"-aic-binary-dir={BINARY_DIR}",
    ]


def _hardware(profile: Profile, options: CompileOptions) -> str:
    return options.aic_hw_version if options.aic_hw_version == "ai200" else profile.hw_version


def _tuning(options: CompileOptions) -> list[str]:
    mos = [] if options.mos is None else [f"-mos={options.mos}"]
    return [
        *mos,
        *_switch("-aic-enable-depth-first", options.aic_enable_depth_first),
        *_switch("-allow-mxint8-mdp-io", options.allow_mxint8_mdp_io),
    ]


def _more(options: CompileOptions) -> list[str]:
    return [
        *_switch(f"-mdp-dump-partition-config={MDP_DUMP}", options.mdp_dump_partition_config),
        *_switch(f"-node-precision-info={NODE_PRECISION}", options.node_precision_info is not None),
        *arguments(options.compiler_flags),
    ]


def _switch(flag: str, on: bool) -> list[str]:
    return [flag] if on else []


def _file(flag: str, path: str) -> list[str]:
    return [f"{flag}={path}"] if path else []

"""The command line of the Cloud AI compiler, with paths relative to the package it runs in."""

from __future__ import annotations

from QEfficient.targets.manifest import Specialization
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.qaic_files import CUSTOM_IO, SPECIALIZATIONS
from QEfficient.targets.qaic_sdk import Profile

BINARY_DIR = "qpc"


def inference_command(
    compiler: str, profile: Profile, options: CompileOptions, onnx: str, *, retained: bool, custom_io: bool, fp16: bool
) -> list[str]:
    """Sizes come from the specialization file. The order of the flags carries no meaning; it is fixed all the same.

    Args:
        retained: the graph has states or parameters that stay in device memory.
        custom_io: an IO list was written.
    """
    return [
        compiler,
        "-aic-hw",
        f"-aic-hw-version={profile.hw_version}",
        f"-m={onnx}",
        *_switch("-retained-state", retained),
        *_switch("-convert-to-fp16", fp16),
        *_switch("-mxfp6-matmul", options.mxfp6_matmul),
        f"-aic-num-cores={options.num_cores}",
        *_tuning(options),
        *_switch("-compile-only", profile.compile_only),
        f"-network-specialization-config={SPECIALIZATIONS}",
        *_switch(f"-custom-IO-list-file={CUSTOM_IO}", custom_io),
        f"-aic-binary-dir={BINARY_DIR}",
    ]


def training_command(
    compiler: str, profile: Profile, options: CompileOptions, onnx: str, sizes: Specialization, *, fp16: bool
) -> list[str]:
    """A training step has one set of sizes, given by ``-onnx-define-symbol``, whose form no SDK release changed."""
    return [
        compiler,
        "-aic-hw",
        f"-aic-hw-version={profile.hw_version}",
        *(f"-onnx-define-symbol={name},{size}" for name, size in sizes.symbols.items()),
        f"-aic-num-cores={options.num_cores}",
        *_tuning(options),
        *_switch("-compile-only", profile.compile_only),
        "-retained-state",
        *_switch("-convert-to-fp16", fp16),
        *_switch("-mxfp6-matmul", options.mxfp6_matmul),
        f"-m={onnx}",
        f"-custom-IO-list-file={CUSTOM_IO}",
        f"-aic-binary-dir={BINARY_DIR}",
    ]


def _tuning(options: CompileOptions) -> list[str]:
    mos = [] if options.mos is None else [f"-mos={options.mos}"]
    return [*mos, *_switch("-aic-enable-depth-first", options.aic_enable_depth_first)]


def _switch(flag: str, on: bool) -> list[str]:
    return [flag] if on else []

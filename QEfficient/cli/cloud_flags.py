"""The options of `CompileOptions` that only a Cloud AI target acts on, as command-line flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from QEfficient.errors import OptionError

_PANEL = "Cloud AI"


def _option(flag: str, help_text: str, metavar: str | None = None) -> Any:
    return typer.Option(flag, help=help_text, metavar=metavar, rich_help_panel=_PANEL, show_default=False)


# Defaults are those of CompileOptions, which alone decides what they mean (a test compares them).
@dataclass(frozen=True)
class CloudFlags:
    """What a compile for Cloud AI can be asked for besides the flags every target records."""

    prefill_only: Annotated[
        bool | None, _option("--prefill-only/--decode-only", "Compile the prompt's sizes alone, or decoding's.")
    ] = None
    num_speculative_tokens: Annotated[
        list[int] | None, _option("--num-speculative-tokens", "Tokens a draft proposes per step; may be repeated.", "N")
    ] = None
    ccl_enabled: Annotated[
        bool, _option("--ccl-enabled", "Compute with shorter contexts where they do; lengths are chosen.")
    ] = False
    comp_ctx_lengths_prefill: Annotated[
        list[str] | None,
        _option("--comp-ctx-lengths-prefill", "Context lengths for prompts: 512,1024; may be repeated.", "N,N"),
    ] = None
    comp_ctx_lengths_decode: Annotated[
        list[str] | None,
        _option("--comp-ctx-lengths-decode", "Context lengths for decoding: 512,1024; may be repeated.", "N,N"),
    ] = None
    aic_hw_version: Annotated[str | None, _option("--aic-hw-version", "Hardware: ai100 or ai200.", "NAME")] = None
    sdk_profile: Annotated[
        str | None, _option("--sdk-profile", "Forms of an SDK release: legacy, 1.21 or current.", "NAME")
    ] = None
    mdp_num_partitions: Annotated[int | None, _option("--mdp-num-partitions", "Stages of a pipeline.", "N")] = None
    mdp_load_partition_config: Annotated[
        Path | None, _option("--mdp-load-partition-config", "A partition file of your own.", "FILE")
    ] = None
    mdp_dump_partition_config: Annotated[
        bool, _option("--mdp-dump-partition-config", "Let the compiler write its node names to mdp_dump.json.")
    ] = False
    node_precision_info: Annotated[
        str | None, _option("--node-precision-info", "A node precision file, or norms to make one.", "FILE")
    ] = None
    use_onnx_subfunctions: Annotated[
        bool, _option("--use-onnx-subfunctions", "Let the compiler keep local functions as units.")
    ] = False
    qnn_config: Annotated[Path | None, _option("--qnn-config", "A QNN configuration of your own.", "FILE")] = None
    compiler_flags: Annotated[
        list[str] | None,
        _option(
            "--compiler-flag", "A documented flag of the compiler, e.g. ols=2 or ddr_stats; repeat.", "NAME[=VALUE]"
        ),
    ] = None
    compile_timeout: Annotated[
        int | None, _option("--compile-timeout", "Seconds the vendor's compiler may take.", "N")
    ] = None


def cloud_values(flags: CloudFlags) -> dict[str, Any]:
    """What the flags ask for, in the form `CompileOptions.from_kwargs` takes.

    Raises:
        OptionError: a compiler flag without a name, or a length that is no number.
    """
    values = {name: value for name, value in vars(flags).items() if value is not None and value != []}
    for name in ("comp_ctx_lengths_prefill", "comp_ctx_lengths_decode"):
        if name in values:
            lengths = whole_numbers(",".join(values[name]))
            if lengths is None:
                flag = f"--{name.replace('_', '-')}"
                raise OptionError(f"{flag} takes whole numbers, got {','.join(values[name])!r}: write 512,1024.")
            values[name] = lengths
    given = []
    for text in values.pop("compiler_flags", ()):
        name, equals, value = text.lstrip("-").partition("=")
        if not name:
            raise OptionError(f"--compiler-flag {text!r} has no name: write for example ols=2.")
        given.append((name.replace("-", "_"), value if equals else True))
    return {**values, "compiler_flags": tuple(given)} if given else values


def whole_numbers(text: str) -> tuple[int, ...] | None:
    """``"0,1"`` -> (0, 1); None for anything else."""
    parts = [part.strip() for part in text.split(",")]
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else None

"""The fields of `CompileOptions` as command-line flags, in three groups."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from QEfficient.cli.cloud_flags import CloudFlags, cloud_values, whole_numbers
from QEfficient.errors import OptionError
from QEfficient.targets.options import CompileOptions

_SIMULATED = "Cloud AI, and the host with --simulate qaic"
_SHAPES, _ENCODER, _TARGET = "Shapes", "Encoder shapes", "Target"


def _size(help_text: str, panel: str = _SHAPES) -> Any:
    return typer.Option(metavar="N", min=1, help=help_text, rich_help_panel=panel, show_default=False)


def _switch(flag: str, help_text: str, where: str = "Cloud AI only") -> Any:
    return typer.Option(flag, help=f"{help_text} ({where})", rich_help_panel=_TARGET)


# Defaults are those of CompileOptions, which alone decides what they mean (a test compares them).
@dataclass(frozen=True)
class ShapeFlags:
    """Batch and lengths of a causal model."""

    ctx_len: Annotated[int | None, _size("Room for prompt and generated tokens together, in tokens.")] = None
    prefill_seq_len: Annotated[int | None, _size("Most prompt tokens per step; longer prompts take more steps.")] = None
    batch_size: Annotated[int | None, _size("Rows per call; any number by default.")] = None
    full_batch_size: Annotated[
        int | None, _size("Slots for continuous batching: a finished prompt makes room for the next.")
    ] = None
    kv_cache_batch_size: Annotated[
        int | None, _size("Rows of KV cache, when there are more than slots (needs --full-batch-size).")
    ] = None


@dataclass(frozen=True)
class EncoderFlags:
    """Lengths of an encoder."""

    seq_len: Annotated[
        list[int] | None, _size("Longest input in tokens; repeat to compile several lengths.", _ENCODER)
    ] = None


@dataclass(frozen=True)
class TargetFlags:
    """Where the package runs, and options that only a Cloud AI target acts on."""

    target: Annotated[
        str,
        typer.Option(metavar="NAME", help="Where the package runs; see qefficient doctor.", rich_help_panel=_TARGET),
    ] = "host"
    weights: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="How matrices are stored: fp32 (as in the checkpoint), int8, int4 or mixed. (host only)",
            rich_help_panel=_TARGET,
        ),
    ] = "fp32"
    group_size: Annotated[
        int | None,
        _size("Inputs that share a scale in int4: 16 to 256; smaller is more exact. (host only)", _TARGET),
    ] = None
    fuse: Annotated[
        bool,
        typer.Option(
            "--fuse/--no-fuse",
            help="Replace parts of the graph by larger operators; --no-fuse runs it as exported. (host only)",
            rich_help_panel=_TARGET,
        ),
    ] = True
    prepack: Annotated[
        bool,
        typer.Option(
            "--prepack/--no-prepack",
            help="Keep int8 and int4 matrices as kernels read them, too: opens sooner, takes more disk. (host only)",
            rich_help_panel=_TARGET,
        ),
    ] = True
    simulate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compute in the number formats of a card: qaic. (host only)",
            rich_help_panel=_TARGET,
            show_default=False,
        ),
    ] = None
    num_cores: Annotated[int | None, _size("Cores of the accelerator. (Cloud AI only)", _TARGET)] = None
    num_devices: Annotated[int | None, _size("Accelerators to spread the model over. (Cloud AI only)", _TARGET)] = None
    device_group: Annotated[
        str | None,
        typer.Option(
            metavar="IDS",
            help="Ids of the accelerators, e.g. 0,1. (Cloud AI only)",
            rich_help_panel=_TARGET,
            show_default=False,
        ),
    ] = None
    mxfp6_matmul: Annotated[bool, _switch("--mxfp6-matmul", "Weights of matrix products as MXFP6.", _SIMULATED)] = False
    mxint8_kv_cache: Annotated[bool, _switch("--mxint8-kv-cache", "KV cache as MXINT8.", _SIMULATED)] = False
    mos: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Effort to reduce on-chip memory. (Cloud AI only)",
            rich_help_panel=_TARGET,
            show_default=False,
        ),
    ] = None
    aic_enable_depth_first: Annotated[bool, _switch("--aic-enable-depth-first", "Schedule depth first.")] = False
    allow_mxint8_mdp_io: Annotated[bool, _switch("--allow-mxint8-mdp-io", "MXINT8 between accelerators.")] = False
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Write what the target's compiler takes, without compiling. (Cloud AI only)",
            rich_help_panel=_TARGET,
        ),
    ] = False


def asked(*groups: ShapeFlags | EncoderFlags | TargetFlags | CloudFlags) -> CompileOptions:
    """The options that the flags of these groups ask for; OptionError when they contradict each other."""
    values: dict[str, Any] = {}
    for group in groups:
        values |= cloud_values(group) if isinstance(group, CloudFlags) else dataclasses.asdict(group)
    if values.get("device_group") is not None:
        values["device_group"] = device_ids(values["device_group"])
    return CompileOptions.from_kwargs(**values)


def device_ids(text: str) -> tuple[int, ...]:
    """``"[0,1]"`` or ``"0,1"`` -> (0, 1); OptionError for anything else."""
    ids = whole_numbers(text.strip().removeprefix("[").removesuffix("]"))
    if ids is None:
        raise OptionError(f"device-group {text!r} is not a list of device ids: write for example 0,1.")
    return ids


def flags_set(options: CompileOptions) -> list[str]:
    """The flags that made ``options`` differ from the defaults."""
    default = CompileOptions()
    names = [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != getattr(default, f.name)]
    return [f"--{'no-' * (getattr(default, name) is True)}{name.replace('_', '-')}" for name in names]

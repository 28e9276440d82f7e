"""``qefficient compile``: checkpoint or ONNX export to a package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from QEfficient.cli.cache import human_size
from QEfficient.cli.cloud_flags import CloudFlags
from QEfficient.cli.common import CacheDir, ModelOrGraph, OutputDir, Pooling, Task, Transforms, TrustRemoteCode
from QEfficient.cli.compile_flags import EncoderFlags, ShapeFlags, TargetFlags, asked
from QEfficient.cli.opening import is_package
from QEfficient.errors import OptionError

if TYPE_CHECKING:
    from QEfficient.targets.manifest import Manifest


def compile(
    model: ModelOrGraph,
    shapes: ShapeFlags,
    encoder: EncoderFlags,
    target: TargetFlags,
    cloud: CloudFlags,
    output: OutputDir = None,
    transform: Transforms = None,
    task: Task = None,
    pooling: Pooling = None,
    cache_dir: CacheDir = None,
    trust_remote_code: TrustRemoteCode = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also list what each transform changed, and what it left and why.")
    ] = False,
) -> None:
    """Makes a package that runs without torch and without the checkpoint, and prints its path.

    A summary goes to stderr.
    The package is kept in the cache; --output also copies it to a place of its own.
    A dry run for Cloud AI also prints the command that would compile it.

    [bold]Examples[/bold]

    qefficient compile ./my-model --ctx-len 2048 --output ./my-package
    qefficient compile ./my-model --weights int4 --explain
    qefficient compile ./my-model --target qaic --dry-run --num-cores 14 --num-devices 4 --mxfp6-matmul --output ./aic
    qefficient compile ./my-encoder --pooling mean --seq-len 128 --seq-len 512
    qefficient compile ./my-model --transform FP16Clip --transform SplitWeights:max_shard_size=1GB
    """
    options = asked(shapes, encoder, target, cloud).to_json()
    if is_package(model):
        raise OptionError(f"{model} is a package already: name the checkpoint or the model.onnx it was made from.")
    package, _ = compiled(
        model,
        output,
        options,
        transforms=transform or (),
        task=task,
        pooling=pooling,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
    )
    summarize(package)
    if explain:
        print_transforms(package)
        print_memory(package)
    command = package / "command.txt"
    if options.get("dry_run") and command.is_file():
        typer.echo(f"# in {package}:\n{command.read_text(encoding='utf-8').strip()}")
    typer.echo(package)


def compiled(
    model: str,
    output: Path | None,
    options: dict[str, Any],
    *,
    transforms: Sequence[str] = (),
    task: str | None = None,
    pooling: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[Path, Path]:
    """The package of a checkpoint or an exported graph, and the graph it was made from.

    Raises:
        OptionError: a flag that cannot change a graph which is exported already.
    """
    if model.endswith(".onnx"):
        named = [("--task", task), ("--pooling", pooling), ("--trust-remote-code", trust_remote_code)]
        extra = [flag for flag, value in named if value]
        if extra:
            raise OptionError(f"{model} is exported already, {extra[0]} cannot change it: leave it out.")
        from QEfficient.api import compile as compile_onnx

        package = compile_onnx(model, output, transforms=transforms, cache_home_dir=cache_dir, **options)
        return package, Path(model)
    from QEfficient.api import wrap

    wrapped = wrap(model, task=task, pooling=pooling, trust_remote_code=trust_remote_code, cache_home_dir=cache_dir)
    package = wrapped.compile(compile_dir=output, transforms=transforms, **options)
    assert wrapped.onnx_path is not None
    return package, wrapped.onnx_path


def summarize(package: Path) -> None:
    """Prints what is in a package, as a table on stderr."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from QEfficient.targets.manifest import Manifest

    manifest = Manifest.load(package)
    table = Table(show_header=False)
    table.add_row("model", escape(str(manifest.model.get("name"))))
    table.add_row("task, target", f"{manifest.task}, {manifest.target}")
    table.add_row("specializations", escape("\n".join(str(spec) for spec in manifest.specializations)))
    table.add_row("transforms", escape(", ".join(str(t["name"]) for t in manifest.transforms)) or "none")
    state = _state(manifest)
    if state:
        table.add_row("state", state)
    table.add_row("size", human_size(sum(file.size for file in manifest.files.values())))
    Console(stderr=True).print(table)


def _state(manifest: Manifest) -> str:
    """What a person must know before relying on the package; empty for one that was compiled."""
    if manifest.stand_in:
        return "made by a stand-in of the toolchain: it holds no program and runs nowhere"
    return "a dry run: nothing was compiled" if manifest.runtime.get("dry_run") else ""


def print_transforms(package: Path) -> None:
    """Prints what the manifest says about each transform that ran, as a table on stderr."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from QEfficient.targets.manifest import Manifest

    table = Table("program", "transform", "what it did")
    for record in Manifest.load(package).transforms:
        facts = record.get("facts") or {}
        lines = [line for name, value in facts.items() for line in _fact_lines(name, value)]
        table.add_row(record.get("program") or "all", str(record["name"]), escape("\n".join(lines) or "nothing to do"))
    Console(stderr=True).print(table)


def print_memory(package: Path) -> None:
    """Prints what a Cloud AI package needs of a device's memory, as far as that can be estimated, on stderr."""
    from rich.console import Console
    from rich.table import Table

    from QEfficient.targets.manifest import Manifest

    memory = Manifest.load(package).runtime.get("memory")
    if not memory:
        return
    table = Table("Device memory (estimate)", f"on each of {memory['devices']}")
    table.add_row("weights", human_size(memory["weights_bytes"]))
    table.add_row("state between steps (KV)", human_size(memory["kv_bytes"]))
    Console(stderr=True).print(table)


def _fact_lines(name: str, value: Any) -> list[str]:
    """A fact in words; places that were left for one reason are counted together."""
    label = name.replace("_", " ")
    if not isinstance(value, dict):
        return [
            f"{label}: {value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{label}: {value}"
        ]
    if name == "left":
        by_reason: dict[str, list[str]] = {}
        for place, reason in value.items():
            by_reason.setdefault(str(reason), []).append(str(place))
        return [
            f"left {', '.join(places[:3])}{f' and {len(places) - 3} more' if len(places) > 3 else ''}: {reason}"
            for reason, places in by_reason.items()
        ]
    return [f"{label}: {', '.join(f'{count} {kind}' for kind, count in value.items() if count)}"] if value else []

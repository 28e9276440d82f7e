"""``qefficient check``: would this model compile for Cloud AI?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from QEfficient.cli.cloud_flags import CloudFlags
from QEfficient.cli.common import CacheDir, ModelOrGraph, Pooling, Task, TrustRemoteCode
from QEfficient.cli.compile import compiled
from QEfficient.cli.compile_flags import EncoderFlags, ShapeFlags, TargetFlags, asked
from QEfficient.errors import OptionError, TransformError, UnsupportedModelError


def check(
    model: ModelOrGraph,
    shapes: ShapeFlags,
    encoder: EncoderFlags,
    target: TargetFlags,
    cloud: CloudFlags,
    task: Task = None,
    pooling: Pooling = None,
    cache_dir: CacheDir = None,
    trust_remote_code: TrustRemoteCode = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Check the exported graph as it is, before this library fits it to the card.")
    ] = False,
) -> None:
    """Says what in a model's graph the Cloud AI compiler would refuse, and what nobody has shown it to take.

    Needs no SDK. Exits with 1 when a documented rule is broken; operators that are merely unknown are listed.

    [bold]Examples[/bold]

    qefficient check ./my-model --target qaic --ctx-len 2048
    qefficient check ./my-model --target qaic --raw
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from QEfficient.onnx_io import load_model
    from QEfficient.targets.cloud_check import check_graph, operators
    from QEfficient.targets.manifest import Manifest

    options = asked(shapes, encoder, target, cloud).replace(dry_run=True)
    if options.target not in ("qaic", "qnn"):
        raise OptionError("check is for Cloud AI: pass --target qaic or --target qnn.")
    console = Console()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            package, exported = compiled(
                model,
                Path(scratch) / "package",
                options.to_json(),
                task=task,
                pooling=pooling,
                cache_dir=cache_dir,
                trust_remote_code=trust_remote_code,
            )
            manifest = Manifest.load(package)
            path = exported if raw else package / "model.onnx"
            graph = load_model(path)
            findings = check_graph(graph, manifest, path)
    except (TransformError, UnsupportedModelError) as error:
        console.print(f"It would not compile: {error}", markup=False)
        raise typer.Exit(1) from None
    counts = operators(graph)
    console.print(
        f"{sum(counts.values())} nodes of {len(counts)} operators; {len(manifest.specializations)} sets of sizes."
    )
    if findings:
        table = Table("", "Finding", "What to change")
        for finding in findings:
            table.add_row("wrong" if finding.certain else "unknown", escape(finding.what), escape(finding.change))
        console.print(table)
    wrong = sum(finding.certain for finding in findings)
    if wrong:
        console.print(f"It would not compile: {wrong} documented rule{'s are' if wrong > 1 else ' is'} broken.")
        raise typer.Exit(1)
    console.print("No documented rule is broken. Whether it compiles, only the SDK's compiler can say.")

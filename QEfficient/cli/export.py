"""``qefficient export``: checkpoint to ONNX."""

from __future__ import annotations

from typing import Annotated

import typer

from QEfficient.cli.common import CacheDir, Checkpoint, OutputDir, Pooling, Task, TrustRemoteCode


def export(
    model: Checkpoint,
    output: OutputDir = None,
    task: Task = None,
    pooling: Pooling = None,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Give the graph the batch_index input.")
    ] = False,
    cache_dir: CacheDir = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Writes a model as an ONNX graph and prints the path of model.onnx.

    The weights are not copied into the graph: they lie beside it, under their own names.

    [bold]Examples[/bold]

    qefficient export ./my-model --output ./my-model-onnx
    qefficient export ./my-encoder --pooling mean
    """
    from QEfficient.api import export as run

    path = run(
        model,
        output,
        task=task,
        pooling=pooling,
        continuous_batching=continuous_batching,
        trust_remote_code=trust_remote_code,
        cache_home_dir=cache_dir,
    )
    typer.echo(path)

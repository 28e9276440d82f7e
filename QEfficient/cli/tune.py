"""``qefficient tune``: measures how a package runs fastest on this machine and remembers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from QEfficient.errors import OptionError


def tune(
    package: Annotated[Path, typer.Argument(help="A package directory that compile printed.", show_default=False)],
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each choice; medians are compared.")] = 5,
    show: Annotated[bool, typer.Option("--show", help="Only print what was chosen before.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Go back to the defaults.")] = False,
) -> None:
    """Measures threads, how they wait, and prompt step sizes; the package opens with the best ones from then on.

    The choice is kept in the cache directory, for this package and this kind of processor; the package is not changed.
    Close other programs first: the numbers are only as good as the machine is quiet.

    [bold]Examples[/bold]

    qefficient tune ./my-package
    qefficient tune ./my-package --show
    """
    from rich.console import Console
    from rich.table import Table

    from QEfficient.engine.tune import tune as measure
    from QEfficient.progress import bar
    from QEfficient.targets import tuning
    from QEfficient.targets.manifest import Manifest

    if show and forget:
        raise OptionError("--show and --forget exclude each other: give one.")
    manifest, cores = Manifest.load(package), tuning.available_cores()
    if forget:
        typer.echo("forgotten" if tuning.forget(manifest, cores) else "nothing was chosen before")
        return
    if show:
        typer.echo(tuning.recall(manifest, cores) or "nothing was chosen before: run qefficient tune")
        return
    with bar(f"tuning {package.name}", None) as report:
        trials = measure(package, rounds=rounds, report=report)
    table = Table("choice", "prompt tokens/s", "generated tokens/s")
    for trial in trials:
        decode = f"{trial.decode:.1f}" if trial.decode else ""
        table.add_row(str(trial.tuning), f"{trial.prompt:.0f}", decode)
    Console(stderr=True).print(table)
    tuning.remember(manifest, cores, trials[0].tuning)
    typer.echo(trials[0].tuning)

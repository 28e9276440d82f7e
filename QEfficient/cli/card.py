"""``qefficient card``: the model card of a fine-tuning run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def card(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The --output of qefficient finetune.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and write nothing.")] = False,
) -> None:
    """Writes README.md of a run: data, options, loss before and after, cost, parity, versions.

    Every number was measured by the run and is read from the files it left; what was not measured is left out. A run
    writes its card itself at the end. A README.md of your own is never replaced.

    [bold]Examples[/bold]

    qefficient card tuned
    qefficient card tuned --dry-run
    """
    from QEfficient.finetune.card import card_text, write_card

    typer.echo(card_text(directory).rstrip() if dry_run else str(write_card(directory)))

"""``qefficient merge``: adapter and base model become one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from QEfficient.cli.common import TrustRemoteCode


def merge(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="An adapter directory, such as --output of finetune, or a hub id."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new directory.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base model, instead of the one the adapter names.", show_default=False),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Compare the logits of this text; repeat for several."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(metavar="X", min=0, help="Largest difference of a logit, relative to the largest.")
    ] = 1e-3,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merges a LoRA adapter into its base model and checks that the result answers as the two did.

    Logits of a few prompts are compared before and after; the largest difference is printed and kept in merge.json.
    When it is more than rounding, nothing is written.

    [bold]Examples[/bold]

    qefficient merge tuned --output merged
    qefficient merge tuned --output merged --base ./my-model --prompt "Question: What is 2 + 2?"
    """
    from QEfficient.finetune.merge import merge_adapter
    from QEfficient.progress import bar

    with bar("merging") as report:
        done = merge_adapter(
            adapter,
            output,
            base,
            prompt,
            tolerance=tolerance,
            trust_remote_code=trust_remote_code,
            report=report,
        )
    typer.echo(str(done), err=True)
    typer.echo(str(output))

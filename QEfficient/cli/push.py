"""``qefficient push``: publishes a tuned model on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from QEfficient.cli.cache import human_size


def push(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The --output of qefficient finetune or qefficient merge.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="A model repository, such as my-name/my-model.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; one that exists stays as it is.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and upload nothing.")] = False,
) -> None:
    """Uploads a tuned model to the Hugging Face hub and prints its address.

    Weights, configuration, tokenizer, card and picture go; checkpoints, optimizer, compiled packages, logs, and files
    that name places on this machine or quote the data stay. The list is shown first, and you are asked.
    The token is that of `hf auth login`, or HF_TOKEN.

    [bold]Examples[/bold]

    qefficient push tuned my-name/my-adapter --dry-run
    qefficient push tuned my-name/my-adapter --private
    """
    from QEfficient.finetune.push import check_access, pack
    from QEfficient.finetune.push import push as upload

    parcel = pack(directory)
    if not dry_run:
        check_access(repo_id)
    for name, size in parcel.files.items():
        typer.echo(f"  {name}  {human_size(size)}", err=True)
    typer.echo(
        f"stays here: {', '.join(f'{name} ({why})' for name, why in parcel.left.items()) or 'nothing'}", err=True
    )
    if parcel.base_model is not None:
        typer.echo(
            f"note: adapter_config.json names the base model as {parcel.base_model}, which is on this machine only.",
            err=True,
        )
    question = f"{len(parcel.files)} files, {human_size(parcel.size)}, to {repo_id}"
    if dry_run:
        typer.echo(question, err=True)
        return
    if not yes:
        typer.confirm(f"Upload {question}?", abort=True, err=True)
    typer.echo(upload(parcel, repo_id, private=private))

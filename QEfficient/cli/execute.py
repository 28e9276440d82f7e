"""``qefficient execute``: run a package as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from QEfficient.cli.answers import Stream, answer, streams
from QEfficient.cli.common import AsJson, Threads
from QEfficient.cli.text_flags import GenerationFlags, PromptFlags
from QEfficient.cli.vectors import TextFlags, print_labels, print_vectors
from QEfficient.errors import InputError, OptionError


def execute(
    package: Annotated[
        Path, typer.Argument(metavar="PACKAGE", help="The directory that compile printed.", show_default=False)
    ],
    prompts: PromptFlags,
    texts: TextFlags,
    generation: GenerationFlags,
    stream: Stream = None,
    as_json: AsJson = False,
    threads: Threads = None,
    device_group: Annotated[
        str | None,
        typer.Option(metavar="IDS", help="Ids of the accelerators, e.g. 0,1. (Cloud AI only)", show_default=False),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip comparing every file with its digest in the manifest.")
    ] = False,
) -> None:
    """Runs a compiled package; needs neither torch nor the checkpoint.

    Packages of causal models take prompts.
    Embedding and classification packages take texts and print one JSON object per text.

    [bold]Examples[/bold]

    qefficient execute ./my-package --prompt "Once upon a time" --generation-len 64
    qefficient execute ./my-classifier-package --text "what a film"
    """
    from QEfficient.cli.compile_flags import device_ids
    from QEfficient.engine.package import open_package

    if prompts.given and texts.given:
        raise InputError("prompts are for causal packages, texts for encoders: give one kind.")
    devices = None if device_group is None else device_ids(device_group)
    with open_package(package, verify=not no_verify, threads=threads, device_ids=devices) as loaded:
        if loaded.manifest.task == "text-generation":
            if texts.given:
                raise InputError(f"{package} generates text: pass --prompt instead of --text.")
            lines = prompts.read()
            answer(
                loaded,
                lines,
                chat=prompts.chat,
                settings=generation.settings(),
                stream=streams(lines, stream, as_json),
                as_json=as_json,
            )
            return
        if prompts.given:
            raise InputError(f"{package} does {loaded.manifest.task}: pass --text instead of --prompt.")
        if generation.settings() or stream:
            raise OptionError(f"{package} does {loaded.manifest.task}: generation options have no meaning for it.")
        lines = texts.read()
        values = loaded.embed(lines)  # type: ignore[attr-defined]
        if loaded.manifest.task == "text-classification":
            print_labels(loaded, lines, values)
        else:
            print_vectors(lines, values)

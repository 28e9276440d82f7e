"""The ``qefficient`` program: one command per file beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

# Nothing heavy may be imported from here on: torch, transformers and ONNX Runtime wait inside the commands.
from QEfficient.cli import cache, data
from QEfficient.cli.card import card
from QEfficient.cli.check import check
from QEfficient.cli.command import add_command
from QEfficient.cli.compile import compile
from QEfficient.cli.doctor import doctor
from QEfficient.cli.embed import embed
from QEfficient.cli.execute import execute
from QEfficient.cli.export import export
from QEfficient.cli.finetune import finetune
from QEfficient.cli.infer import infer
from QEfficient.cli.merge import merge
from QEfficient.cli.push import push
from QEfficient.cli.quantize import quantize
from QEfficient.cli.tune import tune
from QEfficient.cli.validate import validate
from QEfficient.version import __version__

app = typer.Typer(
    name="qefficient",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    # An unexpected exception is a bug: a plain traceback is what a report needs.
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qefficient {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Runs any Hugging Face transformer as a compiled ONNX package on the CPU.

    [bold]Examples[/bold]

    qefficient infer ./my-model --prompt "Once upon a time"
    qefficient embed ./my-encoder --text "a cat" --text "a kitten" --similarity
    qefficient compile ./my-model --ctx-len 2048 --output ./my-package
    qefficient COMMAND --help
    """


for _command in (
    infer,
    embed,
    export,
    compile,
    quantize,
    execute,
    validate,
    check,
    tune,
    finetune,
    merge,
    card,
    push,
    doctor,
):
    add_command(app, _command, open_ended=_command is finetune)
app.add_typer(cache.app)
app.add_typer(data.app)

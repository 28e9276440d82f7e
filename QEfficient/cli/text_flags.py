"""Flags that say what to generate from, how to choose tokens and when to stop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from QEfficient.cli.common import check_texts
from QEfficient.errors import InputError
from QEfficient.lines import read_lines

_GENERATION = "Generation"


def _option(help_text: str, minimum: float | None = None, maximum: float | None = None) -> Any:
    metavar = "TEXT" if minimum is None else "N"
    return typer.Option(
        metavar=metavar, min=minimum, max=maximum, help=help_text, rich_help_panel=_GENERATION, show_default=False
    )


@dataclass(frozen=True)
class PromptFlags:
    """What to continue or answer."""

    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="Text to continue; repeat for several.", show_default=False
        ),
    ] = None
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="UTF-8 file with one prompt per line; - is standard input.", show_default=False
        ),
    ] = None
    message: Annotated[
        list[str] | None,
        typer.Option(
            "--message",
            "-m",
            metavar="TEXT",
            help="A user's message, put into the model's chat template; repeat for several conversations.",
            show_default=False,
        ),
    ] = None

    @property
    def given(self) -> bool:
        return bool(self.prompt or self.prompts_file or self.message)

    @property
    def chat(self) -> bool:
        """Whether the texts are messages for the chat template."""
        return bool(self.message)

    def read(self) -> list[str]:
        """The texts; InputError when there is none, an empty one, or two kinds."""
        prompts = [*(self.prompt or ()), *(read_lines(self.prompts_file) if self.prompts_file else ())]
        if prompts and self.message:
            raise InputError("--prompt and --message cannot be mixed: give one kind.")
        texts = prompts or list(self.message or ())
        if not texts:
            raise InputError("there is nothing to generate from: pass --prompt, --prompts-file or --message.")
        check_texts("message" if self.chat else "prompt", texts)
        return texts


@dataclass(frozen=True)
class GenerationFlags:
    """How to choose tokens. What is not given is as the model's generation_config.json says, else greedy."""

    generation_len: Annotated[
        int | None, _option("Most tokens to generate per prompt; to the end of the context by default.", 1)
    ] = None
    sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy",
            help="Draw tokens, or always take the most likely one.",
            rich_help_panel=_GENERATION,
            show_default=False,
        ),
    ] = None
    temperature: Annotated[float | None, _option("Below 1 is more certain, above 1 more varied.", 0)] = None
    top_k: Annotated[int | None, _option("Draw from the k most likely tokens; 0 is all of them.", 0)] = None
    top_p: Annotated[float | None, _option("Draw from the most likely tokens of this probability.", 0, 1)] = None
    min_p: Annotated[
        float | None, _option("Leave out tokens less likely than this fraction of the likeliest.", 0, 1)
    ] = None
    repetition_penalty: Annotated[float | None, _option("Above 1 makes repetition less likely.", 0)] = None
    seed: Annotated[int | None, _option("Makes draws repeatable.", 0)] = None
    stop: Annotated[list[str] | None, _option("Text that ends the answer; repeat for several.")] = None

    def settings(self) -> dict[str, Any]:
        """Keywords for `CompiledCausalLM.generate`: only what was given.

        Raises:
            OptionError: a value that no model accepts; said here, before minutes of compiling.
        """
        from QEfficient.engine.settings import GenerationSettings

        values = {
            "max_new_tokens": self.generation_len,
            "do_sample": self.sample,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop_strings": tuple(self.stop) if self.stop else None,
        }
        given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        GenerationSettings(**given)
        return given

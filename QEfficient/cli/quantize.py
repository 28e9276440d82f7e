"""``qefficient quantize``: a package with small weights, and what they save and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from QEfficient.cli.cache import human_size
from QEfficient.cli.common import CacheDir, Checkpoint, Task, TrustRemoteCode
from QEfficient.cli.compile_flags import ShapeFlags, TargetFlags, asked
from QEfficient.errors import OptionError


def quantize(
    model: Checkpoint,
    weights: Annotated[
        str, typer.Option("--weights", "-w", metavar="FORMAT", help="How matrices are stored: int8, int4 or mixed.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new directory.")],
    group_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Inputs that share a scale in int4 (128); smaller is more exact."),
    ] = None,
    ctx_len: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Room for prompt and generated tokens together.", show_default=False),
    ] = None,
    prepack: Annotated[
        bool,
        typer.Option("--prepack/--no-prepack", help="Keep matrices as this processor's kernels read them, too."),
    ] = True,
    measure: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXTFILE",
            help="Compare the perplexity of this UTF-8 text (- is standard input) with that of float32.",
            show_default=False,
        ),
    ] = None,
    task: Task = None,
    cache_dir: CacheDir = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compiles a model with weights in 8 or 4 bits, says how much smaller it became, and prints its directory.

    The same as qefficient compile --weights, which has every other option. With --measure, the model is compiled in
    float32 as well, and both are asked about the same text.

    [bold]Examples[/bold]

    qefficient quantize ./my-model --weights int4 --output my-package
    qefficient quantize merged --weights mixed --output my-package --measure held_out.txt
    """
    if weights == "fp32":
        raise OptionError("--weights fp32 quantizes nothing: use int8, int4 or mixed, or qefficient compile.")
    shape = ShapeFlags(ctx_len=ctx_len)
    options = asked(shape, TargetFlags(weights=weights, group_size=group_size, prepack=prepack)).to_json()
    from QEfficient.api import wrap
    from QEfficient.engine.package import open_package
    from QEfficient.evaluate.perplexity import Perplexity, perplexity
    from QEfficient.lines import read_lines

    text = None if measure is None else "\n".join(read_lines(measure))
    wrapped = wrap(model, task=task, trust_remote_code=trust_remote_code, cache_home_dir=cache_dir)
    if text is not None and wrapped.task != "text-generation":
        raise OptionError(
            f"--measure takes a model that generates text, and {model} does {wrapped.task}: leave it out."
        )

    def measured(package: Path) -> Perplexity:
        with open_package(package, verify=False) as opened:
            return perplexity(opened, text or "")  # type: ignore[arg-type]

    package = wrapped.compile(compile_dir=output, **options)
    typer.echo(_sizes(model, package, prepack), err=True)
    if text is not None:
        after = measured(package)
        before = measured(wrapped.compile(**asked(shape).to_json()))
        typer.echo(
            f"perplexity of {measure}: {before.value:.4f} in float32, {after.value:.4f} in {weights} "
            f"({after.value / before.value - 1:+.2%}, {after.tokens:,} tokens)",
            err=True,
        )
    typer.echo(package)


def _sizes(model: str, package: Path, prepack: bool) -> str:
    """The checkpoint's weights and all of the package's files, in bytes on disk."""
    from QEfficient.models.hub import resolve
    from QEfficient.safetensors_io import checkpoint_weights
    from QEfficient.targets.manifest import Manifest

    before = sum(ref.length for ref in checkpoint_weights(resolve(model)).values())
    after = sum(record.size for record in Manifest.load(package).files.values())
    extra = "; layouts for this processor are part of it, --no-prepack leaves them out" if prepack else ""
    return f"{human_size(before)} of weights became a package of {human_size(after)} ({after / before:.0%}){extra}"

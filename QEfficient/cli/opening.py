"""Whatever a user names - checkpoint, hub id or package - as a package that runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from QEfficient.cli.compile_flags import flags_set
from QEfficient.errors import InputError, OptionError
from QEfficient.targets.options import CompileOptions

if TYPE_CHECKING:
    from QEfficient.engine.package import LoadedPackage

#: Task of a package -> what runs it, for the message to someone who took the wrong command.
_COMMANDS = {
    "text-generation": "qefficient infer",
    "feature-extraction": "qefficient embed",
    "text-classification": "qefficient execute --text",
}


def is_package(model: str) -> bool:
    """Whether the name is a directory that `compile` wrote."""
    return (Path(model).expanduser() / "manifest.json").is_file()


def open_model(
    model: str,
    task: str,
    options: CompileOptions,
    *,
    transforms: Sequence[str],
    pooling: str | None,
    trust_remote_code: bool,
    cache_dir: Path | None,
    threads: int | None,
) -> LoadedPackage:
    """Loads a package, or compiles a checkpoint (or finds that in the cache) and loads the result.

    Raises:
        QEfficientError: its subclasses say what is wrong with the model, the options or the machine.
    """
    from QEfficient.engine.package import open_package

    if is_package(model):
        extra = [*flags_set(options), *(["--transform"] if transforms else []), *(["--pooling"] if pooling else [])]
        if extra:
            raise OptionError(
                f"{model} is compiled already, {extra[0]} cannot change it: leave it out or name the checkpoint."
            )
        return expect_task(open_package(Path(model), threads=threads), task)
    from QEfficient.api import wrap

    wrapped = wrap(model, task=task, pooling=pooling, trust_remote_code=trust_remote_code, cache_home_dir=cache_dir)
    package = wrapped.compile(transforms=transforms, **options.to_json())
    # Compiling has just checked or written every file.
    return open_package(package, verify=False, threads=threads)


def expect_task(package: LoadedPackage, task: str) -> LoadedPackage:
    """The package itself; InputError naming the right command when it does another task."""
    found = package.manifest.task
    if found != task:
        package.close()
        raise InputError(f"{package.directory} does {found}, not {task}: use {_COMMANDS[found]}.")
    return package

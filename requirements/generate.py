"""Writes a requirements file per layer from pyproject.toml, for whoever installs from files: `make requirements`.

core.txt is what a finished package needs to run, and each extra becomes a file of its own name that begins with the
layers it builds on. Versions are the ranges of pyproject.toml; constraints.txt, which is not written here, pins them:

    pip install -c requirements/constraints.txt -r requirements/finetune.txt
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORE = "core"
#: A layer is asked for as an extra of this project: ``qefficient[export]``.
_LAYERS = re.compile(r"qefficient\[([\w,-]+)\]")


def files() -> dict[str, str]:
    """Name of a file -> its text."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    layers = {CORE: project["dependencies"], **project["optional-dependencies"]}
    return {f"{name}.txt": _text(name, needs) for name, needs in layers.items()}


def _text(name: str, needs: list[str]) -> str:
    below, own = [] if name == CORE else [CORE], []
    for need in needs:
        match = _LAYERS.fullmatch(need)
        if match is None:
            own.append(need)
        else:
            # Each of them begins with core.
            below = match[1].split(",")
    lines = ["# Made from pyproject.toml by `make requirements`.", *(f"-r {layer}.txt" for layer in below), *own]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for file, text in files().items():
        (HERE / file).write_text(text, encoding="utf-8")

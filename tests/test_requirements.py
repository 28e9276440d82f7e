"""requirements/ is what pyproject.toml says, every layer of it, and the tested versions fit."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def declared(*extras: str) -> set[str]:
    """What pip installs for these extras, read from pyproject.toml as packaging reads it."""
    found = set(map(_plain, PROJECT["dependencies"]))
    for extra in extras:
        for line in EXTRAS[extra]:
            need = Requirement(line)
            found |= declared(*need.extras) if need.name == PROJECT["name"] else {_plain(line)}
    return found


def _plain(line: str) -> str:
    need = Requirement(line)
    return f"{canonicalize_name(need.name)} {need.specifier}"


def installed_by(file: Path) -> set[str]:
    """What `pip install -r` reads."""
    found = set()
    for line in file.read_text().splitlines():
        if line.startswith("-r "):
            found |= installed_by(file.parent / line.removeprefix("-r "))
        elif not line.startswith("#"):
            found.add(_plain(line))
    return found


def test_the_files_are_those_that_the_script_writes() -> None:
    made = runpy.run_path(str(PLACE / "generate.py"))["files"]()
    there = {path.name: path.read_text() for path in PLACE.glob("*.txt") if path.name != "constraints.txt"}
    assert there == made, "run `make requirements`"
    assert {"core.txt", "finetune.txt", "dev.txt"} <= there.keys()


@pytest.mark.parametrize("layer", ["core", *EXTRAS])
def test_a_layer_is_its_extra(layer: str) -> None:
    assert installed_by(PLACE / f"{layer}.txt") == declared(*([] if layer == "core" else [layer]))


def test_every_requirement_has_a_tested_version_that_fits() -> None:
    lines = [line for line in (PLACE / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for line in installed_by(PLACE / "dev.txt"):
        need = Requirement(line)
        assert need.specifier.contains(pins[need.name]), f"{line}, tested with {pins[need.name]}"


def test_the_core_has_neither_torch_nor_transformers() -> None:
    names = {line.split()[0] for line in installed_by(PLACE / "core.txt")}
    assert not names & {"torch", "transformers", "datasets", "peft"}

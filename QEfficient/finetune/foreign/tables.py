"""The tables of ``docs/migration.md``.

``python -m QEfficient.finetune.foreign.tables docs/migration.md`` writes them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from QEfficient.finetune.foreign.read import TOOLS
from QEfficient.finetune.foreign.tool import Tool

_Meaning = TypeVar("_Meaning")
_PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """``page`` with the table of each tool between its two marks."""
    return _PLACE.sub(lambda match: f"{match[1]}{table(TOOLS[match[2]])}{match[3]}", page)


def table(tool: Tool) -> str:
    """Every key of a tool: what it becomes, and what the tool does without it."""
    lines = ["", "| key | becomes | without it |", "|---|---|---|"]
    unchanged = [key for key, option in tool.same.items() if key == option and key not in tool.defaults]
    meanings = {key: f"`{option}`" for key, option in tool.same.items() if key not in unchanged} | dict(tool.handled)
    for (meaning, default), keys in _grouped({key: (what, _default(tool, key)) for key, what in meanings.items()}):
        lines.append(f"| {_listed(keys)} | {meaning} | {default} |")
    lines += ["", "| key | |", "|---|---|"]
    for what, group in (("no effect", tool.no_effect), ("refused", tool.refused)):
        lines += [f"| {_listed(keys)} | {what}: {why} |" for why, keys in _grouped(group)]
    if len(unchanged) > 10:
        lines += ["", "Every other name of `transformers.TrainingArguments` stays what it is."]
    elif unchanged:
        lines += ["", f"The same here: {_listed(unchanged)}."]
    return "\n".join(lines) + "\n\n"


def _default(tool: Tool, key: str) -> str:
    return f"`{tool.defaults[key]}`" if key in tool.defaults else ""


def _grouped(meanings: Mapping[str, _Meaning]) -> list[tuple[_Meaning, list[str]]]:
    """What means the same, together, in the order of the first."""
    found: dict[_Meaning, list[str]] = {}
    for key, what in meanings.items():
        found.setdefault(what, []).append(key)
    return list(found.items())


def _listed(keys: list[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.write_text(filled(place.read_text(encoding="utf-8")), encoding="utf-8")

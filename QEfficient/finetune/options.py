"""One flat set of options -> what is tuned (QEffConfig) and how (QEffTrainingArgs); and where an option belongs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune import arguments, config, lora
from QEfficient.finetune.arguments import QEffTrainingArgs
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.keywords import plain_types
from QEfficient.finetune.settings_file import parse_value, settings_text

#: Where an option is given -> its names there, other spellings included.
PLACES: dict[str, list[str]] = {
    "QEffConfig": [*(f.name for f in dataclasses.fields(QEffConfig)), *config.ALIASES],
    "QEffTrainingArgs": [
        *(f.name for f in dataclasses.fields(QEffTrainingArgs) if f.init), *arguments.ALIASES, *arguments.RENAMED
    ],
    "lora_config": list(dict.fromkeys([*lora.NAMES, *lora.IA3_NAMES, *lora.LORA_ALIASES])),
}  # fmt: skip


def split_options(given: Mapping[str, Any]) -> tuple[QEffConfig, QEffTrainingArgs]:
    """Sorts options by name; one that both know goes to the configuration.

    Raises:
        OptionError: an unknown option, with the nearest name, or a value one of the two refuses.
    """
    what: dict[str, Any] = {}
    how: dict[str, Any] = {}
    for name, value in given.items():
        if name in PLACES["QEffConfig"]:
            what[name] = value
            if name == "seed":
                how[name] = value
        elif name in PLACES["QEffTrainingArgs"]:
            how[name] = value
        else:
            elsewhere = where(name, "QEffConfig", "QEffTrainingArgs")
            raise OptionError(f"there is no option {name!r}.{elsewhere}{_of_another_tool(name)}")
    return QEffConfig(**what), QEffTrainingArgs(**how)


def _of_another_tool(name: str) -> str:
    """A sentence, or nothing: how a file of another tool that has such a key is read."""
    from QEfficient.finetune.foreign.read import TOOLS

    known = [tool for tool in TOOLS.values() if name in tool.keys]
    if not known:
        return ""
    titles, words = " or ".join(tool.title for tool in known), " or ".join(f"--from {tool.name}" for tool in known)
    return f" In a file of {titles} it is read with {words}."


def resolved(what: QEffConfig, how: QEffTrainingArgs) -> dict[str, Any]:
    """One flat set of options that makes the same run: all of ``what``, and what differs from the defaults of ``how``.

    Tokens are left out.
    """
    usual = QEffTrainingArgs().to_dict()
    changed = {k: v for k, v in how.to_dict().items() if v != usual.get(k) and not k.endswith("_token")}
    changed.pop("seed", None)  # one option of both
    return {**what.to_dict(), "output_dir": how.output_dir, **changed}


def resolved_text(what: QEffConfig, how: QEffTrainingArgs) -> str:
    """`resolved` as YAML."""
    return settings_text(resolved(what, how)).rstrip("\n")


def where(name: str, *owners: str) -> str:
    """A sentence, or nothing: where an option that ``owners`` do not have belongs, or the most similar name."""
    others = [place for place in PLACES if place not in owners]
    for place in others:
        if name in PLACES[place]:
            return f" It belongs to {place}: give it there."
    # The owners come first, so that of two equally similar names theirs is suggested.
    best, found = 0.0, ""
    for place in (*owners, *others):
        for near in difflib.get_close_matches(name, PLACES[place], n=1, cutoff=0.5):
            similarity = difflib.SequenceMatcher(None, near, name).ratio()
            if similarity > best:
                best = similarity
                found = f" Did you mean {near!r}?" if place in owners else f" Did you mean {near!r} in {place}?"
    return found


def read_value(name: str, text: str) -> Any:
    """The value of one option written on a command line, as YAML would read it, with the option's type in mind."""
    value = parse_value(text)
    for cls, aliases in ((QEffConfig, config.ALIASES), (QEffTrainingArgs, arguments.ALIASES)):
        kind, _ = plain_types(cls).get(aliases.get(name, name), (None, False))
        if kind is float and isinstance(value, str):
            # YAML spells these .nan and .inf, and takes what it does not know for a text.
            try:
                return float(value)
            except ValueError:
                return value
        if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
            return text
    return value

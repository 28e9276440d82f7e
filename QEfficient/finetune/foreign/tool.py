"""What is known of another tool's configuration file, and how one becomes our options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.keywords import short
from QEfficient.suggest import did_you_mean

#: What an option that is switched off holds; such an option asks for nothing.
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})


@dataclass(frozen=True)
class Tool:
    """A tool whose files can be read. Keys of a section are written ``section.key`` everywhere.

    Attributes:
        name: what ``--from`` calls it.
        title: what people call it.
        version: the release its keys and defaults were taken from.
        marks: keys that are in files of this tool and of no other, and are no options of ours.
        enough: how many of them make a file unmistakable.
        sections: keys that hold mappings whose keys are looked at one by one.
        prepare: what is done to the whole file first.
        same: key -> option of ours that takes the value as it is.
        handled: key -> what becomes of it, in words; `finish` does it.
        defaults: what the tool does where a key is not given, as far as the result depends on it.
        no_effect: key -> why it changes nothing here; a notice.
        refused: key -> what to do instead; an error unless it is switched off.
        finish: reads the keys of ``handled``.
    """

    name: str
    title: str
    version: str
    marks: frozenset[str]
    same: Mapping[str, str]
    handled: Mapping[str, str]
    defaults: Mapping[str, Any]
    no_effect: Mapping[str, str]
    refused: Mapping[str, str]
    finish: Callable[[Reading], None]
    sections: tuple[str, ...] = ()
    enough: int = 2
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict

    @property
    def keys(self) -> list[str]:
        """Every key that is known."""
        return list(dict.fromkeys([*self.same, *self.handled, *self.no_effect, *self.refused]))


@dataclass
class Reading:
    """A file while it is read.

    Attributes:
        tool: whose it is.
        given: what it says, without keys that have no value.
        options: what that is in our names, as far as it is known yet.
        notices: what a person should know, a sentence each.
    """

    tool: Tool
    given: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        """The value of a key, the tool's default, or None."""
        assert key in self.tool.handled or key in self.tool.same, f"{key} is not in {self.tool.name}'s table"
        return self.given.get(key, self.tool.defaults.get(key))

    def put(self, **options: Any) -> None:
        """Sets options, those that have a value."""
        self.options.update({name: value for name, value in options.items() if value is not None})

    def note(self, notice: str) -> None:
        """Adds a notice, once."""
        if notice not in self.notices:
            self.notices.append(notice)

    def error(self, key: str, what: str) -> OptionError:
        """An error about the value of a key; ``what`` goes on after it."""
        return OptionError(f"{key}={short(self.given.get(key, self.tool.defaults.get(key)))} of {self.title} {what}.")

    @property
    def title(self) -> str:
        """The tool's name for people."""
        return self.tool.title


def translate(tool: Tool, values: Mapping[str, Any], model: str | None = None) -> Reading:
    """The options that a file of another tool stands for.

    Args:
        values: what the file holds.
        model: the model to tune, where it is another one than the file says.

    Returns:
        The reading, with ``options`` and ``notices`` complete. Options are not checked yet: `split_options` does.

    Raises:
        OptionError: a key that is unknown, or that cannot be honoured.
    """
    written = _flat(tool.prepare(values), tool.sections)
    for key, value in written.items():
        if key not in tool.keys:
            raise OptionError(
                f"{key!r} is no key of {tool.title} that can be translated: take it out.{did_you_mean(key, tool.keys)}"
            )
        if key in tool.refused and value not in _OFF:
            raise OptionError(f"{key} is not available: {tool.refused[key]}.")
    reading = Reading(tool, {key: value for key, value in written.items() if value is not None})
    for key, option in tool.same.items():
        reading.put(**{option: reading[key]})
    reading.put(model_id=model)
    tool.finish(reading)
    reading.notices += _without_effect(tool, reading.given)
    return reading


def check_keys(entry: Mapping[str, Any], known: Mapping[str, Any] | tuple[str, ...], what: str) -> dict[str, Any]:
    """The keys of ``entry`` that have a value; OptionError when one is unknown.

    Args:
        what: what the entry is, for the message ("an entry of datasets in axolotl").
    """
    for key in entry:
        if key not in known:
            raise OptionError(f"{what} has no {key!r} that can be translated: take it out.{did_you_mean(key, known)}")
    return {key: value for key, value in entry.items() if value is not None}


def _flat(values: Mapping[str, Any], sections: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in sections and isinstance(value, Mapping):
            found.update({f"{key}.{inner}": item for inner, item in value.items()})
        elif key not in sections or value is not None:
            found[key] = value
    return found


def _without_effect(tool: Tool, given: Mapping[str, Any]) -> list[str]:
    """One sentence per reason."""
    keys: dict[str, list[str]] = {}
    for key, value in given.items():
        if key in tool.no_effect and value not in _OFF:
            keys.setdefault(tool.no_effect[key], []).append(key)
    verbs = {why: "has" if len(names) == 1 else "have" for why, names in keys.items()}
    return [f"{', '.join(names)} {verbs[why]} no effect: {why}." for why, names in keys.items()]

"""Options from several places, the later over the earlier: files named as ``base``, a file, a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune import arguments, config, lora
from QEfficient.finetune.keywords import short
from QEfficient.finetune.options import read_value
from QEfficient.finetune.settings_file import parse_value, read_settings

#: Keys of a file that name the files it builds on: one, or a list, the later over the earlier.
BASE_KEYS = ("base", "extends")
#: Other ways to say what another option says; the layer that comes last decides.
_SAME = {"warmup_ratio": "warmup_steps", "group_by_length": "train_sampling_strategy"}
_ALIASES = {**arguments.ALIASES, **config.ALIASES, **_SAME}


def read_layers(path: str | Path) -> dict[str, Any]:
    """The options of a YAML or JSON file over those of the files it builds on.

    ``base: other.yaml`` (or a list of files) is relative to the file that says so. Mappings such as ``lora_config``
    are merged key by key; everything else, lists included, replaces what a base says. An option replaces its other
    spellings, too.

    Raises:
        OptionError: a file is missing or malformed, or files build on each other in a circle.
    """
    return _read(Path(path).expanduser(), ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    place = path.resolve()
    if place in above:
        circle = " -> ".join(file.name for file in (*above[above.index(place) :], place))
        raise OptionError(f"{path} builds on itself ({circle}): remove one of these base entries.")
    values = read_settings(path, "fine-tuning options")
    named = [key for key in BASE_KEYS if key in values]
    if len(named) > 1:
        raise OptionError(f"{path} has both base and extends, which mean the same: leave one out.")
    bases = values.pop(named[0]) if named else []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(name, str) and name for name in bases):
        raise OptionError(f"{named[0]} in {path} must be a file or a list of files, got {short(bases)}.")
    found: dict[str, Any] = {}
    for name in bases:
        found = overlay(found, _read(path.parent / Path(name).expanduser(), (*above, place)))
    return overlay(found, values)


def overlay(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``lower`` with what ``upper`` says in its place; mappings are merged key by key."""
    found = dict(lower)
    for name, value in upper.items():
        meant = _meaning(name)
        for other in [other for other in found if _meaning(other) == meant and other not in upper]:
            old = found.pop(other)
            if isinstance(old, Mapping) and isinstance(value, Mapping):
                value = _merged(old, value)
        if isinstance(lower.get(name), Mapping) and isinstance(value, Mapping):
            value = _merged(lower[name], value)
        found[name] = value
    return found


def _meaning(name: str) -> str:
    return _ALIASES.get(name, name)


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``lower`` with the keys of ``upper``; a key of LoRA replaces its other spellings."""
    meant = {lora.LORA_ALIASES.get(key, key) for key in upper}
    kept = {key: value for key, value in lower.items() if lora.LORA_ALIASES.get(key, key) not in meant}
    return {**kept, **upper}


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """Options from a command line: ``--name value``, ``--name=value``, ``name=value``, ``--switch``, ``--no-switch``.

    Dashes and underscores are the same; a dot enters a mapping (``lora_config.r=16``). Values are YAML, read with the
    option's type in mind.

    Raises:
        OptionError: a word that is none of these, an option given twice with different values, or an option used both
            as a value and as a mapping.
    """
    found: dict[str, Any] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        dashed = word.startswith("--") and len(word) > 2
        name, equals, text = (word[2:] if dashed else word).partition("=")
        if not name or not name[0].isalpha() or (not dashed and not equals):
            raise OptionError(f"{word!r} is no option: write name=value or --name value.")
        name = name.replace("-", "_")
        if equals:
            _put(found, name, _value(name, text))
        elif waiting and not waiting[0].startswith("--"):
            _put(found, name, _value(name, waiting.pop(0)))
        elif name.startswith("no_") and not _is_option(name):
            _put(found, name.removeprefix("no_"), False)
        else:
            _put(found, name, True)
    return found


def _is_option(name: str) -> bool:
    from QEfficient.finetune.options import PLACES

    return any(name in names for names in PLACES.values())


def _value(name: str, text: str) -> Any:
    return parse_value(text) if "." in name else read_value(name, text)


def _put(found: dict[str, Any], name: str, value: Any) -> None:
    *outer, last = name.split(".")
    place = found
    for part in outer:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise OptionError(f"{part} is given both as {short(place)} and with {name}: give one of them.")
    if last in place and place[last] != value:
        raise OptionError(f"{name} is given twice, as {short(place[last])} and as {short(value)}: give it once.")
    place[last] = value

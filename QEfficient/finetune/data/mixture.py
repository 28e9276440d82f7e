"""What ``datasets`` says: the sources of a mixture, and what each has of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.keywords import choice, integer, is_number, short
from QEfficient.suggest import did_you_mean

if TYPE_CHECKING:
    from QEfficient.finetune.config import QEffConfig

#: Options of `QEffConfig` that a source may have of its own, besides its name and its weight.
OWN = (
    *("dataset_config", "dataset_query", "dataset_table", "train_split", "eval_split", "train_frac"),
    *("dataset_format", "columns", "system_prompt", "train_on"),
    *("filters", "preprocess", "augment", "sample_size", "custom_dataset_config"),
)
KEYS = ("dataset_name", "weight", *OWN)
#: Spellings that only a source has; those of `QEffConfig` count as well.
_SPELLED = {"path": "dataset_name", "split": "train_split", "name": "dataset_config"}

MIXING = ("exhaust", "upsample")
#: What other libraries call them.
_MIXING_ALIASES = {
    **dict.fromkeys(("first_exhausted", "interleave_under"), "exhaust"),
    **dict.fromkeys(("all_exhausted", "interleave_over"), "upsample"),
}


def read_sources(given: Any, aliases: Mapping[str, str]) -> tuple[dict[str, Any], ...]:
    """The sources of a mixture, each as ``dataset_name``, if given ``weight``, and options of its own.

    Args:
        given: a list of names, paths, rows, or mappings of ``KEYS``.
        aliases: other spellings of options.

    Raises:
        OptionError: no list, an empty one, an unknown key, a source without a name, a weight that is no number above
            0, or weights for some of the sources.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence) or not given:
        raise OptionError(f"datasets must be a list of at least one source, got {short(given)}.")
    found = tuple(_source(value, f"datasets[{place}]", aliases) for place, value in enumerate(given))
    weighted = [place for place, source in enumerate(found) if "weight" in source]
    if weighted and len(weighted) < len(found):
        without = next(place for place in range(len(found)) if place not in weighted)
        raise OptionError(
            f"datasets[{weighted[0]}] has a weight and datasets[{without}] has none: give every source one, or none."
        )
    return found


def _source(value: Any, where: str, aliases: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        value = {"dataset_name": value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = _SPELLED.get(key, aliases.get(key, key))
        if name not in KEYS:
            raise OptionError(
                f"{where} has no option {key!r}; it takes {', '.join(KEYS)}.{did_you_mean(str(key), KEYS)}"
            )
        if name in found:
            raise OptionError(f"{where} says {name} twice, once as {key}: say it once.")
        found[name] = os.fspath(item) if isinstance(item, os.PathLike) else item
    if found.get("dataset_name") is None:
        raise OptionError(f"{where} needs dataset_name: a name, a file, a directory, a hub id, a database URL or rows.")
    if "weight" in found and not (is_number(found["weight"]) and found["weight"] > 0):
        raise OptionError(f"weight of {where} must be a number above 0, got {short(found['weight'])}: leave out a "
                          "source that is not wanted.")  # fmt: skip
    return found


def check_mixture(config: QEffConfig) -> str | None:
    """Checks the options of a mixture; returns ``mixing`` under its canonical name.

    Raises:
        OptionError: an option out of range, without ``datasets``, or against another one; or an option of a source
            that `QEffConfig` refuses.
    """
    chosen = {
        name: getattr(config, name)
        for name in ("mixing", "mixing_temperature", "mixing_rows")
        if getattr(config, name) is not None
    }
    if config.datasets is None:
        if chosen:
            raise OptionError(f"{next(iter(chosen))} says how sources are mixed, which datasets lists: give datasets.")
        return None
    for name in ("dataset_name", "sample_size", "dataset_query", "dataset_table"):
        if getattr(config, name) is not None:
            instead = "mixing_rows for all, or sample_size of a source" if name == "sample_size" else "it in a source"
            raise OptionError(f"{name} is for one source, and datasets lists several: give {instead}.")
    temperature = config.mixing_temperature
    if temperature is not None:
        if not is_number(temperature) or temperature <= 0:
            raise OptionError(f"mixing_temperature must be a number above 0, got {short(temperature)}.")
        if "weight" in config.datasets[0]:
            raise OptionError("mixing_temperature makes weights of sizes, and the sources have weights: give one.")
    if config.mixing_rows is not None:
        integer("mixing_rows", config.mixing_rows)
    mixing = config.mixing
    if mixing is not None:
        mixing = choice("mixing", _MIXING_ALIASES.get(mixing, mixing), MIXING)
    for place, _ in enumerate(config.datasets):
        source_config(config, place)
    return mixing


def source_config(config: QEffConfig, place: int) -> QEffConfig:
    """The configuration of one source of a mixture: what it does not say itself is as for all of them."""
    assert config.datasets is not None
    own = {name: value for name, value in config.datasets[place].items() if name != "weight"}
    none: dict[str, Any] = dict.fromkeys(("datasets", "mixing", "mixing_temperature", "mixing_rows"))
    with naming(place):
        return config.replace(**none, **own)


@contextmanager
def naming(place: int, name: str = "") -> Iterator[None]:
    """Puts the source before the sentence of an error about it."""
    try:
        yield
    except (InputError, OptionError) as error:
        shown = f"datasets[{place}]" + f" ({name})" * bool(name)
        raise type(error)(f"{shown}: {error}") from error

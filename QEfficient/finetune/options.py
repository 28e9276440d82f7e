"""One flat set of options -> what is tuned (QEffConfig) and how (QEffTrainingArgs)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune import arguments, config
from QEfficient.finetune.arguments import QEffTrainingArgs
from QEfficient.finetune.config import QEffConfig
from QEfficient.suggest import did_you_mean


def split_options(given: Mapping[str, Any]) -> tuple[QEffConfig, QEffTrainingArgs]:
    """Sorts options by name; one that both know goes to the configuration.

    Raises:
        OptionError: an unknown option, with the nearest name, or a value one of the two refuses.
    """
    what_names = {f.name for f in dataclasses.fields(QEffConfig)} | set(config.ALIASES)
    how_names = {f.name for f in dataclasses.fields(QEffTrainingArgs)} | set(arguments.ALIASES)
    how_names |= {"warmup_ratio", "group_by_length"}
    what: dict[str, Any] = {}
    how: dict[str, Any] = {}
    for name, value in given.items():
        if name in what_names:
            what[name] = value
            if name == "seed":
                how[name] = value
        elif name in how_names:
            how[name] = value
        else:
            raise OptionError(f"there is no option {name!r}.{did_you_mean(name, what_names | how_names)}")
    return QEffConfig(**what), QEffTrainingArgs(**how)

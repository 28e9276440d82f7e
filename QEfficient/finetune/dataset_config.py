"""``generate_dataset_config``: a data set, the steps its rows go through, and settings of one's own, as one object."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from QEfficient.errors import OptionError
from QEfficient.finetune.config import ALIASES, QEffConfig
from QEfficient.finetune.data.steps import as_specs
from QEfficient.finetune.keywords import canonical, integer, mapping, short
from QEfficient.finetune.settings_file import read_mapping
from QEfficient.finetune.user_code import is_file_function
from QEfficient.suggest import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Steps by name -> whether they come before tokenization (-1), are part of it (0) or come after it (1).
STEPS = {
    "formatting": -1,
    "filtering": -1,
    "sampling": -1,
    "augmentation": -1,
    "tokenization": 0,
    "truncation": 1,
    "masking": 1,
    "padding": 1,
    "packing": 1,
}
#: What a step needs to be said about it.
_NEEDS = {"sampling": "sample_size", "augmentation": "augment"}
DEFAULT_BATCH = 32


@dataclass(frozen=True)
class DatasetConfig:
    """A data set and how its rows become batches. Keys of its own settings can be read as attributes.

    Attributes:
        dataset_name: as in `QEffConfig`.
        options: options of `QEffConfig`, under their canonical names.
        own: settings for the data set's own code (``custom_dataset_config``).
        batch_size: rows of a batch, where nothing else is asked for.
        fixed_length: whether batches are as long as ``max_ctx_len``.
        tokenizer: a tokenizer, its name or directory, or None.
    """

    dataset_name: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = DEFAULT_BATCH
    fixed_length: bool = False
    tokenizer: Any = None

    def __getattr__(self, name: str) -> Any:
        # Only called for what is no field. Read through the instance's dict: a copy is made before there are fields.
        own = self.__dict__.get("own", {})
        if name not in own:
            raise AttributeError(f"the dataset configuration has no {name!r}.{did_you_mean(name, own)}")
        return own[name]

    def config(self, tokenizer: PreTrainedTokenizerBase | None, max_ctx_len: int | None = None) -> QEffConfig:
        """The same as a `QEffConfig`; its model is the one of ``options``, else the tokenizer's."""
        options = dict(self.options)
        options.setdefault("model_id", getattr(tokenizer, "name_or_path", "") or "a tokenizer in memory")
        if max_ctx_len is not None:
            options["max_ctx_len"] = max_ctx_len
        return QEffConfig(dataset_name=self.dataset_name, custom_dataset_config=dict(self.own) or None, **options)

    @property
    def config_length(self) -> int:
        """Most tokens of a row (``max_ctx_len``)."""
        return int(self.options.get("max_ctx_len", QEffConfig.max_ctx_len))

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of this configuration.

        Raises:
            OptionError: none was given.
        """
        given = self.tokenizer or self.options.get("tokenizer_name") or self.options.get("model_id")
        if given is None:
            raise OptionError(
                "the dataset configuration names no tokenizer: put 'tokenizer' or 'model_id' into custom_config."
            )
        if not isinstance(given, str):
            tokenizer: PreTrainedTokenizerBase = given
            return tokenizer
        from QEfficient.finetune.tokenizer_files import load_tokenizer

        return load_tokenizer(given, trust_remote_code=bool(self.options.get("trust_remote_code")))


def generate_dataset_config(
    dataset_name: Any,
    custom_dataset_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    preprocessing_steps: Sequence[Any] | None = None,
    custom_config: Mapping[str, Any] | None = None,
) -> DatasetConfig:
    """What the other data functions take.

    Args:
        dataset_name: a name (``gsm8k``, ``custom_dataset``, one given to `register_dataset`), a file, a directory, a
            hub id, a database URL, or rows.
        custom_dataset_config: settings for the data set's own code, or a YAML or JSON file of them.
        preprocessing_steps: ``formatting``, ``filtering``, ``sampling``, ``augmentation``, ``tokenization``,
            ``truncation``, ``masking``, ``padding``, ``packing``, ``"file.py:function"`` or a callable. Formatting,
            tokenization, truncation and labels are always done; ``masking`` trains answers only, ``padding`` makes
            every batch as long as ``max_ctx_len``, ``filtering`` without ``filters`` removes duplicates. Functions run
            in the order given, over rows, before tokenization.
        custom_config: ``batch_size``, ``tokenizer`` (one, its name or directory), any option of `QEffConfig`
            (``max_ctx_len``, ``columns``, …), and more settings for the data set's own code.

    Raises:
        OptionError: an unknown step, an order that is impossible, a step without what it needs, or an option out of
            range.

    Example:
        >>> config = generate_dataset_config(
        ...     dataset_name="sample",
        ...     preprocessing_steps=["tokenization", "masking", "padding"],
        ...     custom_config={"batch_size": 8, "model_id": "examples/demo_model/model", "max_ctx_len": 128},
        ... )
    """
    own = read_mapping("custom_dataset_config", custom_dataset_config or {})
    given = mapping("custom_config", custom_config or {})
    batch_size = integer("batch_size", given.pop("batch_size", DEFAULT_BATCH))
    tokenizer = given.pop("tokenizer", None)
    names = [f.name for f in dataclasses.fields(QEffConfig) if f.name not in ("dataset_name", "custom_dataset_config")]
    spelled = {alias for alias, name in ALIASES.items() if name in names}
    options = {key: given.pop(key) for key in list(given) if key in names or key in spelled}
    options = canonical(options, names, ALIASES, "custom_config")
    fixed = _apply_steps(as_specs(preprocessing_steps or (), "preprocessing_steps"), options)
    found = DatasetConfig(dataset_name, options, {**own, **given}, batch_size, fixed, tokenizer)
    found.config(None)  # refuses what is out of range before any data is read
    return found


def _apply_steps(steps: Sequence[Any], options: dict[str, Any]) -> bool:
    """Puts what the steps ask for into ``options``; returns whether batches have a fixed length."""
    functions: list[Any] = []
    done: list[str] = []
    for step in steps:
        own = callable(step) or (isinstance(step, str) and is_file_function(step))
        if not own and step not in STEPS:
            hint = did_you_mean(step, STEPS) if isinstance(step, str) else ""
            raise OptionError(
                f"there is no preprocessing step {short(step)}; there are {', '.join(STEPS)}, and functions of your "
                f"own.{hint}"
            )
        if own:
            functions.append(step)
        place, name = (-1, "a function over rows") if own else (STEPS[step], step)
        later = next((other for other in done if STEPS.get(other, -1) > place), None)
        if later is not None:
            raise OptionError(f"{name} cannot come after {later}: put it before.")
        done.append(name)
        if name in _NEEDS and _NEEDS[name] not in options:
            raise OptionError(f"the step {name} needs {_NEEDS[name]} in custom_config.")
    if functions:
        options["preprocess"] = [*as_specs(options.get("preprocess") or (), "preprocess"), *functions]
    if "filtering" in done:
        options.setdefault("filters", ["dedupe"])
    if "masking" in done:
        options.setdefault("train_on", "completion")
    if "packing" in done:
        options.setdefault("packing", True)
    return "padding" in done

"""The rows that a configuration names, after the user's own functions over them."""

from __future__ import annotations

from typing import Any

from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.custom import load_custom
from QEfficient.finetune.data.named import named_dataset
from QEfficient.finetune.data.preprocess import preprocessed
from QEfficient.finetune.data.row_functions import read_functions
from QEfficient.finetune.data.sources import Source, load_source


def load_rows(config: QEffConfig, tokenizer: Any = None, custom_dataset_class: Any = None) -> Source:
    """Reads, and applies ``config.preprocess``.

    Args:
        tokenizer: for data sets whose own code asks for it.
        custom_dataset_class: instead of ``config.dataset_name``.

    Raises:
        InputError, OptionError: data that is missing, malformed or named wrongly.
    """
    dataset = custom_dataset_class
    if dataset is None:
        dataset = named_dataset(config.dataset_name, config.custom_dataset_config)
    source = load_source(config) if dataset is None else load_custom(dataset, config, tokenizer)
    return preprocessed(read_functions(config.preprocess or ()), source)

"""Loads a tokenizer from a directory or the hub, with one sentence when there is none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from QEfficient.errors import ModelLoadError
from QEfficient.models.factories import translate_load_errors
from QEfficient.models.hub import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Files that hold a vocabulary.
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.spm")


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or a hub id.

    Raises:
        ModelLoadError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    own = Path(name).expanduser()
    place = own if own.is_dir() else resolve(str(name))  # a tokenizer alone is no checkpoint
    try:
        with translate_load_errors(str(place)):
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(place), trust_remote_code=trust_remote_code
            )
            return found
    except ModelLoadError:  # not looked for before: a tokenizer of bytes needs none of these files
        if any(path for pattern in _VOCABULARIES for path in Path(place).glob(pattern)):
            raise
        raise ModelLoadError(
            f"{place} has no tokenizer files: copy tokenizer.json and tokenizer_config.json there, or name a directory "
            "that has them with tokenizer_name."
        ) from None

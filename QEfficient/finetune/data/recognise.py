"""What the rows of a data set are: their columns under our names, and the one format they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from QEfficient.errors import InputError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.files import Rows, Unreadable
from QEfficient.finetune.data.formats import Format, Renamer, check_one_format, detect, usual_names
from QEfficient.finetune.data.sources import columns_of


@dataclass(frozen=True)
class Recognised:
    """How rows are read.

    Attributes:
        renamer: puts a row under our column names.
        names: our names of the columns that decided the format.
        format: of the rows.
    """

    renamer: Renamer
    names: tuple[str, ...]
    format: Format


def recognise(config: QEffConfig, rows: Rows, where: str, labels: Sequence[str] | None = None) -> Recognised:
    """How the rows of a data set are read, from all of them.

    Args:
        config: its ``columns``, ``dataset_format``, ``task``, ``method`` and ``on_bad_row`` count.
        where: the data set's name, for messages.
        labels: what messages call each row after the word "Row"; None numbers them from 1.

    Raises:
        OptionError: no format fits the columns, or a column is mapped that is not there.
        InputError: no row can be read, or rows have several formats and bad ones may not be skipped.
    """
    if isinstance(rows, list) and all(isinstance(row, Unreadable) for row in rows):
        raise InputError(f"No row of {where} can be read, the first: {rows[0].why}")
    renamer = Renamer(config.columns, columns_of(rows))
    names = renamer.names
    if config.dataset_format == "auto" and isinstance(rows, list):  # others have the same columns anyway
        readable = (renamer(row) for row in rows if not isinstance(row, Unreadable))
        if config.on_bad_row == "skip":
            names = usual_names(readable)
        else:
            check_one_format(readable, labels)
    return Recognised(renamer, names, detect(names, config.kind_of_rows, config.dataset_format))

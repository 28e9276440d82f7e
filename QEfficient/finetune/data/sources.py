"""Where rows come from: bundled data, a file, a directory, the hub, or objects in memory."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.config import QEffConfig, describe_memory
from QEfficient.finetune.data.database import is_database, read_database, without_password
from QEfficient.finetune.data.files import OnBad, Rows, Unreadable, check_rows, is_data_file, read_file, stop, suffix_of
from QEfficient.finetune.data.named import dataset_names
from QEfficient.finetune.keywords import short
from QEfficient.finetune.settings_file import nearest_file
from QEfficient.suggest import did_you_mean

#: Data that comes with this library: name -> file beside this package.
BUNDLED = {
    "sample": "arithmetic.jsonl",
    "gsm8k": "gsm8k.jsonl",
    "alpaca": "alpaca.jsonl",
    "imdb": "imdb.jsonl",
    "grammar": "grammar.jsonl",
}
_SAMPLES = Path(__file__).parent.parent / "samples"

TRAIN_NAMES = ("train", "training")
#: Without a validation split, the test split is what a user would evaluate on.
EVAL_NAMES = ("validation", "valid", "val", "dev", "eval", "evaluation", "test")

#: Rows by the name of their split.
Splits = dict[str, Rows]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """Rows as they were written.

    Attributes:
        name: for people.
        train: the rows; all of them when there is no evaluation split.
        evaluation: the source's own evaluation rows, or None.
        notes: what was decided about the splits, one sentence each.
        held: how many rows at the beginning of ``train`` are for evaluation; None divides by ``train_frac``.
        labels: what messages call each row of ``train`` after the word "Row"; None numbers them from 1.
    """

    name: str
    train: Rows
    evaluation: Rows | None = None
    notes: tuple[str, ...] = ()
    held: int | None = None
    labels: tuple[str, ...] | None = None


def load_source(config: QEffConfig) -> Source:
    """The rows that ``config.dataset_name`` names.

    Raises:
        InputError: data that is missing, malformed, empty or of mixed types.
        OptionError: a split that does not exist, or a name that is nothing known.
    """
    data, bad = config.dataset_name, on_bad(config)
    if data is None:
        raise OptionError(
            "QEffConfig needs dataset_name: 'sample', a file, a directory, a hub id or a list of rows; only a custom "
            "dataset class does without."
        )
    if not isinstance(data, str):
        splits = _from_memory(data, bad)
        return choose_splits(describe_memory(data), splits, config)
    if data == "sample":
        return choose_splits(f"{data} (bundled)", {"train": bundled_rows(data)}, config)
    if is_database(data):
        found = read_database(data, config.dataset_query, config.dataset_table)
        shown = without_password(data)
        return choose_splits(shown, {"train": check_rows(found, shown, bad)}, config)
    if config.dataset_query is not None or config.dataset_table is not None:
        raise OptionError(f"dataset_query and dataset_table are for databases, and {data!r} is no database URL.")
    path = Path(data).expanduser()
    if path.exists() or is_data_file(path) or not is_hub_id(data):
        return choose_splits(str(path), from_path(path, config), config)
    return choose_splits(data, from_hub(data, config.dataset_config), config)


def from_path(path: Path, config: QEffConfig) -> Splits:
    """The splits of a file or a directory; InputError when there is none."""
    if path.is_file():
        return {"train": read_file(path, on_bad(config))}
    if path.is_dir():
        return _from_directory(path, config)
    if path.exists():
        raise InputError(f"{path} is neither a file nor a directory: pass one of these.")
    raise InputError(f"There is no data at {path}.{nearest_file(path)}")


def on_bad(config: QEffConfig) -> OnBad:
    return Unreadable if config.on_bad_row == "skip" else stop


def is_hub_id(name: str) -> bool:
    """Whether a name can be one of the hub, and is no path."""
    written = Path(name).is_absolute() or name.startswith((".", "~"))
    return not written and _HUB_ID.fullmatch(name) is not None


def bundled_file(name: str) -> Path:
    """The file that is installed under a name of ``BUNDLED``."""
    return _SAMPLES / BUNDLED[name]


def bundled_rows(name: str) -> Rows:
    """The rows that are installed under a name of ``BUNDLED``."""
    return read_file(bundled_file(name))


def _from_memory(data: Any, bad: OnBad = stop) -> Splits:
    if isinstance(data, Mapping):
        # A DatasetDict, or a plain dict of splits.
        return {str(name): rows_of(rows, f"split {name!r}", bad=bad) for name, rows in data.items()}
    return {"train": rows_of(data, "dataset_name", bad=bad)}


def rows_of(data: Any, where: str, check: bool = True, bad: OnBad = stop) -> Rows:
    """Rows from an iterable of dicts, a ``datasets.Dataset`` or a torch ``Dataset``.

    Raises:
        InputError: not rows, none, or (with ``check``) columns of mixed types.
    """
    if _is_arrow(data):
        rows: Any = data
    elif callable(getattr(data, "to_dict", None)) and hasattr(data, "columns"):
        rows = data.to_dict(orient="records")  # a pandas DataFrame
    elif isinstance(data, str | bytes | Mapping):
        raise InputError(f"{where} must be rows, each a dict of named columns, got {short(data)}.")
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        # Not by iterating: a torch Dataset counts on an IndexError that its code need not raise.
        rows = [_as_dict(data[index]) for index in range(len(data))]
    elif isinstance(data, Iterable):
        rows = [_as_dict(row) for row in data]
    else:
        raise InputError(f"{where} must be rows, each a dict of named columns, got {short(data)}.")
    if not len(rows):
        raise InputError(f"There are no rows in {where}.")
    return check_rows(rows, where, bad) if check and isinstance(rows, list) else rows


def _as_dict(row: Any) -> Any:
    return dict(row) if isinstance(row, Mapping) else row


def _is_arrow(data: Any) -> bool:
    # Asked by name: `datasets` takes a second to import, and a list of dicts does not need it.
    return type(data).__module__.partition(".")[0] == "datasets" and hasattr(data, "column_names")


def is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` of ``datasets`` wrote a directory."""
    names = {entry.name for entry in path.iterdir()}
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names


def _from_directory(path: Path, config: QEffConfig) -> Splits:
    if is_saved(path):
        from datasets import load_from_disk

        return _from_memory(load_from_disk(str(path)))
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and is_data_file(entry))
    known: dict[str, Path] = {}
    for file in files:
        stem = file.name.lower().removesuffix(".gz").removesuffix(suffix_of(file))
        if stem in (*TRAIN_NAMES, *EVAL_NAMES, config.train_split, config.eval_split):
            if stem in known:
                raise InputError(f"{path} has two files for the split {stem!r} ({known[stem].name}, {file.name}).")
            known[stem] = file
    if not known and len(files) == 1:
        known = {"train": files[0]}
    if known:
        return {name: read_file(file, on_bad(config)) for name, file in known.items()}
    return from_hub(str(path), config.dataset_config)


def from_hub(name: str, subset: str | None, otherwise: str | None = None) -> Splits:
    """The splits of a data set of the hub, or of a directory that ``datasets`` can read.

    Args:
        name: hub id or directory.
        subset: its configuration, or None.
        otherwise: what else can be done, for the message; None names the nearest known data set.

    Raises:
        InputError: it cannot be loaded.
    """
    return _from_memory(load_hub(name, subset, otherwise))


def load_hub(name: str, subset: str | None, otherwise: str | None = None, streaming: bool = False) -> Any:
    """What ``datasets`` makes of a hub id or a directory; see `from_hub`."""
    import datasets

    with hub_errors(name, otherwise):
        return datasets.load_dataset(name, subset, streaming=streaming)


@contextmanager
def hub_errors(name: str, otherwise: str | None = None) -> Iterator[None]:
    """Turns what ``datasets`` raises while it loads or streams into an InputError that says what else can be done."""
    import datasets

    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        # datasets raises its own subclasses of these: not found, no network, no such subset, a malformed file.
        reason = " ".join(str(error).split())
        instead = f"or pass a file.{did_you_mean(name, dataset_names())}" if otherwise is None else f"{otherwise}."
        raise InputError(
            f"The data set {name} cannot be loaded ({reason[:300]}): check the name, the network and dataset_config, "
            f"{instead}"
        ) from error


def choose_splits(name: str, splits: Splits, config: QEffConfig) -> Source:
    """Which split is trained on and which is for evaluation; see `split_names`."""
    train, evaluation, notes = split_names(name, splits, config)
    return Source(name, splits[train], None if evaluation is None else splits[evaluation], notes)


def split_names(name: str, splits: Collection[str], config: QEffConfig) -> tuple[str, str | None, tuple[str, ...]]:
    """(split to train on, split for evaluation or None, what to say about it).

    Raises:
        OptionError: the configuration names a split that does not exist, or none is for training.
    """
    train_name = _named(config.train_split, splits, "train_split")
    if train_name is None:
        train_name = next((known for known in TRAIN_NAMES if known in splits), None)
    if train_name is None and len(splits) == 1:
        train_name = next(iter(splits))
    if train_name is None:
        raise OptionError(f"{name} has the splits {', '.join(sorted(splits))}: choose one with train_split.")
    eval_name = _named(config.eval_split, splits, "eval_split")
    if eval_name is None and config.train_frac < 1:
        eval_name = next((known for known in EVAL_NAMES if known in splits and known != train_name), None)
    if eval_name is None:
        return train_name, None, ()
    if eval_name == train_name:
        raise OptionError(f"train_split and eval_split are both {eval_name!r}: a model must be measured on other rows.")
    return (
        train_name,
        eval_name,
        (f"the rows of the split {eval_name!r} are for evaluation, so train_frac is not used.",),
    )


def _named(name: str | None, splits: Collection[str], option: str) -> str | None:
    if name is not None and name not in splits:
        raise OptionError(
            f"{option}={name!r} is no split of the data, which has {', '.join(sorted(splits))}."
            f"{did_you_mean(name, splits)}"
        )
    return name


def columns_of(rows: Rows) -> list[str]:
    """The column names of some rows; those of the first row first."""
    names = getattr(rows, "column_names", None)
    if names is not None:
        return list(names)
    return list(dict.fromkeys(name for row in rows if not isinstance(row, Unreadable) for name in row))

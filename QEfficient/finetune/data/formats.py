"""Which format a data set has, told from its columns, and how a row of it becomes an example."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.data import preference_readers, readers
from QEfficient.finetune.data.examples import Example, Tokenized
from QEfficient.finetune.keywords import short
from QEfficient.suggest import did_you_mean

Row = Mapping[str, Any]

#: What JSON can spell and no text has: half of a UTF-16 pair.
_SURROGATE = re.compile("[\ud800-\udfff]")

#: Column pairs that mean "prompt" and "completion".
PAIRS = (
    *(("prompt", "completion"), ("question", "answer"), ("question", "response"), ("query", "response")),
    *(("prompt", "response"), ("input", "output"), ("user", "assistant"), ("instruction", "revision")),
    *(("article", "summary"), ("source", "target"), ("INSTRUCTION", "RESPONSE"), ("prompt", "generation")),
    ("prompt", "accepted_completion"),
)


@dataclass(frozen=True)
class Format:
    """One format: when a set of column names has it, and how a row of it is read.

    Attributes:
        name: what ``dataset_format`` calls it.
        wants: the columns it needs, for messages.
        matches: whether a set of column names has it.
        read: one row (an InputError, without the row's number, when a value does not fit); None when a required
            value is empty.
        kind: what its rows are for: ``"generation"``, ``"seq_classification"``, ``"preference"`` (pairs of answers) or
            ``"unpaired_preference"`` (answers that are good or bad).
    """

    name: str
    wants: str
    matches: Callable[[frozenset[str]], bool]
    read: Callable[[Row], Example | None]
    kind: str = "generation"


def _has(*columns: str) -> Callable[[frozenset[str]], bool]:
    return lambda names: names.issuperset(columns)


def _alpaca(names: frozenset[str]) -> bool:
    return "instruction" in names and bool(names & {"output", "response"})


def pairs_in(names: Iterable[str]) -> list[tuple[str, str]]:
    """The column pairs of a prompt–completion row that are present."""
    names = set(names)
    return [pair for pair in PAIRS if names.issuperset(pair)]


#: Kind of rows -> what to do where something else was expected.
_ADVICE = {
    "seq_classification": "is classification data: set task='seq_classification', or dataset_format='text' to train on "
    "the text",
    "preference": "has preferred answers: set method='dpo', 'orpo' or 'reward', or train on the chosen answers with "
    "columns={'prompt': 'prompt', 'completion': 'chosen'}",
    "unpaired_preference": "has answers marked good or bad: set method='kto', or dataset_format='prompt_completion' to "
    "train on all of them",
}

#: Kind of rows -> the options that ask for it, as messages name them.
_ASKS = {
    "generation": "task='generation'",
    "seq_classification": "task='seq_classification'",
    "preference": "a method that compares answers",
    "unpaired_preference": "method='kto'",
}

#: In the order in which they are tried.
_ALL = (
    Format("tokenized", "input_ids", _has("input_ids"), readers.tokenized),
    Format(
        "preference",
        "chosen and rejected",
        lambda names: any(names.issuperset(pair) for pair in preference_readers.PAIRED),
        preference_readers.preference,
        "preference",
    ),
    Format(
        "unpaired_preference",
        "prompt, completion and label, or messages and kto_tag",
        lambda names: (
            (_has("completion", "label")(names) and bool(names & {"prompt", "question", "instruction"}))
            or ("kto_tag" in names and bool(names & {"messages", "conversations"}))
        ),
        preference_readers.judged,
        "unpaired_preference",
    ),
    Format("segments", "segments", _has("segments"), readers.segments),
    Format("messages", "messages", _has("messages"), readers.messages),
    Format("sharegpt", "conversations", _has("conversations"), readers.sharegpt),
    Format("alpaca", "instruction and output or response", _alpaca, readers.alpaca),
    Format(
        "prompt_completion",
        "prompt and completion, question and answer, …",
        lambda names: bool(pairs_in(names)),
        readers.prompt_completion(pairs_in),
    ),
    Format(
        "classification",
        "text (or sentence, or sentence1 and sentence2) and label",
        lambda names: "label" in names and bool(names & {"text", "sentence", "sentence1"}),
        readers.classification,
        "seq_classification",
    ),
    Format("text", "text or content", lambda names: bool(names & {"text", "content"}), readers.document),
)
FORMATS = {item.name: item for item in _ALL}

#: Our column names, for ``columns``.
COLUMNS = tuple(
    dict.fromkeys(
        (
            *[
                "input_ids",
                "labels",
                "attention_mask",
                "position_ids",
                "completion_mask",
                "assistant_masks",
                "weights",
                "segments",
            ],
            *["messages", "conversations", "tools", "system", "instruction", "input", "output", "response", "history"],
            *(name for pair in PAIRS for name in pair),
            *["system_prompt", "text", "content", "sentence", "sentence1", "sentence2", "label", "kto_tag"],
            *(name for pair in preference_readers.PAIRED for name in pair),
        )
    )
)


def detect(columns: Iterable[str], kind: str = "generation", wanted: str = "auto") -> Format:
    """The format of rows with these columns.

    Args:
        columns: column names, after ``Renamer``.
        kind: what the rows are for, as in ``Format``.
        wanted: a format's name, or ``"auto"``.

    Raises:
        OptionError: no format fits, two prompt–completion pairs fit, or the format is for something else; the message
            lists columns, candidates and the options that decide.
    """
    names = frozenset(columns)
    if wanted != "auto":
        found = FORMATS[wanted]
        if not found.matches(names):
            raise OptionError(
                f"dataset_format={wanted!r} needs {found.wants}, and the data has {_listed(names)}: name the columns "
                "with columns={'ours': 'theirs'}."
            )
    elif kind != "generation":
        found = next(item for item in _ALL if item.kind == kind)
        if not found.matches(names):
            raise OptionError(
                f"{_ASKS[kind]} needs {found.wants}, and the data has {_listed(names)}: name the columns with "
                "columns={'ours': 'theirs'}."
            )
    else:
        matching = [item for item in _ALL if item.matches(names)]
        if not matching:
            raise OptionError(_no_format(names))
        found = matching[0]
        if found.kind != kind:
            raise OptionError(f"The data has {_listed(names)} and {_ADVICE[found.kind]}.")
    if found.kind != kind:
        raise OptionError(f"dataset_format={found.name!r} does not fit {_ASKS[kind]}: change one of them.")
    pairs = pairs_in(names)
    if found.name == "prompt_completion" and len(pairs) > 1:
        raise OptionError(
            f"The data has {_listed(names)}, where {' and '.join(f'{a}/{b}' for a, b in pairs)} could each be prompt "
            "and answer: choose with columns={'prompt': …, 'completion': …}."
        )
    return found


class Renamer:
    """Puts the user's columns under our names, row by row.

    A choice of prompt and completion hides the other pairs of the data, so that it is a choice.

    Args:
        columns: our name -> their name; None or empty changes nothing.
        present: the columns the data has.

    Raises:
        OptionError: a name of ours that does not exist, or one of theirs that the data lacks.
    """

    def __init__(self, columns: Mapping[str, str] | None, present: Iterable[str]) -> None:
        self._columns = dict(columns or {})
        present = list(present)
        for ours, theirs in self._columns.items():
            if ours not in COLUMNS:
                raise OptionError(
                    f"columns names {ours!r}, which is no column of any format.{did_you_mean(ours, COLUMNS)}"
                )
            if theirs not in present:
                raise OptionError(
                    f"columns maps {ours!r} to {short(theirs)}, and the data has {_listed(present)}."
                    f"{did_you_mean(str(theirs), present)}"
                )
        self._gone = {*self._columns.values(), *_hidden_by(self._columns)}
        self.names = tuple(self(dict.fromkeys(present)))

    def __call__(self, row: Row) -> dict[str, Any]:
        """The row under our names; a column it lacks stays absent."""
        kept = {name: value for name, value in row.items() if name not in self._gone}
        return {**kept, **{ours: row[theirs] for ours, theirs in self._columns.items() if theirs in row}}


def _hidden_by(columns: Mapping[str, str]) -> set[str]:
    if not pairs_in(columns):
        return set()
    names = {name for pair in (*PAIRS, *preference_readers.PAIRED) for name in pair} | {"label", "instruction"}
    return names - set(columns)


def read_row(kind: Format, row: Row, number: int | str) -> Example | None:
    """One row as an example; None when a required value is empty.

    Raises:
        InputError: a value does not fit the format; the message has the row's number (from 1), or what it is called.
    """
    if not kind.matches(frozenset(row)):
        raise InputError(
            f"Row {number} has {_listed(row)}, and the format {kind.name} needs {kind.wants}: give every row the same "
            "columns."
        )
    try:
        example = kind.read(row)
    except InputError as error:
        raise InputError(f"Row {number} does not fit the format {kind.name}: {error}") from error
    for text in _texts(example):
        # Tokenizers refuse it with a TypeError that names no row.
        if found := _SURROGATE.search(text):
            before = text[max(found.start() - 20, 0) : found.start()]
            raise InputError(
                f"Row {number} has {found[0]!r}, half of a surrogate pair, after {before!r}: no tokenizer can read "
                "that, so write the whole character or remove it."
            )
    return example


def _texts(value: Any) -> Iterator[str]:
    """Every text of an example."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(name)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif is_dataclass(value) and not isinstance(value, Tokenized):
        yield from _texts(vars(value))


@functools.lru_cache(maxsize=256)
def _first_match(columns: frozenset[str]) -> str | None:
    """The first format that a set of column names has; rows by the thousand have the same few sets."""
    return next((item.name for item in _ALL if item.matches(columns)), None)


def check_one_format(rows: Iterable[Row], labels: Sequence[str] | None = None) -> None:
    """Refuses rows of different formats: `detect` would see their columns together and blame the wrong row.

    Args:
        rows: after ``Renamer``.
        labels: what to call each after the word "Row"; None numbers them from 1.

    Raises:
        InputError: naming the first row that differs from most rows (from the first, where neither kind has more).
    """
    first: dict[str | None, tuple[int, frozenset[str]]] = {}
    counts: Counter[str | None] = Counter()
    for number, row in enumerate(rows, start=1):
        names = frozenset(row)
        kind = _first_match(names)
        first.setdefault(kind, (number, names))
        counts[kind] += 1
    if len(counts) < 2:
        return
    usual = counts.most_common(1)[0][0]  # among equals the one that came first
    odd, (number, names) = next((name, place) for name, place in first.items() if name != usual)
    since, others = first[usual]
    called = (number, since) if labels is None else (labels[number - 1], labels[since - 1])
    raise InputError(
        f"Row {called[0]} has {_listed(names)} ({_called(odd)}), and {counts[usual]} of {counts.total()} rows, such as "
        f"row {called[1]}, have {_listed(others)} ({_called(usual)}): give every row the same columns."
    )


def usual_names(rows: Iterable[Row]) -> tuple[str, ...]:
    """The columns of the rows that have the most common format; where rows may be skipped, these decide.

    Args:
        rows: after ``Renamer``.
    """
    kinds: Counter[str | None] = Counter()
    names: dict[str | None, dict[str, None]] = {}
    for row in rows:
        kind = _first_match(frozenset(row))
        kinds[kind] += 1
        names.setdefault(kind, {}).update(dict.fromkeys(row))
    return tuple(names[kinds.most_common(1)[0][0]]) if kinds else ()


def _called(name: str | None) -> str:
    return "no known format" if name is None else f"format {name}"


def _no_format(names: frozenset[str]) -> str:
    candidates = "; ".join(f"{item.name}: {item.wants}" for item in _ALL)
    return (
        f"The data has {_listed(names)}, which fits no known format ({candidates}): name the columns with "
        "columns={'ours': 'theirs'} or set dataset_format."
    )


def _listed(names: Iterable[str]) -> str:
    return f"the columns {', '.join(sorted(map(str, names)))}" if names else "no columns"

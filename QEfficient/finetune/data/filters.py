"""Filters of rows: duplicates, near duplicates, texts of low quality, lengths, and a user's own."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from QEfficient.errors import OptionError
from QEfficient.finetune.data.steps import as_specs, read_step

Row = Mapping[str, Any]
#: Says for one row after the other whether it stays; may remember earlier ones.
Keep = Callable[[Row], bool]

_WORD = re.compile(r"\w+")
#: Characters of a shingle, and permutations of a MinHash: errors of its similarity are about 1 / sqrt(permutations).
_SHINGLE, _PERMUTATIONS = 8, 128
#: Words of a run that is looked for again in the same text.
_RUN = 3


@dataclass(frozen=True)
class Filter:
    """A filter as it was asked for.

    Attributes:
        name: what reports call it.
        identity: what decides its result, as JSON values.
        start: a fresh `Keep`, for one data set.
        remembers: whether it compares a row with all before it.
    """

    name: str
    identity: tuple[Any, ...]
    start: Callable[[], Keep]
    remembers: bool = False


def read_filters(specs: Any) -> tuple[Filter, ...]:
    """Filters from their names.

    Args:
        specs: a list of ``"dedupe"``, ``"near_duplicates:threshold=0.8"``, ``"quality"``, ``"min_words:3"``,
            ``"max_words:400"``, ``"file.py:function"`` (called with a row, keeps it when the answer is true), or
            callables.

    Raises:
        OptionError: an unknown filter or parameter, a value out of range, or a library that is not installed.
    """
    return tuple(_read(spec) for spec in as_specs(specs, "filters"))


def _read(spec: Any) -> Filter:
    step = read_step(spec, "a filter", FILTERS)
    start = step.made if not step.own else lambda: lambda row: bool(step.made(row))
    return Filter(step.name, step.identity, start, not step.own and step.name in _REMEMBERING)


def texts(value: Any) -> Iterator[str]:
    """Every text of a row, in order: values, not names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)


def words(row: Row) -> list[str]:
    """Its words, lower case, without signs, in one form of Unicode."""
    return _WORD.findall(unicodedata.normalize("NFKC", "\n".join(texts(row))).lower())


def _dedupe() -> Callable[[], Keep]:
    def start() -> Keep:
        seen: set[bytes] = set()

        def keep(row: Row) -> bool:
            # Rows without text, such as token ids, count by their values.
            content = " ".join(words(row)) or repr(sorted(row.items()))
            digest = blake3(content.encode("utf-8", "surrogatepass")).digest()
            new = digest not in seen
            seen.add(digest)
            return new

        return keep

    return start


def _near_duplicates(threshold: float) -> Callable[[], Keep]:
    if not 0 < threshold <= 1:
        raise OptionError(f"threshold of the filter near_duplicates must be above 0 and at most 1, got {threshold}.")
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise OptionError("The filter near_duplicates needs datasketch: pip install 'qefficient[data]'.") from None

    def start() -> Keep:
        index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        kept = 0

        def keep(row: Row) -> bool:
            nonlocal kept
            # Pieces of characters, not of words: not every script has spaces.
            text = " ".join(words(row))
            shingles = {text[i : i + _SHINGLE] for i in range(max(1, len(text) - _SHINGLE + 1))}
            sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
            sketch.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in sorted(shingles)])
            if any(sketch.jaccard(other) >= threshold for other in map(sketches.__getitem__, index.query(sketch))):
                return False
            sketches[kept] = sketch
            index.insert(kept, sketch)
            kept += 1
            return True

        sketches: dict[int, Any] = {}
        return keep

    return start


def _quality(letters: float, repeated: float, longest_word: float) -> Callable[[], Keep]:
    """Rules that no language breaks: after the heuristics of Rae et al. 2021 (arXiv:2112.11446, appendix A.1)."""

    def keep(row: Row) -> bool:
        text = "\n".join(texts(row))
        signs = [sign for sign in text if not sign.isspace()]
        if not signs:
            return False
        alphabetic = sum(sign.isalnum() for sign in signs) / len(signs)
        found = words(row)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        again = sum(count - 1 for count in Counter(lines).values()) / max(1, len(lines))
        runs = [tuple(found[i : i + _RUN]) for i in range(len(found) - _RUN + 1)]
        most = max(Counter(runs).values(), default=0) * _RUN / max(1, len(found))
        return (
            alphabetic >= letters
            and again <= repeated
            and (len(runs) < 10 or most <= repeated)
            # Letters of other scripts may stand without spaces; such a run of these is an address or encoded data.
            and max((len(word) for word in found if word.isascii()), default=0) <= longest_word
        )

    return lambda: keep


def _min_words(least: int) -> Callable[[], Keep]:
    return lambda: lambda row: len(words(row)) >= least


def _max_words(most: int) -> Callable[[], Keep]:
    return lambda: lambda row: len(words(row)) <= most


#: Name -> what makes it, and its parameters with their defaults; None has to be given.
FILTERS: dict[str, tuple[Callable[..., Callable[[], Keep]], dict[str, Any]]] = {
    "dedupe": (_dedupe, {}),
    "near_duplicates": (_near_duplicates, {"threshold": 0.8}),
    "quality": (_quality, {"letters": 0.5, "repeated": 0.3, "longest_word": 100}),
    "min_words": (_min_words, {"least": None}),
    "max_words": (_max_words, {"most": None}),
}


#: Those that compare a row with all before it.
_REMEMBERING = ("dedupe", "near_duplicates")


def apply_filters(filters: Sequence[Filter], rows: Sequence[tuple[int, Row]]) -> tuple[list[int], Counter[str]]:
    """(numbers of the rows that stay, filter -> rows it removed); each filter sees what the earlier ones left.

    Args:
        filters: in the order they run.
        rows: number of each row, and the row under our column names.
    """
    left, removed = list(rows), Counter[str]()
    for item in filters:
        keep = item.start()
        stayed = [(number, row) for number, row in left if keep(row)]
        removed[item.name] += len(left) - len(stayed)
        left = stayed
    return [number for number, _ in left], removed

"""When each row stops: end-of-sequence tokens, stop strings, the caller's criteria, length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from QEfficient.engine.settings import GenerationSettings
from QEfficient.errors import InputError, OptionError

if TYPE_CHECKING:
    from QEfficient.engine.tokenizer import TextTokenizer

#: An HF stopping criterion: (input_ids [rows, length], scores) to a bool, or to one bool per row.
Criterion = Callable[[Any, Any], Any]

#: Tokens decoded before the ones that can matter: what a decoder drops or joins at the start of a text (a
#: leading space, half a character) then lies outside any match.
_CONTEXT = 4


class FinishReason(StrEnum):
    """Why a row ended."""

    EOS = "eos"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    CRITERIA = "criteria"


class Stopping:
    """Decides after every step which rows have ended, and why. Several reasons at once count in the order of
    :class:`FinishReason` with ``CRITERIA`` before ``LENGTH``.

    Attributes:
        finished: bool, [rows].
        reasons: why each row ended; None while it has not.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        rows: int,
        prompt_length: int,
        *,
        limit: int | Sequence[int] | None = None,
        tokenizer: TextTokenizer | None = None,
        stopping_criteria: Criterion | Sequence[Criterion] | None = None,
        to_user: Callable[[np.ndarray], Any] | None = None,
    ) -> None:
        """Prepares ``rows`` rows.

        Args:
            settings: end-of-sequence ids and stop strings.
            prompt_length: columns of the sequences that are prompt.
            limit: most new tokens, for all rows or for each; None for no limit.
            tokenizer: needed for stop strings.
            stopping_criteria: HF criteria; called like HF calls them, with ``scores`` None.
            to_user: turns int64 ids [rows, length] into what the caller works with (a torch tensor, say).

        Raises:
            OptionError: stop strings without a tokenizer, or criteria that cannot be called.
        """
        if settings.stop_strings and tokenizer is None:
            raise OptionError("stop_strings need a tokenizer: pass tokenizer=.")
        self._strings = settings.stop_strings
        self._tokenizer = tokenizer
        self._eos = np.asarray(settings.stop_ids, np.int64)
        self._criteria = _as_list(stopping_criteria)
        self._to_user = to_user
        self._prompt_length = prompt_length
        self._limit = None if limit is None else np.broadcast_to(np.asarray(limit, np.int64), (rows,))
        # A token is at least one byte, so no more tokens than bytes can take part in a match.
        self._window = _CONTEXT + max((len(s.encode()) for s in self._strings), default=0)
        self._tails: list[str] = [""] * rows
        self.finished = np.zeros(rows, bool)
        self.reasons: list[FinishReason | None] = [None] * rows

    def update(self, sequences: np.ndarray) -> np.ndarray:
        """Looks at the token each unfinished row has just received.

        Args:
            sequences: int64, [rows, length]: padded prompts and all tokens so far, the newest last.

        Returns:
            ``finished``: bool, [rows].

        Raises:
            InputError: wrong shape, or a criterion returned something that is not a bool or one per row.
        """
        rows = len(self.finished)
        if sequences.ndim != 2 or sequences.shape[0] != rows or sequences.shape[1] <= self._prompt_length:
            raise InputError(
                f"Sequences must have the shape [{rows}, more than {self._prompt_length}], got {list(sequences.shape)}."
            )
        if self._eos.size:
            self._end(np.isin(sequences[:, -1], self._eos), FinishReason.EOS)
        if self._strings:
            # Every unfinished row is looked at, not only until one matches: each keeps its own text to cut.
            hits = [not self.finished[row] and self._ends_string(row, sequences[row]) for row in range(rows)]
            self._end(np.asarray(hits), FinishReason.STOP_STRING)
        for criterion in self._criteria:
            ids = sequences if self._to_user is None else self._to_user(sequences)
            if isinstance(ids, np.ndarray) and _takes_torch(criterion):
                ids = sys.modules["torch"].from_numpy(sequences.copy())
            self._end(_per_row(criterion(ids, None), rows), FinishReason.CRITERIA)
        if self._limit is not None:
            self._end(sequences.shape[1] - self._prompt_length >= self._limit, FinishReason.LENGTH)
        return self.finished

    def cut(self, row: int, text: str) -> str:
        """``text`` (the decoded new tokens of ``row``) up to the stop string, if that is what ended the row.

        The ids keep the token that completed the string, as in HF.
        """
        if self.reasons[row] is not FinishReason.STOP_STRING:
            return text
        places = [place for s in self._strings if (place := text.find(s)) >= 0]
        if places:
            return text[: min(places)]
        # Not whole in the new text: it began in the prompt, or is a special token that decoding left out.
        tail = self._tails[row]
        return "" if tail.endswith(text) else text

    def _end(self, hits: np.ndarray, reason: FinishReason) -> None:
        for row in np.flatnonzero(hits & ~self.finished):
            self.reasons[row] = reason
        self.finished |= hits

    def _ends_string(self, row: int, ids: np.ndarray) -> bool:
        """Whether the last token completes a stop string: one is in the text and reaches into its part.

        Same rule as HF's ``StopStringCriteria`` (which works on token pieces): strings wholly before the last
        token do not count, and the prompt may hold the beginning.
        """
        if self._tokenizer is None:
            return False
        window = ids[-self._window :]
        text = self._tokenizer.decode(window, skip_special_tokens=False)
        before = self._tokenizer.decode(window[:-1], skip_special_tokens=False)
        settled = _common_prefix(before, text)
        starts = [s for string in self._strings if (s := _find_past(text, string, settled)) is not None]
        if starts:
            self._tails[row] = text[min(starts) :]
        return bool(starts)


def _find_past(text: str, string: str, settled: int) -> int | None:
    """Start of the first occurrence of ``string`` that ends after the first ``settled`` characters."""
    start = text.find(string, max(0, settled - len(string) + 1))
    return start if start >= 0 else None


def _common_prefix(a: str, b: str) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _as_list(criteria: Criterion | Sequence[Criterion] | None) -> list[Criterion]:
    if criteria is None:
        return []
    # HF's StoppingCriteriaList is both a list and callable; taken as a list its members answer one by one.
    found: list[Any] = list(criteria) if isinstance(criteria, list | tuple) else [criteria]
    for criterion in found:
        if not callable(criterion):
            raise OptionError(
                f"stopping_criteria must be functions of (ids, scores), got {type(criterion).__name__}: "
                "pass a function or a list of them."
            )
    return found


def _takes_torch(criterion: Criterion) -> bool:
    """Whether a criterion is one of transformers' classes or derives from one: those work on torch tensors only."""
    return any(cls.__module__.partition(".")[0] == "transformers" for cls in type(criterion).__mro__)


def _per_row(answer: Any, rows: int) -> np.ndarray:
    """A criterion's answer as bool [rows]; a single one counts for every row."""
    found = np.asarray(answer)
    if found.dtype != bool or found.size not in (1, rows) or found.ndim > 2:
        raise InputError(
            f"A stopping criterion must return a bool or one for each of {rows} rows, "
            f"got {found.dtype} {list(found.shape)}."
        )
    return np.broadcast_to(found.ravel(), (rows,))

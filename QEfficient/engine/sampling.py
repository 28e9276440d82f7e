"""Logits to next tokens: Hugging Face's processors in numpy, with one random stream per row."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from QEfficient.engine.settings import GenerationSettings
from QEfficient.errors import InputError

#: How many tokens top-p without top-k looks at first, and next: the nucleus is nearly always far smaller than
#: the vocabulary, and sorting all of it is ten times the work.
_LOOKS = (1024, 16384)


class Sampler:
    """Chooses the next token of each row; formulas and order are those of transformers 5.23.

    Order (``generation/utils.py::_get_logits_processor``): repetition penalty, end-of-sequence mask,
    temperature, top-k, top-p, min-p. Row i draws from ``np.random.default_rng([seed, i])``, one number per
    token, so its text does not depend on the other rows or on how many there are.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        rows: int,
        prompts: Sequence[npt.ArrayLike] | None = None,
    ) -> None:
        """Starts ``rows`` rows.

        Args:
            settings: how to choose.
            rows: number of rows, at least 1.
            prompts: token ids (int, [length], no padding) of each row; the repetition penalty needs them.

        Raises:
            InputError: ``rows`` is not a positive integer, or a repetition penalty lacks its prompts.
        """
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise InputError(f"A sampler needs at least one row, got rows={rows!r}.")
        self.settings = settings
        self.rows = rows
        self._penalised = settings.repetition_penalty != 1.0
        if prompts is None and self._penalised:
            raise InputError("repetition_penalty needs the prompts: pass the token ids of every row.")
        if prompts is not None and len(prompts) != rows:
            raise InputError(f"There are {len(prompts)} prompts for {rows} rows: pass one for each row.")
        # None draws fresh entropy once; rows still get independent streams from it.
        self._seed = settings.seed if settings.seed is not None else secrets.randbits(64)
        self._streams = [_stream(self._seed, row) for row in range(rows)]
        self._generated = np.zeros(rows, np.int64)
        self._prompts = [np.asarray(p, np.int64).ravel() for p in prompts or []] if self._penalised else []
        self._seen: np.ndarray | None = None

    def restart(self, row: int, prompt: npt.ArrayLike, stream: int | None = None) -> None:
        """Begins a new text in ``row``, for continuous batching.

        Args:
            row: the row to use again.
            prompt: int, [length] token ids.
            stream: number of the random stream, such as the prompt's place in the request; default ``row``.

        Raises:
            InputError: there is no such row.
        """
        if not 0 <= row < self.rows:
            raise InputError(f"There is no row {row}: this sampler has rows 0 to {self.rows - 1}.")
        self._streams[row] = _stream(self._seed, row if stream is None else stream)
        self._generated[row] = 0
        if self._penalised:
            self._prompts[row] = np.asarray(prompt, np.int64).ravel()
            if self._seen is not None:
                self._seen[row] = False
            self._mark(row, self._prompts[row])

    def sample(self, logits: np.ndarray, rows: npt.ArrayLike | None = None) -> np.ndarray:
        """Chooses one token per row and remembers it.

        Args:
            logits: float, [n, vocab]; not modified.
            rows: int, [n] distinct row numbers the logits belong to; default all rows in order.

        Returns:
            int64, [n] token ids.

        Raises:
            InputError: wrong shape or dtype, or (when drawing) logits that are NaN, +inf or all -inf.
        """
        which = np.arange(self.rows) if rows is None else np.asarray(rows)
        _check_logits(logits, which, self.rows)
        scores = self._process(logits, which)
        tokens = self._draw(scores, which) if self.settings.sampling else np.argmax(scores, axis=-1).astype(np.int64)
        self._generated[which] += 1
        if self._seen is not None:
            self._seen[which, tokens] = True
        return tokens

    def _process(self, logits: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Repetition penalty and end-of-sequence mask; returns ``logits`` itself when neither applies."""
        settings = self.settings
        early = (self._generated[which] < settings.min_new_tokens) if settings.eos_token_id else np.zeros(0, bool)
        if not self._penalised and not early.any():
            return logits
        # Always a copy: the logits may be a session's own output buffer.
        scores = np.array(logits, dtype=np.float32)
        if self._penalised:
            if self._seen is None:
                self._seen = np.zeros((self.rows, scores.shape[1]), bool)
                for row, prompt in enumerate(self._prompts):
                    self._mark(row, prompt)
            at = np.nonzero(self._seen[which])
            scores[at] = penalise(scores[at], settings.repetition_penalty)
        if early.any():
            ends = np.array([i for i in settings.eos_token_id if i < scores.shape[1]], np.int64)
            scores[np.ix_(np.flatnonzero(early), ends)] = -np.inf
        return scores

    def _mark(self, row: int, ids: np.ndarray) -> None:
        """Notes ids as used; those beyond the logits (embedding larger than head) are skipped, as in HF."""
        if self._seen is not None:
            self._seen[row, ids[(ids >= 0) & (ids < self._seen.shape[1])]] = True

    def _draw(self, scores: np.ndarray, which: np.ndarray) -> np.ndarray:
        # Row by row from here on: the candidates differ in number, and no sum can depend on another row.
        tokens = np.empty(len(which), np.int64)
        for i, row in enumerate(which):
            ids, weights = candidates(scores[i], self.settings)
            cumulative = np.cumsum(weights, dtype=np.float64)
            total = cumulative[-1]
            if not np.isfinite(total) or total <= 0:
                raise InputError(f"The logits of row {row} are NaN, +inf or all -inf: nothing can be drawn, check it.")
            # Rounding must not reach the total itself, past the last token that has any weight.
            aim = min(self._streams[row].random() * total, np.nextafter(total, 0.0))
            tokens[i] = ids[np.searchsorted(cumulative, aim, side="right")]
        return tokens


def _stream(seed: int, row: int) -> np.random.Generator:
    return np.random.default_rng([seed, row])


def penalise(scores: np.ndarray, penalty: float) -> np.ndarray:
    """HF's ``RepetitionPenaltyLogitsProcessor``: negative scores times ``penalty``, others divided by it."""
    return np.where(scores < 0, scores * penalty, scores / penalty)


def candidates(scores: np.ndarray, settings: GenerationSettings) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn and their weights, after temperature, top-k, top-p and min-p.

    Sources: ``TemperatureLogitsWarper``, ``TopKLogitsWarper`` (ties with the k-th stay), ``TopPLogitsWarper``
    (ascending; removed while the cumulative probability is at most 1 - top_p; of equal scores the lower ids
    go first, where HF leaves the choice to torch's unstable sort) and ``MinPLogitsWarper`` of transformers
    5.23, each on what the one before left.

    Args:
        scores: float, [vocab].

    Returns:
        ids (int64, [n], ascending) and weights (float32, [n], in proportion to their probabilities).
    """
    scores = scores.astype(np.float32, copy=False)
    if settings.temperature != 1.0:
        scores = scores / settings.temperature
    ids = np.arange(len(scores))
    if 0 < settings.top_k < len(scores):
        ids = _at_least_kth(scores, settings.top_k)
    if settings.top_p < 1.0:
        ids = _nucleus(scores, ids, settings.top_p)
    weights = _exp(scores[ids])
    if settings.min_p is not None:
        shares = _share(weights)
        keep = ~(shares < settings.min_p * shares.max())
        ids, weights = ids[keep], weights[keep]
    return ids, weights


def _at_least_kth(scores: np.ndarray, k: int) -> np.ndarray:
    """Ids of the ``k`` largest scores and of any that tie with the smallest of those."""
    place = len(scores) - k
    # Not "scores >= kth": NaN must stay in, so that it is reported and not dropped.
    return np.flatnonzero(~(scores < np.partition(scores, place)[place]))


def _nucleus(scores: np.ndarray, ids: np.ndarray, top_p: float) -> np.ndarray:
    """Those of ``ids`` that top-p keeps; see :func:`candidates`."""
    shares = _share(_exp(scores[ids]))
    cut = np.float32(1 - top_p)
    below = 0.0
    for look in (n for n in _LOOKS if 4 * n < len(ids)):
        top = _at_least_kth(scores[ids], look)
        rest = 1.0 - shares[top].sum(dtype=np.float64)
        # The tail may stay unsorted only where all of it goes; the margin covers the rounding of these sums.
        if rest < cut - 1e-5:
            ids, shares, below = ids[top], shares[top], max(rest, 0.0)
            break
    order = np.argsort(scores[ids], kind="stable")
    # torch adds float32 in float64 and rounds each sum.
    sums = (below + np.cumsum(shares[order], dtype=np.float64)).astype(np.float32)
    keep = ~(sums <= cut)
    keep[-1] = True
    return np.sort(ids[order[keep]])


def _exp(scores: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.exp(scores - scores.max())


def _share(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def _check_logits(logits: np.ndarray, which: np.ndarray, rows: int) -> None:
    if not isinstance(logits, np.ndarray) or logits.dtype.kind != "f":
        kind = logits.dtype if isinstance(logits, np.ndarray) else type(logits).__name__
        raise InputError(f"Logits must be a floating-point numpy array [rows, vocab], got {kind}.")
    if which.ndim != 1 or which.dtype.kind not in "iu" or ((which < 0) | (which >= rows)).any():
        raise InputError(f"rows must be a list of row numbers below {rows}, got {which.tolist()}.")
    if logits.ndim != 2 or logits.shape[0] != len(which) or logits.shape[1] == 0:
        raise InputError(f"Logits must have the shape [{len(which)}, vocab], got {list(logits.shape)}.")

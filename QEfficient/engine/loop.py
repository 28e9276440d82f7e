"""The token loop: prompts into slots, chunked prefill, decode, until every request has ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from QEfficient.engine.row_prefill import DECODE, PREFILL, RowPrefill
from QEfficient.engine.sampling import Sampler
from QEfficient.engine.settings import GenerationSettings
from QEfficient.engine.stopping import FinishReason, Stopping
from QEfficient.errors import ContextLengthError, PackageError
from QEfficient.targets.base import Session
from QEfficient.targets.manifest import WINDOW, Manifest, Specialization


@dataclass
class Request:
    """One prompt on its way through the loop.

    Attributes:
        number: its place in the caller's list; also its random stream.
        sequence: int64, prompt and generated tokens; room for ``limit`` of the latter.
        length: tokens in ``sequence`` so far.
    """

    number: int
    prompt: np.ndarray
    limit: int
    stopping: Stopping
    sequence: np.ndarray = field(init=False)
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = len(self.prompt)
        self.sequence = np.zeros((1, self.length + self.limit), dtype=np.int64)
        self.sequence[0, : self.length] = self.prompt

    def push(self, token: int) -> bool:
        """Adds a token; returns whether the request has ended."""
        self.sequence[0, self.length] = token
        self.length += 1
        return bool(self.stopping.update(self.sequence[:, : self.length])[0])

    @property
    def generated(self) -> np.ndarray:
        return self.sequence[0, len(self.prompt) : self.length]

    @property
    def reason(self) -> FinishReason:
        return self.stopping.reasons[0] or FinishReason.LENGTH


@dataclass
class Timings:
    """Seconds and token counts of one run."""

    start: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    prefill: float = 0.0
    decode: float = 0.0
    decoded: int = 0

    @property
    def total(self) -> float:
        return time.perf_counter() - self.start


#: Called as (request, token, ended) for each token as it is made.
OnToken = Callable[[Request, int, bool], None]


class TokenLoop:
    """Drives a session. Rows never see each other: what a prompt yields does not depend on its neighbours.

    A package with ``batch_index`` refills a slot as soon as its request ends; one without runs groups of prompts to
    their end.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        manifest = session.manifest
        prompts, answers = _kinds(manifest)
        self._decode_kind = DECODE if answers is not prompts else PREFILL
        prefill, decode = prompts[0].symbols, answers[0].symbols
        self.indexed = any(spec.name == "batch_index" for spec in manifest.inputs)
        self.chunk, self.prefill_rows = prefill["seq_len"], prefill["batch_size"]
        self._row_prefill = RowPrefill(session) if prompts[0].by_row else None
        self.decode_rows = decode["batch_size"]
        #: Columns of a decoding step: more than one where it also checks drafts; the token comes last.
        self._columns = decode["seq_len"].pad_to(1) or 1
        # A graph whose state has no slots for positions, as of Mamba, has no such dimension.
        slots = prefill["ctx_len"].exact if "ctx_len" in prefill else manifest.options.get("ctx_len")
        if slots is None:
            raise PackageError("the package has no fixed ctx_len: compile it again.")
        # The state may be longer than what a step computes with.
        windows = [[s.symbols[WINDOW].maximum or 0 for s in k if WINDOW in s.symbols] for k in (prompts, answers)]
        self._slots, self.capacity = slots, min([slots, *(max(lengths) for lengths in windows if lengths)])
        self.state_rows = prefill["full_batch_size"].exact if self.indexed else None

    def limit_chunk(self, tokens: int) -> None:
        """Feeds prompts in steps of at most so many tokens, if that is less than the package takes."""
        if self._row_prefill is not None:
            self._row_prefill.limit(tokens)

    def room(self, prompt_length: int) -> int:
        """Most tokens that can follow a prompt: the last one is never stored.

        Raises:
            ContextLengthError: the prompt itself does not fit.
        """
        if prompt_length > self.capacity:
            raise ContextLengthError(
                f"a prompt of {prompt_length} tokens does not fit ctx_len={self.capacity}: shorten it or compile with "
                f"a larger ctx_len."
            )
        return self.capacity - prompt_length + 1

    def run(
        self, requests: Sequence[Request], settings: GenerationSettings, on_token: OnToken | None = None
    ) -> Timings:
        """Runs every request to its end; results are in the requests."""
        timings = Timings()
        pending = deque(requests)
        while pending:
            slots = self._open(len(pending))
            active: list[Request | None] = [None] * slots
            sampler = Sampler(settings, slots, [np.zeros(0, np.int64)] * slots)
            started = False
            while True:
                if pending and (self.indexed or not any(active)):
                    if started and not self.indexed and len(pending) < slots:
                        break  # the last, smaller group gets a batch of its own size
                    started = True
                    self._admit(pending, active, sampler, timings, on_token)
                if not any(active):
                    if pending:
                        continue
                    break
                self._step(active, sampler, timings, on_token)
        return timings

    def _open(self, pending: int) -> int:
        """Prepares state and returns the number of slots."""
        if self.state_rows is not None:
            self.session.begin({"full_batch_size": self.state_rows, "ctx_len": self._slots})
            return self.decode_rows.maximum or self.state_rows
        slots = min(pending, self.decode_rows.maximum or pending)
        slots = self.decode_rows.pad_to(slots) or slots
        self.session.begin({"batch_size": slots, "ctx_len": self._slots})
        return slots

    def _admit(
        self,
        pending: deque[Request],
        active: list[Request | None],
        sampler: Sampler,
        timings: Timings,
        on_token: OnToken | None,
    ) -> None:
        """Fills free slots and runs the prompts that entered."""
        entered = []
        for slot, request in enumerate(active):
            if request is None and pending:
                active[slot] = pending.popleft()
                entered.append(slot)
        width = self.prefill_rows.maximum or len(entered) if self.indexed else len(entered)
        for start in range(0, len(entered), max(width, 1)):
            slots = entered[start : start + width]
            began = time.perf_counter()
            logits = self._prefill(slots, active)
            timings.prefill += time.perf_counter() - began
            for slot in slots:
                request = active[slot]
                if request is not None:
                    sampler.restart(slot, request.prompt, request.number)
            self._take(sampler.sample(logits, slots), slots, active, on_token)
            if timings.first_token is None:
                timings.first_token = timings.total

    def _prefill(self, slots: list[int], active: list[Request | None]) -> np.ndarray:
        """Feeds the prompts of ``slots`` in chunks; float32 [len(slots), vocab], each row's own last logits."""
        if self._row_prefill is not None:
            entered = [(slot, active[slot]) for slot in slots]
            return np.stack([self._row_prefill.feed(r.prompt, 0, slot) for slot, r in entered if r is not None])
        rows = list(slots) if self.indexed else list(range(len(active)))
        # Rows that only fill a fixed batch are idle, in slots nobody writes to in this call.
        spare = [slot for slot in range(len(active)) if slot not in rows]
        missing = (self.prefill_rows.pad_to(len(rows)) or len(rows)) - len(rows)
        rows += [-1 - slot for slot in (spare + [0] * missing)[:missing]]
        prompts = [active[r].prompt if r >= 0 and active[r] else np.zeros(0, np.int64) for r in rows]  # type: ignore[union-attr]
        longest = max(len(p) for p in prompts)
        step = self.chunk.maximum or longest
        kept: dict[int, np.ndarray] = {}
        for start in range(0, longest, step):
            width = self.chunk.pad_to(min(step, longest - start)) or step
            ids = np.zeros((len(rows), width), np.int64)
            positions = np.full((len(rows), width), -1, np.int64)
            for i, prompt in enumerate(prompts):
                part = prompt[start : start + width]
                ids[i, : len(part)] = part
                positions[i, : len(part)] = np.arange(start, start + len(part))
            logits = self._call(PREFILL, ids, positions, rows)
            for i, prompt in enumerate(prompts):
                if start < len(prompt) <= start + width:
                    kept[rows[i]] = logits[i, -1].copy()
        return np.stack([kept[slot] for slot in slots])

    def _step(
        self,
        active: list[Request | None],
        sampler: Sampler,
        timings: Timings,
        on_token: OnToken | None,
    ) -> None:
        """One decoded token for every active slot."""
        slots = [slot for slot, request in enumerate(active) if request is not None]
        rows = self._decode_rows(slots, active)
        ids = np.zeros((len(rows), self._columns), np.int64)
        positions = np.full((len(rows), self._columns), -1, np.int64)
        for i, row in enumerate(rows):
            request = active[row]
            if request is not None:
                ids[i, -1] = request.sequence[0, request.length - 1]
                positions[i, -1] = request.length - 1
        began = time.perf_counter()
        logits = self._call(self._decode_kind, ids, positions, rows)
        timings.decode += time.perf_counter() - began
        timings.decoded += len(slots)
        chosen = logits[:, -1] if rows == slots else logits[[rows.index(slot) for slot in slots], -1]
        self._take(sampler.sample(chosen, slots), slots, active, on_token)

    def _decode_rows(self, slots: list[int], active: list[Request | None]) -> list[int]:
        """Which slots a decode call carries: the active ones, or all where rows are slots or the batch is fixed."""
        if self.indexed and self.decode_rows.accepts(len(slots)):
            return slots
        return list(range(len(active)))

    def _call(self, specialization: str, ids: np.ndarray, positions: np.ndarray, rows: list[int]) -> np.ndarray:
        feeds = {"input_ids": ids, "position_ids": positions}
        if self.indexed:
            feeds["batch_index"] = np.array([[row if row >= 0 else -1 - row] for row in rows], np.int64)
        return self.session.run(feeds, specialization)["logits"]

    @staticmethod
    def _take(tokens: np.ndarray, slots: list[int], active: list[Request | None], on_token: OnToken | None) -> None:
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            request = active[slot]
            if request is None:
                continue
            ended = request.push(token)
            if on_token is not None:
                on_token(request, token, ended)
            if ended:
                active[slot] = None


def _kinds(manifest: Manifest) -> tuple[tuple[Specialization, ...], tuple[Specialization, ...]]:
    """The steps for prompts and those for answers, which are the same where prompts come token by token.

    Raises:
        PackageError: the package has only one of them.
    """
    try:
        prompts = manifest.steps(PREFILL)
    except KeyError:
        raise PackageError(
            "the package was compiled for answers only (prefill_only=False): compile it without prefill_only."
        ) from None
    try:
        return prompts, manifest.steps(DECODE)
    except KeyError:
        if prompts[0].symbols["seq_len"].exact == 1:
            return prompts, prompts
        raise PackageError(
            "the package was compiled for prompts only (prefill_only=True): compile it without prefill_only."
        ) from None

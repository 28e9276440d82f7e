"""Feeds one sequence of tokens to one row of a package's state, in the steps its specializations allow."""

from __future__ import annotations

import numpy as np

from QEfficient.targets.base import Session

PREFILL, DECODE = "Prefill", "Decode"
#: In packages whose Prefill only writes state: short sequences, and the last tokens of long ones.
TAIL = "Tail"
#: Last tokens of a long sequence that are not worth a step of Prefill.
FEW = 4


class RowPrefill:
    """Prefill of packages whose Prefill takes one row (`Specialization.by_row`): nothing is ever padded."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._step = session.manifest.specialization(PREFILL).symbols["seq_len"].maximum
        tails = [spec for spec in session.manifest.specializations if spec.name == TAIL]
        #: Most tokens the tail takes; 0 when Prefill itself returns logits.
        self._tail = (tails[0].symbols["seq_len"].maximum or 1) if tails else 0

    def limit(self, tokens: int) -> None:
        """Takes smaller steps from now on."""
        self._step = min(tokens, self._step or tokens)

    def feed(self, ids: np.ndarray, start: int, row: int) -> np.ndarray:
        """Runs ids int64 [n], n >= 1, at positions ``start``, …; returns the last token's logits float32 [vocab]."""
        logits = np.zeros(0, np.float32)
        done = 0
        last = len(ids) if len(ids) <= self._tail else min(FEW, self._tail)
        while done < len(ids):
            left = len(ids) - done
            if left <= last:
                specialization, count = TAIL, left
            else:  # the tail keeps at least one token
                most = left - 1 if self._tail else left
                specialization, count = PREFILL, min(self._step or most, most)
            part = ids[None, done : done + count].astype(np.int64)
            positions = np.arange(start + done, start + done + count, dtype=np.int64)[None]
            result = self.session.run({"input_ids": part, "position_ids": positions}, specialization, row=row)
            if "logits" in result:
                logits = result["logits"][0, -1]
            done += count
        return logits.copy()

"""What a generation returns: texts, ids, why each row ended, and how long it took."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field


@dataclass(frozen=True)
class GenerationMetrics:
    """Measured around the session calls of one `generate`.

    Attributes:
        prompt_tokens, generated_tokens: tokens over all rows.
        ttft_s: seconds from the call to the first generated token.
        prefill_s, decode_s, total_s: seconds in prompt steps, in decode steps, and altogether.
        peak_rss_mb: largest resident memory of the process so far, MB (10^6 bytes).
    """

    prompt_tokens: int
    generated_tokens: int
    ttft_s: float
    prefill_s: float
    decode_s: float
    total_s: float
    decoded_tokens: int
    peak_rss_mb: float

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens made by decode steps per second; the first token of a row comes from its prefill."""
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0

    def __str__(self) -> str:
        return (
            f"time to first token {self.ttft_s * 1e3:.1f} ms, prefill {self.prefill_tokens_per_s:.1f} tokens/s, "
            f"decode {self.decode_tokens_per_s:.1f} tokens/s, {self.generated_tokens} tokens in {self.total_s:.2f} s, "
            f"peak memory {self.peak_rss_mb:.0f} MB"
        )

    # Names users of efficient-transformers know (PerfMetrics).
    @property
    def prefill_time(self) -> float:
        return self.ttft_s

    @property
    def decode_perf(self) -> float:
        return self.decode_tokens_per_s

    @property
    def total_perf(self) -> float:
        return self.generated_tokens / self.total_s if self.total_s else 0.0

    @property
    def total_time(self) -> float:
        return self.total_s


@dataclass(frozen=True)
class GenerationResult:
    """One entry per prompt, in the order the prompts were given.

    Attributes:
        texts: generated text, without the prompt and without stop strings.
        ids: generated token ids, the stopping token included.
        finish_reasons: "eos", "stop_string", "criteria" or "length".
    """

    texts: list[str]
    ids: list[list[int]]
    finish_reasons: list[str]
    metrics: GenerationMetrics = field(repr=False)

    # Names users of efficient-transformers know (CloudAI100ExecInfo).
    @property
    def generated_texts(self) -> list[str]:
        return self.texts

    @property
    def generated_ids(self) -> list[list[int]]:
        return self.ids

    @property
    def perf_metrics(self) -> GenerationMetrics:
        return self.metrics

    @property
    def batch_size(self) -> int:
        return len(self.ids)


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6

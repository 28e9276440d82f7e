"""The label audit: what is trained, in numbers and in one decoded row, before the first step."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from QEfficient.errors import InputError
from QEfficient.finetune.data.token_rows import IGNORE, TokenRows
from QEfficient.finetune.settings_file import write_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

#: What plain text puts around a trained span.
OPEN, CLOSE = "[[", "]]"

#: Sentences about rows that cannot be read which a report keeps.
MOST_BAD_ROWS = 1000

#: Share of rows cut inside an answer above which a run is probably not what was meant.
CUT_WARNING = 0.05


class Counted(Protocol):
    """What rows say of themselves in numbers."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def trained(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Span:
    """A piece of a decoded row, and whether its tokens are trained."""

    text: str
    trained: bool
    tokens: int


@dataclass
class SplitReport:
    """Numbers of one split, after encoding.

    Attributes:
        rows_in, rows: rows of the source and rows that are used.
        dropped: reason -> rows left out.
        marks: what happened to rows that are used -> rows ("prompt shortened", "answer cut", …).
        tokens, trained_tokens: totals; a first token is never trained.
        longest, shortest, median: tokens of a row.
        histogram: upper bound of a length, in tokens -> rows.
        without_end: rows whose trained tokens hold no end token.
        packed_rows: rows after packing, or None.
    """

    rows_in: int = 0
    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    shortest: int = 0
    median: float = 0.0
    histogram: dict[int, int] = field(default_factory=dict)
    without_end: int = 0
    packed_rows: int | None = None

    @property
    def trained_share(self) -> float:
        """Trained tokens by all tokens."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0


@dataclass
class SourceShare:
    """What one source of a mixture gives to the training rows.

    Attributes:
        name, format: of the source.
        available: rows that could be used.
        rows: rows of the mixture; more than ``available`` where rows are repeated.
        tokens, trained_tokens: of those rows.
        share, token_share: of the mixture's rows and tokens, from 0 to 1.
        filtered, dropped: as for a source by itself: filter or reason -> rows.
        sample, sample_row: spans of one row and its number.
    """

    name: str
    format: str
    available: int
    rows: int
    tokens: int
    trained_tokens: int
    share: float
    token_share: float
    filtered: dict[str, int]
    dropped: dict[str, int]
    sample: list[Span]
    sample_row: int

    def line(self) -> str:
        """For people."""
        said = (
            f"- {self.name}, format {self.format}: {self.rows:,} of {self.available:,} rows ({self.share:.1%}), "
            f"{self.tokens:,} tokens ({self.token_share:.1%}), {self.trained_tokens:,} trained"
        )
        return said + "".join(f"; {reason}: {count:,}" for reason, count in {**self.filtered, **self.dropped}.items())


def describe_split(
    rows: Counted, rows_in: int, dropped: Counter[str], marks: Counter[str], without_end: int, per_example: int = 1
) -> SplitReport:
    """The numbers of a split; ``per_example`` tokenized rows count as one row of the source."""
    lengths = rows.lengths
    report = SplitReport(rows_in, len(rows) // per_example, dict(dropped), dict(marks), without_end=without_end)
    if not len(rows):
        return report
    report.tokens = int(lengths.sum())
    report.trained_tokens = int(rows.trained.sum())
    report.longest, report.shortest = int(lengths.max()), int(lengths.min())
    report.median = float(np.median(lengths))
    bounds = 2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    report.histogram = {int(bound): int(count) for bound, count in sorted(Counter(bounds.tolist()).items())}
    return report


@dataclass
class LabelAudit:
    """What is trained: printable with ``rich``, as plain text, and as JSON.

    Attributes:
        source: name of the data.
        format: of its rows.
        splits: numbers by split ("train", "eval").
        sample: spans of one row of the training split.
        sample_row: its number in the source, from 1.
        notes: what was decided or looks wrong, one sentence each.
        classes: label name -> class id, for classification.
        filtered: filter -> rows it removed, before the split.
        bad_rows: why rows were left out that cannot be read, a sentence each, the first of them.
        sources: of a mixture, what each gives to the training rows.
        first_rows: of a stream, how many rows at its beginning the figures of training rows are of.
    """

    source: str
    format: str
    splits: dict[str, SplitReport]
    sample: list[Span]
    sample_row: int
    notes: list[str] = field(default_factory=list)
    classes: dict[str, int] | None = None
    bad_rows: list[str] = field(default_factory=list)
    filtered: dict[str, int] = field(default_factory=dict)
    sources: list[SourceShare] = field(default_factory=list)
    first_rows: int | None = None

    def to_text(self) -> str:
        """The audit as plain text; trained spans stand between double brackets."""
        lines = self._lines()
        for row, sample in self._samples():
            lines.append(f"{row}, trained tokens between {OPEN} and {CLOSE}:")
            lines.append("".join(f"{OPEN}{span.text}{CLOSE}" if span.trained else span.text for span in sample))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_rich(self) -> Text:
        """The audit for a terminal; trained spans are bold green, masked ones dim."""
        from rich.text import Text

        text = Text("\n".join(self._lines()))
        for row, sample in self._samples():
            text.append(f"\n{row}, trained tokens in ")
            text.append("green", "bold green")
            text.append(":\n")
            for span in sample:
                text.append(span.text, "bold green" if span.trained else "dim")
        for note in self.notes:
            text.append(f"\nnote: {note}", "yellow")
        return text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Colours where there are any, brackets in a file or a pipe."""
        from rich.text import Text

        yield self.to_rich() if console.color_system else Text(self.to_text())

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values: the content of ``data_report.json``."""
        body = dataclasses.asdict(self)
        for name, split in self.splits.items():
            body["splits"][name]["trained_share"] = round(split.trained_share, 6)
            body["splits"][name]["histogram"] = {str(bound): count for bound, count in split.histogram.items()}
        return body

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> LabelAudit:
        """What ``to_dict`` gave."""
        splits = {}
        for name, values in body["splits"].items():
            kept = {key: value for key, value in values.items() if key != "trained_share"}
            kept["histogram"] = {int(bound): count for bound, count in kept["histogram"].items()}
            splits[name] = SplitReport(**kept)
        sample = [Span(**span) for span in body["sample"]]
        sources = [
            SourceShare(**{**source, "sample": [Span(**span) for span in source["sample"]]})
            for source in body["sources"]
        ]
        return cls(**{**body, "splits": splits, "sample": sample, "sources": sources})

    def write(self, path: Path) -> Path:
        """Writes ``data_report.json`` atomically; returns the path."""
        return write_text(
            Path(path), json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", "the data report"
        )

    def _samples(self) -> list[tuple[str, list[Span]]]:
        """What to call each row that is shown, and its spans: one row of every source."""
        if not self.sources:
            return [(f"row {self.sample_row}", self.sample)]
        return [(f"row {source.sample_row} of {source.name}", source.sample) for source in self.sources]

    def _lines(self) -> list[str]:
        lines = [f"data: {self.source}, format {self.format}"]
        if self.first_rows is not None:
            lines.append(f"a stream, read while training: the figures are of its first {self.first_rows:,} rows")
        if self.filtered:
            lines.append("filtered: " + ", ".join(f"{name} {count:,}" for name, count in self.filtered.items()))
        for name, split in self.splits.items():
            line = (
                f"{name}: {split.rows:,} of {split.rows_in:,} rows, {split.tokens:,} tokens, "
                f"{split.trained_tokens:,} trained ({split.trained_share:.1%}), "
                f"length {split.shortest}–{split.longest}, median {split.median:g}"
            )
            if self.classes is not None:
                line = (
                    f"{name}: {split.rows:,} of {split.rows_in:,} rows, {split.tokens:,} tokens, "
                    f"{len(self.classes)} classes, length {split.shortest}–{split.longest}, median {split.median:g}"
                )
            if split.packed_rows is not None:
                line += f"; packed into {split.packed_rows:,} rows"
            for reason, count in {**split.dropped, **split.marks}.items():
                line += f"; {reason}: {count:,}"
            lines.append(line)
        return lines + [source.line() for source in self.sources]


def spans(rows: TokenRows, index: int, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """A row's text in runs of trained and masked tokens; joined, they are the decoded row."""
    item = rows[index]
    ids = [int(i) for i in item["input_ids"]]
    trained = np.zeros(len(ids), bool) if rows.classes else item["labels"] != IGNORE
    cuts = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    found, before = [], ""
    for start, end in itertools.pairwise(cuts):
        # Decoded from the beginning each time: some tokenizers drop the space of whatever text comes first.
        through = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        text = through[len(before) :] if through.startswith(before) else through
        found.append(Span(text, bool(trained[start]), end - start))
        before = through
    return found


def check_split(name: str, report: SplitReport, hint: str) -> list[str]:
    """Notes on a split that looks wrong.

    Raises:
        InputError: it has no row, or none of its tokens is trained; the message says why.
    """
    if report.rows == 0:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in report.dropped.items()) or "it was empty"
        raise InputError(f"No row of the {name} data can be trained on ({reasons}): {hint}.")
    notes = []
    cut = report.marks.get("answer cut", 0) + report.marks.get("text cut", 0)
    if cut > CUT_WARNING * report.rows:
        notes.append(
            f"{cut} of {report.rows} {name} rows are cut at max_ctx_len: raise it if the end of a text matters."
        )
    if report.without_end:
        notes.append(
            f"{report.without_end} of {report.rows} {name} rows train no end token, so the model does not learn where "
            "to stop from them."
        )
    return notes

"""The work behind ``prepare_dataset``: split, sample, read, encode, count what happened, check, save."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.audit import MOST_BAD_ROWS, LabelAudit, SplitReport, check_split, describe_split, spans
from QEfficient.finetune.data.augment import augmented, read_augmentations
from QEfficient.finetune.data.batching import SAMPLE, SPLIT, permutation
from QEfficient.finetune.data.encode import NO_END, Dropped, Encoded, EncodeOptions, RowEncoder
from QEfficient.finetune.data.examples import Conversation, Example, Exchange
from QEfficient.finetune.data.files import Rows, Unreadable
from QEfficient.finetune.data.filters import Filter, apply_filters, read_filters
from QEfficient.finetune.data.formats import Renamer, pairs_in, read_row
from QEfficient.finetune.data.parallel import in_order, processes_for
from QEfficient.finetune.data.recognise import recognise
from QEfficient.finetune.data.sources import Source
from QEfficient.finetune.data.token_rows import TokenRows
from QEfficient.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPORT = "data_report.json"
#: Why rows are left out under ``on_bad_row="skip"``, in reports.
_BAD = "malformed"
#: Formats whose answers get an end token.
_ANSWERS = ("messages", "sharegpt", "alpaca", "prompt_completion", "preference", "unpaired_preference")
#: Rows between progress reports.
_PROGRESS_EVERY = 500


def split_rows(count: int, train_frac: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are trained on and which are for evaluation.

    Args:
        count: rows.
        train_frac: share for training; below 1 each side gets at least one row where there are two.
        seed: of the permutation the split is drawn by.

    Returns:
        (training, evaluation) row numbers from 0, ascending.
    """
    order = permutation(count, seed, SPLIT)
    train = count if train_frac >= 1 or count < 2 else min(max(round(count * train_frac), 1), count - 1)
    return np.sort(order[:train]), np.sort(order[train:])


def sample_rows(rows: np.ndarray, size: int | None, seed: int) -> np.ndarray:
    """At most ``size`` of the row numbers, drawn without replacement, in the order they had."""
    if size is None or size >= len(rows):
        return rows
    return rows[np.sort(permutation(len(rows), seed, SAMPLE)[:size])]


def filtered_rows(filters: Sequence[Filter], rows: Rows, renamer: Renamer) -> tuple[np.ndarray, Counter[str]]:
    """(numbers of the rows that filters leave, ascending from 0; filter -> rows it removed).

    Rows that cannot be read stay, to be counted where rows are read.

    Raises:
        InputError: the filters leave none.
    """
    if not filters:
        return np.arange(len(rows)), Counter()
    unreadable = {number for number in range(len(rows)) if isinstance(rows[number], Unreadable)}
    readable = [(n, renamer(rows[n])) for n in range(len(rows)) if n not in unreadable]
    kept, removed = apply_filters(filters, readable)
    if not kept:
        reasons = ", ".join(f"{count} × {name}" for name, count in removed.items() if count)
        raise InputError(f"The filters leave no row ({reasons}): choose others.")
    return np.array(sorted({*kept, *unreadable})), removed


class Preparation:
    """One data set on its way from rows to tokens.

    Args:
        config: what to do with the rows.
        tokenizer: with the chat template to use.
        source: the rows.
        respond: gives examples other answers, or None where it has none; for training rows only.

    Raises:
        OptionError: no format fits the columns, a column is mapped that is not there, or answers could not end.
        InputError: rows of several formats.
    """

    def __init__(
        self,
        config: QEffConfig,
        tokenizer: PreTrainedTokenizerBase,
        source: Source,
        respond: Callable[[Sequence[Example], Progress], list[Example | None]] | None = None,
    ) -> None:
        self.config, self.tokenizer, self.source, self._respond = config, tokenizer, source, respond
        #: Number of a training row, from 1 -> the example with another answer, where `respond` gives them.
        self._answers: dict[int, Example | None] = {}
        found = recognise(config, source.train, source.name, source.labels)
        self.renamer, self._names_of_rows, self.format = found.renamer, found.names, found.format
        self.bad_rows: list[str] = []
        self._filters = read_filters(config.filters or ())
        self._augmentations = read_augmentations(config.augment or ())
        self._made: Counter[str] = Counter()
        self.filtered: Counter[str] = Counter()
        if self.format.name in _ANSWERS and config.train_on != "all" and tokenizer.eos_token_id is None:
            raise OptionError(NO_END)
        self.notes = list(source.notes)
        self._encoder = self.encoder(config, tokenizer)
        self._done: dict[str, tuple[TokenRows, SplitReport]] = {}
        self._names: dict[str, int] | None = None
        self._audit: LabelAudit | None = None

    @staticmethod
    def encoder(config: QEffConfig, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """The encoder of a configuration."""
        names = [f.name for f in dataclasses.fields(EncodeOptions)]
        return RowEncoder(tokenizer, EncodeOptions(**{name: getattr(config, name) for name in names}))

    @property
    def _per_example(self) -> int:
        """Tokenized rows of one row of the source: a preference has two."""
        return 2 if self.format.kind == "preference" else 1

    @property
    def joiner(self) -> str:
        """What stands between prompt and answer where there is no chat template."""
        if self.format.name == "alpaca":
            return "\n"
        if self.format.kind == "preference":
            names = set(self._names_of_rows)
            return "\n" if "prompt" not in names and names & {"question", "instruction"} else ""
        pairs = pairs_in(self._names_of_rows)
        return "\n" if self.format.name == "prompt_completion" and pairs[0] != ("prompt", "completion") else ""

    def identity(self) -> dict[str, Any]:
        """The options that decide the result, as JSON values."""
        names = [
            "train_frac",
            "max_ctx_len",
            "task",
            "columns",
            "system_prompt",
            "train_on",
            "truncation",
            "sample_size",
            "seed",
            "on_bad_row",
        ]
        filters = [item.identity for item in self._filters]
        augment = [item.identity for item in self._augmentations]
        values = {name: getattr(self.config, name) for name in names}
        beginning = {} if self.source.held is None else {"held": self.source.held}
        return {"format": self.format.name, "filters": filters, "augment": augment, **values, **beginning}

    def run(self, progress: Progress) -> None:
        """Does the work.

        Raises:
            InputError: a row that does not fit the format, answers that do not fit the length, no trained token.
        """
        config, source = self.config, self.source
        usable = self._filtered(source.train, progress)
        if source.evaluation is None:
            train, evaluation = self._split(usable)
            parts = {"train": (source.train, train), "eval": (source.train, evaluation)}
            if not len(evaluation) and config.train_frac < 1 and source.held is None:
                self.notes.append("there is one row only, so there are none for evaluation.")
        else:
            parts = {
                "train": (source.train, usable),
                "eval": (source.evaluation, self._filtered(source.evaluation, progress)),
            }
        rows, numbers = parts["train"]
        parts["train"] = rows, sample_rows(numbers, config.sample_size, config.seed)
        if config.sample_size is not None and config.sample_size > len(numbers):
            self.notes.append(
                f"sample_size={config.sample_size} is more than the {len(numbers)} training rows: all are used."
            )
        encoded = {
            name: self._encode(name, rows, numbers, progress) for name, (rows, numbers) in parts.items() if len(numbers)
        }
        if source.evaluation is None and "eval" in encoded and not encoded["eval"][0] and encoded["train"][0]:
            # Nobody chose these rows for evaluation, so that they are unusable is no reason to stop.
            dropped = encoded.pop("eval")[1]
            reasons = ", ".join(f"{count} × {reason}" for reason, count in dropped.items())
            self.notes.append(
                f"none of the rows split off for evaluation can be used ({reasons}), so there are none for evaluation."
            )
        if self.format.kind == "seq_classification":
            self._names = self._classes(encoded)
        for name, (found, dropped, marks) in encoded.items():
            tokens = TokenRows.from_encoded(found, self._names)
            if tokens.desirable is not None:
                good = int(tokens.desirable.sum())
                self.notes.append(
                    f"{name}: {good:,} of {len(tokens):,} answers are good, {len(tokens) - good:,} are not."
                )
            without_end = 0 if tokens.classes else sum(not _trains_end(row) for _, row in found)
            given = len(parts[name][1])
            if self._augmentations and name == "train":
                self.notes.append(f"augmentation made {self._made[name]:,} training rows of {given:,}.")
                given = self._made[name] + dropped[_BAD]
            report = describe_split(tokens, given, dropped, marks, without_end, self._per_example)
            self.notes += check_split(name, report, self._hint(report))
            self._done[name] = tokens, report
        self._audit = self._make_audit()

    def _split(self, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the numbers of usable rows, those to train on and those for evaluation."""
        held = self.source.held
        if held is None:
            train, evaluation = split_rows(len(usable), self.config.train_frac, self.config.seed)
            return usable[train], usable[evaluation]
        return usable[usable >= held], usable[usable < held]

    def _filtered(self, rows: Rows, progress: Progress) -> np.ndarray:
        """Numbers of the rows that filters leave, ascending from 0; rows that cannot be read stay, to be counted."""
        if self._filters:
            progress("filtering rows", 0, len(rows))
        numbers, removed = filtered_rows(self._filters, rows, self.renamer)
        self.filtered.update(removed)
        return numbers

    def _encode(
        self, name: str, rows: Rows, numbers: np.ndarray, progress: Progress
    ) -> tuple[list[tuple[int, Encoded]], Counter[str], Counter[str]]:
        found: list[tuple[int, Encoded]] = []
        dropped: Counter[str] = Counter()
        marks: Counter[str] = Counter()
        needs: list[tuple[int, int | str]] = []
        labels = self.source.labels if rows is self.source.train else None
        if name == "train" and self._respond is not None:
            self._answers = self._answered(rows, numbers, progress)

        def encoded(index: int) -> InputError | list[list[Encoded] | Dropped | None]:
            label = labels[index] if labels is not None else index + 1
            try:
                return self.encode(rows[index], label, augment=name == "train", place=index + 1)
            except InputError as error:
                return error

        processes = processes_for(len(numbers), self.config.dataset_num_proc)
        for done, variants in enumerate(in_order(encoded, numbers.tolist(), processes)):
            if done % _PROGRESS_EVERY == 0:
                progress(f"tokenizing {name} rows", done, len(numbers))
            index = int(numbers[done])
            label = labels[index] if labels is not None else index + 1
            if isinstance(variants, InputError):
                if self.config.on_bad_row == "error":
                    raise variants
                dropped[_BAD] += 1
                self.bad_rows.append(str(variants))
                continue
            self._made[name] += len(variants)
            for made in variants:
                if made is None:
                    dropped["empty"] += 1
                elif isinstance(made, Dropped):
                    dropped[made.reason] += 1
                    needs += [(made.needs, label)] if made.needs else []
                else:
                    marks.update(set().union(*(row.marks for row in made)))
                    found += [(index + 1, row) for row in made]
        if needs:
            raise InputError(self._too_long(name, needs, len(numbers)))
        return found, dropped, marks

    def encode(self, row: Any, label: int | str, *, augment: bool, place: int) -> list[list[Encoded] | Dropped | None]:
        """A row of the source as tokens; several, or none, where augmentation makes so many of it.

        Args:
            label: the row's number, or what messages call it after the word "Row".
            augment: whether the row is trained on.
            place: its number from 1, on which augmentation depends besides the seed.

        Returns:
            Tokens (of both answers of a preference), why they are left out, or None where a required value is empty.

        Raises:
            InputError: the row cannot be read.
        """
        if isinstance(row, Unreadable):
            raise InputError(row.why)
        renamed = self.renamer(row)
        variants = [renamed]
        if augment and self._augmentations:
            variants = augmented(self._augmentations, renamed, self.config.seed, place)
        if augment and place in self._answers:
            answer = self._answers[place]
            return [self._tokens_of(answer, label) if answer is not None else Dropped("the teacher did not finish")]
        return [self._rows_of(variant, label) for variant in variants]

    def _answered(self, rows: Rows, numbers: np.ndarray, progress: Progress) -> dict[int, Example | None]:
        """Number of a row, from 1 -> its example with the answer of `respond`; unreadable rows come up later."""
        assert self._respond is not None
        found: dict[int, Example] = {}
        for index in numbers.tolist():
            with contextlib.suppress(InputError):
                row = rows[index]
                example = None if isinstance(row, Unreadable) else read_row(self.format, self.renamer(row), index + 1)
                found |= {} if example is None else {index + 1: example}
        for number, example in found.items():
            if not isinstance(example, Exchange | Conversation):
                raise InputError(
                    f"Row {number} has no prompt that a teacher could answer: give rows with prompts or messages, or "
                    "use distillation='logits'."
                )
        return dict(zip(found, self._respond([*found.values()], progress), strict=True))

    def _rows_of(self, row: Any, label: int | str) -> list[Encoded] | Dropped | None:
        """A row as tokens, twice for a pair; None when a required value is empty, InputError when it cannot be read."""
        example = read_row(self.format, row, label)
        return None if example is None else self._tokens_of(example, label)

    def _tokens_of(self, example: Example, label: int | str) -> list[Encoded] | Dropped:
        try:
            return self._encoder.rows(example)
        except InputError as error:
            raise InputError(f"Row {label} cannot be encoded: {error}") from error

    def _too_long(self, name: str, needs: list[tuple[int, int | str]], count: int) -> str:
        longest, number = max(needs, key=lambda need: need[0])
        if self.config.truncation == "error":
            return (
                f"{len(needs)} of {count} {name} rows are longer than max_ctx_len={self.config.max_ctx_len} (the "
                f"longest, row {number}, has {longest} tokens): raise it to {longest} or choose another truncation."
            )
        return (
            f"The answers of {len(needs)} of {count} {name} rows do not fit into max_ctx_len={self.config.max_ctx_len} "
            f"(row {number} needs {longest} without its question): raise max_ctx_len to more than {longest}, or set "
            "truncation='cut_answer' or 'drop'."
        )

    def _classes(self, encoded: dict[str, Any]) -> dict[str, int]:
        """Label name -> class id; labels that are integers keep their number."""
        train = [(number, row.label) for number, row in encoded["train"][0]]
        if any(isinstance(label, int) for _, label in train):
            top = max((label for _, label in train if isinstance(label, int)), default=0)
            names = {str(label): label for label in range(top + 1)}
        else:
            names = {label: index for index, label in enumerate(sorted({label for _, label in train}))}
        for number, row in encoded.get("eval", ([],))[0]:
            if str(row.label) not in names:
                raise InputError(f"Evaluation row {number} has the label {row.label!r}, which no training row has.")
        if len(names) < 2 and train:
            raise InputError(f"Every training row has the label {train[0][1]!r}: classes cannot be learned from one.")
        return names

    def _hint(self, report: SplitReport) -> str:
        if self.format.name == "segments" and set(report.dropped) == {"empty"}:
            return "no segment with a text has label true, so set it where the text is to be learned"
        if self.format.name == "tokenized":
            return "give labels that are not all -100"
        if self.config.truncation == "drop":
            return "raise max_ctx_len or set truncation='truncate'"
        return "check the columns, max_ctx_len and train_on"

    def _make_audit(self) -> LabelAudit:
        if self.bad_rows:
            self.notes.append(
                f"{len(self.bad_rows):,} rows cannot be read and were left out (on_bad_row='skip'), the first: "
                f"{self.bad_rows[0]}"
            )
        train = self._done["train"][0]
        if self.format.name == "tokenized" and not {"labels", "completion_mask", "assistant_masks"} & set(
            self.renamer.names
        ):
            self.notes.append("the rows have input_ids and no labels, so every token is trained.")
        return LabelAudit(
            self.source.name,
            self.format.name,
            {name: report for name, (_, report) in self._done.items()},
            spans(train, 0, self.tokenizer),
            int(train.numbers[0]),
            self.notes,
            self._names,
            self.bad_rows[:MOST_BAD_ROWS],
            dict(self.filtered),
        )

    def save(self, directory: Path) -> None:
        """Writes the tokens and the report into an empty directory."""
        assert self._audit is not None
        for name, (rows, _) in self._done.items():
            rows.save(directory, name)
        body = json.dumps(self._audit.to_dict(), ensure_ascii=False)
        (directory / _REPORT).write_text(body, encoding="utf-8")

    @staticmethod
    def load(directory: Path) -> tuple[TokenRows, TokenRows | None, LabelAudit]:
        """What ``save`` wrote: training rows, evaluation rows or None, the audit."""
        audit = LabelAudit.from_dict(json.loads((directory / _REPORT).read_text(encoding="utf-8")))
        classes = audit.classes is not None
        train = TokenRows.load(directory, "train", classes)
        return train, TokenRows.load(directory, "eval", classes) if "eval" in audit.splits else None, audit


def _trains_end(row: Encoded) -> bool:
    return any(row.weights[end] for end in row.ends)

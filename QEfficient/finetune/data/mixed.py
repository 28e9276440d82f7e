"""Prepared sources become one set of training rows, one of evaluation rows, and an audit that tells them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from QEfficient.errors import InputError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.audit import MOST_BAD_ROWS, LabelAudit, SourceShare, describe_split
from QEfficient.finetune.data.mixing import MixedRows, draw, row_counts, shares
from QEfficient.finetune.data.token_rows import TokenRows


@dataclass(frozen=True)
class Prepared:
    """One source after preparation.

    Attributes:
        train, evaluation: its rows.
        audit: of them.
        key: identifies rows and audit by content.
        joiner: what stands between prompt and answer where there is no chat template.
    """

    train: TokenRows
    evaluation: TokenRows | None
    audit: LabelAudit
    key: str
    joiner: str


def mixed(sources: Sequence[Prepared], config: QEffConfig) -> tuple[MixedRows, MixedRows | None, LabelAudit]:
    """The mixture that a configuration describes; a function of the sources and the options of mixing alone.

    Returns:
        (training rows, one source after the other; every source's evaluation rows, or None; the audit).

    Raises:
        InputError: counts that cannot be, see `row_counts`, or classes that are not the same everywhere.
    """
    assert config.datasets is not None
    audits = [source.audit for source in sources]
    names, sizes = [audit.source for audit in audits], [len(source.train) for source in sources]
    weights = [item["weight"] for item in config.datasets] if "weight" in config.datasets[0] else None
    parts = shares(sizes, weights, config.mixing_temperature or 1)
    counts = row_counts(names, sizes, parts, config.mixing == "upsample", config.mixing_rows)
    drawn = enumerate(zip(sizes, counts, strict=True))
    chosen = [draw(size, count, config.seed, place) for place, (size, count) in drawn]
    classes = _classes(audits)
    train = MixedRows([source.train for source in sources], chosen)
    held = [source.evaluation for source in sources if source.evaluation is not None]
    evaluation = MixedRows(held, [np.arange(len(rows)) for rows in held]) if held else None
    return train, evaluation, _audit(sources, train, evaluation, classes)


def _classes(audits: Sequence[LabelAudit]) -> dict[str, int] | None:
    """Label name -> class id over all sources; None without classes."""
    found: dict[str, int] = {}
    for audit in audits:
        for name, number in (audit.classes or {}).items():
            if found.setdefault(name, number) != number or list(found.values()).count(number) > 1:
                raise InputError(
                    f"{audits[0].source} and {audit.source} do not have the same classes ({_listed(audits[0])} and "
                    f"{_listed(audit)}): give both the same labels, or numbers as labels."
                )
    return dict(sorted(found.items(), key=lambda item: item[1])) or None


def _listed(audit: LabelAudit) -> str:
    return ", ".join(list(audit.classes or {})[:10])


def _audit(
    sources: Sequence[Prepared], train: MixedRows, evaluation: MixedRows | None, classes: dict[str, int] | None
) -> LabelAudit:
    audits = [source.audit for source in sources]
    splits = {}
    for name, rows in (("train", train), ("eval", evaluation)):
        if rows is None:
            continue
        reports = [audit.splits[name] for audit in audits if name in audit.splits]
        dropped = sum((Counter(report.dropped) for report in reports), Counter[str]())
        if name == "train":
            dropped["not drawn"] = sum(
                max(0, len(part) - len(used)) for part, used in zip(train.parts, train.chosen, strict=True)
            )
        # Marks of prepared rows are of no use here: not all of them need be in the mixture.
        splits[name] = describe_split(rows, sum(report.rows_in for report in reports), +dropped, Counter(), 0)
    found = []
    for audit, part, used in zip(audits, train.parts, train.chosen, strict=True):
        tokens = int(part.lengths[used].sum())
        found.append(
            SourceShare(
                name=audit.source,
                format=audit.format,
                available=len(part),
                rows=len(used),
                tokens=tokens,
                trained_tokens=int(part.trained[used].sum()),
                share=round(len(used) / len(train), 6),
                token_share=round(tokens / splits["train"].tokens, 6),
                filtered=audit.filtered,
                dropped=audit.splits["train"].dropped,
                sample=audit.sample,
                sample_row=audit.sample_row,
            )
        )
    formats = list(dict.fromkeys(audit.format for audit in audits))
    return LabelAudit(
        f"mixture of {len(audits)} sources",
        " and ".join(formats),
        splits,
        audits[0].sample,
        audits[0].sample_row,
        [f"{audit.source}: {note}" for audit in audits for note in audit.notes],
        classes,
        [f"{audit.source}: {why}" for audit in audits for why in audit.bad_rows][:MOST_BAD_ROWS],
        dict(sum((Counter(audit.filtered) for audit in audits), Counter[str]())),
        found,
    )

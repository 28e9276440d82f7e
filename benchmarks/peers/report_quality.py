"""The tables of quality, embeddings and compilation, and the one that shows our precisions side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shapes import shape_named

from peers.contenders import OURS
from peers.markdown import NOTHING, between, megabytes, number, table, times
from peers.report_speed import compared, grouped, sentences, some_value
from peers.stats import rate, spread

Row = dict[str, Any]


def quality_table(rows: Sequence[Row]) -> list[str]:
    body = []
    for row in rows:
        if "perplexity" not in row:
            body.append([row["title"], row.get("error", NOTHING)])
            continue
        body.append([row["title"], f"{row['perplexity']:.4f}", *_divergence(row), megabytes(row["bytes"])])
    return table(["", "perplexity", "KL to float32, nats", "same first choice", "files, MB"], body)


def _divergence(row: Row) -> list[str]:
    return [f"{row['kl']:.5f}", f"{row['top1']:.1%}"] if "kl" in row else [NOTHING] * 2


def quality_section(rows: Sequence[Row]) -> list[str]:
    positions = some_value(rows, "positions") or 0
    return [
        "## Quality: the demo model",
        "",
        f"Real weights and real text, {positions:,} scored tokens that the model has not seen. Half of each window "
        "goes in as a prompt, the scored half token by token. KL is the mean divergence of the next token's "
        "distribution from the one of the first row.",
        "",
        *quality_table(rows),
    ]


def embedding_section(rows: Sequence[Row], texts: int, source: str) -> list[str]:
    def cells(row: Row) -> list[str]:
        speed = rate(texts, row["seconds"])
        return [
            number(speed.median),
            between(speed),
            times(compared(rows, row, "seconds")),
            f"{row['cosine']:.6f} ({row['cosine_low']:.4f})" if "cosine" in row else NOTHING,
            number(row["peak_mb"]),
            megabytes(row["bytes"]),
        ]

    head = ["texts/s", "min–max", "ours is", "cosine to float32, mean (least)", "peak memory, MB", "files, MB"]
    return [
        "## Embeddings: all-MiniLM-L6-v2",
        "",
        f"The real model, {texts} texts ({source}), batches of 32, tokenizer included.",
        "",
        *grouped(rows, head, cells, "seconds"),
        *sentences(rows, "seconds"),
    ]


def compile_section(rows: Sequence[Row]) -> list[str]:
    body = []
    for row in rows:
        if not row.get("seconds"):
            body.append([row["title"], row.get("error", NOTHING)])
            continue
        seconds, peaks = spread(row["seconds"]), spread(row["peak_mb"])
        body.append(
            [
                row["title"],
                number(seconds.median),
                between(seconds) if len(row["seconds"]) > 1 else "once",
                number(peaks.median),
                megabytes(row["bytes"]),
            ]
        )
    title = shape_named(rows[0]["shape"]).title if rows else ""
    return [
        f"## From checkpoint to runnable files: {title}",
        "",
        "Whole processes. Ours compile into an empty cache. The peers' files were made once, by their own tools; those "
        "of llama.cpp by `benchmarks/peers/to_gguf.py`, in numpy, which says nothing about llama.cpp.",
        "",
        *table(["", "seconds", "min–max", "peak memory, MB", "files, MB"], body),
    ]


def precisions_section(results: dict[str, Any]) -> list[str]:
    """Our precisions: speed on the first measured shape beside quality."""
    speed = _ours(results.get("speed", []))
    quality, embedded = _ours(results.get("quality", [])), _ours(results.get("embeddings", []))
    names = list(dict.fromkeys([*speed, *quality, *embedded]))
    if not names:
        return []
    shape = next((row["shape"] for row in speed.values()), None)
    body = [[name, *_precision(name, speed, quality, embedded, results.get("texts", 0))] for name in names]
    on = f"Files and tokens per second: {shape_named(shape).title}. " if shape else ""
    on += "Perplexity, divergence and first choice: the demo model. Texts per second and cosine: all-MiniLM-L6-v2."
    head = [
        "files, MB",
        "prefill, tokens/s",
        "decode, tokens/s",
        "perplexity",
        "KL to float32, nats",
        "same first choice",
        "texts/s",
        "cosine to float32",
    ]
    return ["## The precisions of this library: speed and quality", "", on, "", *table(["weights", *head], body)]


def _ours(rows: Sequence[Row]) -> dict[str, Row]:
    """Our measured rows by precision; of several shapes the one most is said about, Qwen2.5-0.5B, or the first."""
    mine = [row for row in rows if row["engine"] == OURS and "error" not in row]
    shapes = list(dict.fromkeys(row.get("shape") for row in mine))
    wanted = "qwen2.5-0.5b" if "qwen2.5-0.5b" in shapes else next(iter(shapes), None)
    found: dict[str, Row] = {}
    for row in mine:
        if row.get("shape") == wanted:
            found.setdefault(row["precision"], row)
    return found


def _precision(
    name: str, speed: dict[str, Row], quality: dict[str, Row], embedded: dict[str, Row], texts: int
) -> list[str]:
    cells = [NOTHING] * 3
    if name in speed:
        row = speed[name]
        decode = number(rate(row["new"], row["decode_s"]).median) if row["new"] else NOTHING
        cells = [megabytes(row["bytes"]), number(rate(row["prompt"], row["prefill_s"]).median), decode]
    if name in quality:
        cells += [f"{quality[name]['perplexity']:.4f}", *_divergence(quality[name])]
    else:
        cells += [NOTHING] * 3
    if name in embedded:
        row = embedded[name]
        cells += [number(rate(texts, row["seconds"]).median), f"{row['cosine']:.6f}" if "cosine" in row else NOTHING]
    else:
        cells += [NOTHING] * 2
    return cells

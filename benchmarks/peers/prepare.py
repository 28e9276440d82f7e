"""What happens before anything is timed: the run's settings, and the files every engine makes from a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.contenders import Contender, launch
from peers.machine import Bandwidth
from peers.process import Launch, PeerError, one_answer

Row = dict[str, Any]


@dataclass
class Run:
    """Settings of a run, and what it has found out so far.

    Attributes:
        pause: seconds between two engines' turns, in which threads that wait by spinning go to sleep.
        versions, missing: of the engines that are here, and why the others are not.
        bandwidth: GB/s at which memory could be read, measured once a round.
        say: prints progress.
    """

    threads: int
    rounds: int
    pause: float
    work: Path
    pythons: Mapping[str, str]
    versions: dict[str, dict[str, str]]
    missing: dict[str, str]
    say: Callable[[str], None]
    reader: Bandwidth
    bandwidth: list[float] = field(default_factory=list)

    def launch(self, engine: str, **settings: str) -> Launch:
        return launch(engine, self.pythons, self.work, self.threads, **settings)

    def read_memory(self) -> None:
        self.bandwidth.append(self.reader.measure())


@dataclass(frozen=True)
class Prepared:
    """A contender's files: where, how large, how much of them a decode step reads, and what making them took."""

    contender: Contender
    model: str
    bytes: int
    weight_bytes: int
    seconds: float
    peak_mb: float

    def setup(self, threads: int, context: int) -> dict[str, Any]:
        """The arguments of the command ``load``."""
        return {"model": self.model, "precision": self.contender.precision, "threads": threads, "context": context}


def prepare(run: Run, contender: Contender, source: Path, name: str, context: int) -> Prepared:
    """Converts a checkpoint for a contender, unless this version of the engine has done so before.

    Ours are compiled every time: its cache knows better than a version number whether anything has changed.

    Raises:
        PeerError: the conversion failed.
    """
    if contender.engine in run.missing:
        raise PeerError(run.missing[contender.engine])
    destination = run.work / "models" / name / contender.key
    record = destination.with_name(f"{contender.key}.json")
    versions = run.versions.get(contender.engine, {})
    if not contender.ours and record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["versions"] == versions and Path(found["model"]).exists():
            return Prepared(contender, **{key: value for key, value in found.items() if key != "versions"})
    run.say(f"{name}: preparing {contender.title}")
    _remove(destination)
    starter = run.launch(contender.engine, BENCH_CONTEXT=str(context))
    made = one_answer(starter, "--convert", conversion(contender, source, destination))
    destination.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({**made, "versions": versions}, indent=1), encoding="utf-8")
    return Prepared(contender, **made)


def conversion(contender: Contender, source: Path, destination: Path) -> str:
    """The argument of ``--convert``."""
    what = {"source": str(source), "destination": str(destination), "precision": contender.precision}
    return json.dumps(what)


def row(contender: Contender, **values: Any) -> Row:
    """A row of the results: who, and what was found or went wrong."""
    who = {"engine": contender.engine, "precision": contender.precision, "group": contender.group}
    return {**who, "title": contender.title, **values}


def in_order(rows: list[Row], contenders: Sequence[Contender]) -> list[Row]:
    """Rows in the order of the contenders, wherever they failed."""
    places = {contender.key: place for place, contender in enumerate(contenders)}
    return sorted(rows, key=lambda row: places[f"{row['engine']}-{row['precision']}"])


def _remove(path: Path) -> None:
    """What an earlier conversion left, which may be half of it."""
    for left in (path, path.with_suffix(".gguf")):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)

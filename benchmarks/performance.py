"""CPU performance, side by side: this library and every peer that is installed, on the same weights, taking turns.

Measures prefill, decode, time to first token from a cold process, embeddings, compilation, memory, sizes and quality,
and writes docs/performance.md and benchmarks/results/performance.json. Run alone on the machine; with all peers and
shapes it takes hours, most of them for converting the larger shapes.

    python benchmarks/performance.py                            everything
    python benchmarks/performance.py --quick                    the demo model and MiniLM, a few rounds, a few minutes
    python benchmarks/performance.py --only decode prefill --shapes qwen2.5-0.5b
    python benchmarks/performance.py --peer llama=venv/bin/python    a peer in an environment of yours
    python benchmarks/performance.py --from-json                the page again, from the last results

Peers are optional; benchmarks/peers/README.md says how to install them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

# Before numpy: its own threads would compete with those that measure the memory's bandwidth.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from peers.compiling import measure_compile
from peers.contenders import (
    EMBEDDERS,
    ENGINES,
    GENERATORS,
    GROUPS,
    PEER_NAMES,
    Contender,
    installed,
    interpreters,
)
from peers.embedding import measure_embeddings, sentences
from peers.machine import Bandwidth, describe
from peers.prepare import Row, Run
from peers.report import page
from peers.speed import measure_cold, measure_speed
from platformdirs import user_cache_path
from quality import measure_quality, windows
from rich.console import Console
from shapes import ROOT, SHAPES, Shape, shape_named, write_checkpoint

from QEfficient.targets.tuning import available_cores

SECTIONS = ("prefill", "decode", "cold", "embed", "compile", "quality")
#: Shapes of the sections that need only one, unless --shapes leaves it out.
COLD_SHAPE, COMPILE_SHAPE = "qwen2.5-0.5b", "llama-3.2-1b"
QUICK_ROUNDS, QUICK_TEXTS = 3, 64

console = Console(stderr=True)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of this family takes."""
    parser.add_argument(
        "--threads", type=int, default=available_cores(), help="threads per engine (default: cores, %(default)s)"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"a peer's interpreter, one of {', '.join(PEER_NAMES)} (default benchmarks/peers/.venvs/NAME/bin/python)",
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="only these engines")
    parser.add_argument(
        "--classes", nargs="+", choices=GROUPS, default=list(GROUPS), help="only these classes of weights"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two turns (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="checkpoints and converted files, kept for later runs (up to 60 GB)")


def start_run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Run:
    """Looks which engines are here."""
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    work = (options.work or user_cache_path("qefficient") / "benchmarks").resolve()
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "logs", ignore_errors=True)
    try:
        pythons = interpreters(options.peer)
    except ValueError as error:
        parser.error(str(error))
    versions, missing = installed(options.engines, pythons, work)
    for engine, why in missing.items():
        console.print(f"{ENGINES[engine].title}: {why}", highlight=False)

    def say(text: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, markup=False)

    reader = Bandwidth(options.threads)
    return Run(options.threads, options.rounds, options.pause, work, pythons, versions, missing, say, reader)


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--quick", action="store_true", help=f"demo model and MiniLM only, {QUICK_ROUNDS} rounds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these measurements")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "demo"], help="only these (default: all but demo)")
    parser.add_argument(
        "--float-up-to", type=int, metavar="MILLIONS", help="no float weights for shapes with more parameters than this"
    )
    parser.add_argument("--sentences", type=Path, help="texts to embed: .jsonl with question or text, or a text a line")
    parser.add_argument("--texts", type=int, default=512, help="how many of them (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="held-out text for the quality of the demo model")
    parser.add_argument("--windows", type=int, default=16, help="windows of that text (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance.md", help="page to write")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "performance.json", help="the raw results"
    )
    parser.add_argument("--from-json", action="store_true", help="measure nothing, write the page from the results")
    options = parser.parse_args()
    if options.quick:
        options.shapes = options.shapes or ["demo"]
        options.rounds, options.texts = min(options.rounds, QUICK_ROUNDS), min(options.texts, QUICK_TEXTS)
        options.windows = min(options.windows, 4)
    options.shapes = options.shapes or list(SHAPES)
    return parser, options


def main() -> None:
    parser, options = arguments()
    if options.from_json:
        if not options.json.is_file():
            parser.error(f"{options.json} does not exist: run without --from-json first")
        results = json.loads(options.json.read_text(encoding="utf-8"))
    else:
        results = measure(parser, options)
        console.print(f"results: {options.json}", highlight=False)
    options.output.write_text(page(results), encoding="utf-8")
    console.print(f"page: {options.output}", highlight=False)


def measure(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for; the results are stored after each part, for a run takes long."""
    try:
        texts = sentences(options.sentences, options.texts)
        scored = windows(options.text, options.windows)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    run = start_run(parser, options)
    chosen = [c for c in GENERATORS if c.engine in options.engines and c.group in options.classes]
    shapes = [shape_named(name) for name in options.shapes]
    sources = {shape.name: checkpoint(run, shape) for shape in shapes}
    results = facts(options, run)
    only = options.only

    def store(part: str, rows: list[Row]) -> None:
        results[part] = results.get(part, []) + rows
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    def contenders(shape: Shape) -> list[Contender]:
        limit = options.float_up_to
        small = limit is None or shape.parameters <= limit * 1_000_000
        return [contender for contender in chosen if small or contender.group != "float"]

    run.read_memory()
    if "quality" in only:
        store("quality", measure_quality(run, chosen, scored))
    if "embed" in only:
        embedders = [c for c in EMBEDDERS if c.engine in options.engines and c.group in options.classes]
        store("embeddings", measure_embeddings(run, texts, embedders))
    if "prefill" in only or "decode" in only:
        for shape in shapes:
            new = shape.new if "decode" in only else 0
            store("speed", measure_speed(run, shape, sources[shape.name], contenders(shape), new))
    if "cold" in only:
        shape = preferred(shapes, COLD_SHAPE)
        store("cold", measure_cold(run, shape, sources[shape.name], contenders(shape)))
    if "compile" in only:
        shape = preferred(shapes, COMPILE_SHAPE)
        int4 = [contender for contender in chosen if contender.precision in ("int4", "q4_0")]
        store("compile", measure_compile(run, shape, sources[shape.name], int4, 1 if options.quick else 3))
    return results


def checkpoint(run: Run, shape: Shape) -> Path:
    """The checkpoint that every engine converts."""
    run.say(f"{shape.name}: checkpoint of {shape.parameters / 1e6:.0f} million parameters")
    return write_checkpoint(shape, run.work / "checkpoints" / shape.name)


def preferred(shapes: list[Shape], name: str) -> Shape:
    """The shape of this name, or the last one of those asked for."""
    return next((shape for shape in shapes if shape.name == name), shapes[-1])


def facts(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """What the page says about a run besides its figures."""
    source = options.sentences.name if options.sentences else "word problems bundled with this library"
    return {
        "command": public_command(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe(),
        "threads": run.threads,
        "rounds": run.rounds,
        "pause": run.pause,
        "sections": options.only,
        "versions": run.versions,
        "missing": run.missing,
        "texts": options.texts,
        "texts_from": source,
        "bandwidth": run.bandwidth,
    }


def public_command(given: list[str]) -> str:
    """The command that made a page, as somebody else would type it: without the directories of this machine."""
    shown, skip = [], False
    for word in given:
        if skip or word.startswith(("--work=", "--peer=")):
            skip = False
        elif word in ("--work", "--peer"):
            skip = True
        else:
            shown.append(Path(word).name if word.startswith("/") else word)
    return shlex.join(["python", "benchmarks/performance.py", *shown])


if __name__ == "__main__":
    main()

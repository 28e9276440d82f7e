"""The stand-in of ``qaic-compile`` and ``qaic-exec``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stand_in import container, files, flags
from stand_in.errors import Refused, need
from stand_in.graph import Graph


def compile(executable: str, argv: Sequence[str], directory: Path, version: tuple[int, int]) -> Path:
    """Checks everything in ``directory`` the command names and writes a marked binary; Refused otherwise."""
    given = flags.read(argv)

    def value(flag: str) -> str | None:
        return given[flag][0] if flag in given else None

    for flag in ("-aic-hw", "-aic-hw-version", "-aic-binary-dir"):
        need(flag in given, f"{flag} is required")
    need(("-m" in given) != ("-model" in given), "exactly one of -m and -model is required")
    legacy = executable == "qaic-exec"
    need(not legacy or "-compile-only" in given, "-compile-only is required")
    wanted = ("2.0",) if legacy else ("ai100", "ai200")
    need(value("-aic-hw-version") in wanted, f"-aic-hw-version={value('-aic-hw-version')} is not known")
    cores = int(value("-aic-num-cores") or 1)
    need(int(value("-mos") or 1) <= cores and int(value("-ols") or 1) <= cores, "-mos or -ols exceeds -aic-num-cores")
    graph = Graph(directory / str(value("-m") or value("-model")))
    if value("-aic-hw-version") != "ai200":
        graph.check_types()
    symbols = dict(pair.split(",") for pair in given.get("-onnx-define-symbol", ()))
    config = value("-network-specialization-config")
    need(not (symbols and config), "-onnx-define-symbol and -network-specialization-config exclude each other")
    if config:
        entries = files.specializations(directory / config, graph, knows_names=not legacy and version > (1, 21))
    else:
        need(set(symbols) == graph.symbols, f"symbols without a value: {sorted(graph.symbols ^ set(symbols))}")
        entries = [{name: int(size) for name, size in symbols.items()}]
    need(bool(graph.states) == ("-retained-state" in given), "-retained-state does not fit the network's states")
    listed = value("-custom-IO-list-file")
    precision = files.custom_io(directory / listed, graph) if listed else {}
    devices = 1
    if value("-mdp-load-partition-config"):
        devices = files.partition(directory / str(value("-mdp-load-partition-config")), graph, cores)
    if value("-node-precision-info"):
        files.node_precision(directory / str(value("-node-precision-info")), graph)
    place = directory / str(value("-aic-binary-dir"))
    need(not place.exists(), f"{place} already exists")
    made = container.describe(graph, entries, precision, devices, place)
    place.mkdir(parents=True)
    binary = place / "programqpc.bin"
    container.write(made, binary)
    return binary


def main(executable: str, version: tuple[int, int]) -> int:
    try:
        compile(executable, sys.argv[1:], Path.cwd(), version)
    except Refused as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.code
    print("stand-in: nothing was compiled")
    return 0

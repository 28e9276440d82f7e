"""The page: results of a run, which are plain JSON, as Markdown."""

from __future__ import annotations

from typing import Any

from peers.contenders import ENGINES
from peers.markdown import between, number, table
from peers.report_quality import compile_section, embedding_section, precisions_section, quality_section
from peers.report_speed import cold_section, decode_section, prefill_section
from peers.stats import spread

INTRODUCTION = """\
Every engine is a process of its own that loads the same checkpoint, converted to its own format, and gets the same
token ids. All engines of a class of weight precision are loaded at once, as far as memory allows, and take turns,
A B C A B C, one at a time with the others idle and a pause of {pause} s in between, so that a slow minute of the
machine hits all of them. The first round is not counted; figures are medians of {rounds} rounds, *min–max* is their
range. *ours is* says how many times as fast this library was, the median over rounds of the ratio within a round:
above 1 it was faster, below 1 slower. Peak memory is the largest resident set of the process, mapped files included.
Weights are random in the shapes of the models named, which matters for none of these figures; the demo model and
all-MiniLM-L6-v2 are real.

Each engine runs with its makers' defaults, except for the number of threads: OpenVINO computes in bfloat16 where the
processor can, whatever the files hold; llama.cpp keeps keys and values in 16 bits, this library and ONNX Runtime in 32.
In 4 bits the embedding and the head have 4 bits too, in all engines, except where it says *by its quantizer*: what
llama.cpp's own makes of the checkpoint, which keeps these two in 6 or 8 bits, as our *mixed* does. How the peers are
set up is in [benchmarks/peers](../benchmarks/peers/README.md).
"""


def page(results: dict[str, Any]) -> str:
    """The whole page; sections that were not measured are left out."""
    lines = ["# CPU performance, side by side", "", *_origin(results), *_versions(results)]
    lines += INTRODUCTION.format(pause=results["pause"], rounds=results["rounds"]).splitlines()
    lines += ["", *precisions_section(results)]
    only = results["sections"]
    speed = results.get("speed", [])
    bandwidth = spread(results["bandwidth"]).median
    if speed and "decode" in only:
        lines += decode_section(speed, bandwidth)
        lines += [_about_bandwidth(), ""]
    if speed and "prefill" in only:
        lines += prefill_section(speed)
    if results.get("cold"):
        lines += cold_section(results["cold"])
        lines += ["Everything from starting the interpreter, imports included; files in the page cache.", ""]
    if results.get("embeddings"):
        lines += embedding_section(results["embeddings"], results["texts"], results["texts_from"])
    if results.get("quality"):
        lines += quality_section(results["quality"])
    if results.get("compile"):
        lines += compile_section(results["compile"])
    return "\n".join(lines).rstrip() + "\n"


def _about_bandwidth() -> str:
    return (
        "*MB per token*: weights that a decode step reads. *of bandwidth*: what the decoded tokens of a second read of "
        "these, as a share of the bytes this "
        "machine could read in a second at the time. What keys and values add is left out: a few percent of the 4-bit "
        "weights at this length. Weights that fit a cache can give more than 100%."
    )


def _origin(results: dict[str, Any]) -> list[str]:
    machine, memory = results["machine"], spread(results["bandwidth"])
    flags = f" ({', '.join(machine['flags'])})" if machine["flags"] else ""
    return [
        f"`{results['command']}` wrote this page on {results['date']}.",
        "",
        f"Machine: {machine['cpu']}{flags}, {machine['cores']} cores, {results['threads']} threads used, "
        f"{machine['memory_gb']} GB of memory, {machine['system']}, Python {machine['python']}. "
        f"Memory can be read at {number(memory.median)} GB/s ({between(memory)}, {len(results['bandwidth'])} "
        "measurements between rounds): the ceiling for decoding, which reads every weight for every token.",
        "",
    ]


def _versions(results: dict[str, Any]) -> list[str]:
    rows = []
    for engine, info in ENGINES.items():
        if engine in results["versions"]:
            found = ", ".join(f"{name} {version}" for name, version in results["versions"][engine].items())
            rows.append([info.title, found])
        elif engine in results["missing"]:
            rows.append([info.title, results["missing"][engine]])
    return table(["engine", "versions"], rows, numbers=False)

"""How many bytes of weights a run of an ONNX graph reads, from the graph's own description of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Operators that read a few rows of a table. A table that nothing else reads costs next to nothing per token.
LOOKUPS = {"Gather", "GatherBlockQuantized"}


def read_bytes(path: Path) -> int:
    """Bytes of a graph's external weights, each stored range once, without tables that are only looked up."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    ranges: dict[tuple[str, int], int] = {}
    for tensor in graph.initializer:
        if tensor.external_data and not readers.get(tensor.name, set()) <= LOOKUPS:
            file, offset, length = _place(tensor)
            ranges[file, offset] = length
    return sum(ranges.values())


def _place(tensor: Any) -> tuple[str, int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries.get("offset", 0)), int(entries["length"])

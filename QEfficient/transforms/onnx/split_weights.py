"""SplitWeights: weights rewritten into files of bounded size."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from QEfficient.errors import OptionError
from QEfficient.onnx_io import file_tensors, write_tensors
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
#: More than a safetensors file spends on itself, and on the entry of a tensor besides its name.
_HEADER_BYTES, _ENTRY_BYTES = 64, 160


@dataclass(frozen=True)
class SplitWeights(OnnxTransform):
    """Puts every weight that lives in a file into shards of at most ``max_shard_size``, headers included.

    Toolchains and file systems with a limit per file need it; the graph and the values stay the same. A tensor larger
    than the limit gets a file of its own. Weights the graph does not use are left behind.

    Parameters:
        max_shard_size: bytes, or a size such as "500MB" or "2GiB".
    """

    name: ClassVar[str] = "SplitWeights"
    max_shard_size: int | str = "2GB"

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_shard_size", parse_size(self.max_shard_size))

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        shards: list[list[str]] = []
        room = 0
        tensors = file_tensors(model)
        for name, tensor in tensors.items():
            needed = tensor.nbytes + len(json.dumps(name)) + _ENTRY_BYTES
            if not shards or needed > room:
                shards.append([])
                room = int(self.max_shard_size) - _HEADER_BYTES
            shards[-1].append(name)
            room -= needed
        for number, names in enumerate(shards, start=1):
            path = workspace / f"weights-{number:05d}-of-{len(shards):05d}.safetensors"
            written = write_tensors({name: tensors[name] for name in names}, path)
            for name, tensor in written.items():
                model.graph.initializers[name].const_value = tensor
        return TransformResult(bool(shards), {"shards": len(shards)})


def parse_size(size: int | str) -> int:
    """Bytes of ``size``: an int, or a number with B, KB, MB, GB, KiB, MiB or GiB."""
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
        if match is None or match[2].upper() not in _UNITS:
            raise OptionError(f"a size is a number of bytes or a text like '500MB', got {size!r}.")
        value = int(float(match[1]) * _UNITS[match[2].upper()])
    if value < 1:
        raise OptionError(f"a size must be at least one byte, got {size!r}.")
    return value

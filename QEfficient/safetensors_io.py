"""safetensors files as byte ranges: where tensors are, found without reading them, and a writer that streams."""

from __future__ import annotations

import json
import math
import operator
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from QEfficient.errors import ModelLoadError

#: safetensors dtype name -> bytes per element.
ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the limit of the safetensors format


@dataclass(frozen=True)
class TensorRef:
    """A tensor as a byte range of a file; ``dtype`` is safetensors' name for it (``BF16`` …)."""

    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


WeightMap = dict[str, TensorRef]


def read_header(path: Path) -> WeightMap:
    """Tensor name -> reference for every tensor of a safetensors file; reads only the header.

    Raises:
        ModelLoadError: the file is not safetensors, is cut off, or describes tensors that do not fit it.
    """
    bad = f"{path} is not a valid safetensors file"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise ModelLoadError(f"{bad}: it is empty or cut off; download or save the checkpoint again.")
            (length,) = struct.unpack("<Q", head)
            if length > min(_MAX_HEADER, size - 8):
                raise ModelLoadError(f"{bad}: it is cut off or not safetensors; download or save it again.")
            header = json.loads(file.read(length))
    except (ValueError, UnicodeDecodeError):
        raise ModelLoadError(f"{bad}: its header is not JSON; download or save the checkpoint again.") from None
    if not isinstance(header, dict):
        raise ModelLoadError(f"{bad}: its header is not a JSON object; download or save the checkpoint again.")
    refs: WeightMap = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = map(operator.index, entry["data_offsets"])
            dtype, shape = entry["dtype"], tuple(map(operator.index, entry["shape"]))
        except (KeyError, TypeError, ValueError):
            raise ModelLoadError(f"{bad}: the entry of tensor {name!r} is malformed.") from None
        if dtype in ITEM_SIZES and math.prod(shape) * ITEM_SIZES[dtype] != end - begin:
            raise ModelLoadError(f"{bad}: tensor {name!r} does not have the size its shape and dtype need.")
        if not 0 <= begin <= end <= size - 8 - length:
            raise ModelLoadError(f"{bad}: it is cut off, tensor {name!r} ends beyond the file.")
        refs[name] = TensorRef(path, 8 + length + begin, end - begin, dtype, shape)
    return refs


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, one or sharded.

    Raises:
        ModelLoadError: none, an incomplete set of shards, or pickled weights only.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelLoadError(f"{index} is not a valid index of weight shards; download it again.") from None
        for name in names:
            if Path(name).name != name:
                raise ModelLoadError(f"{index} names the shard {name!r} outside the checkpoint directory: refused.")
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ModelLoadError(f"{directory} lacks {len(missing)} of {len(names)} weight shards, e.g. {missing[0]}.")
        return [directory / name for name in names]
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern)]
    if pickled:
        raise ModelLoadError(
            f"{directory} has only pickled weights ({pickled[0]}), which can run code when loaded: convert them with "
            "model.save_pretrained(..., safe_serialization=True) where you trust them."
        )
    raise ModelLoadError(f"{directory} has no weights: expected {SINGLE_FILE} or {INDEX_FILE}.")


def checkpoint_weights(directory: Path) -> WeightMap:
    """Every tensor of a checkpoint directory, by its name in the checkpoint."""
    refs: WeightMap = {}
    for path in checkpoint_files(directory):
        refs.update(read_header(path))
    return refs


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor: the header first, so that one tensor is in memory at a time."""

    def __init__(self, path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        """``tensors``: (name, safetensors dtype, shape) in the order they will be written."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        self._expected: list[tuple[str, int]] = []
        for name, dtype, shape in tensors:
            length = math.prod(shape) * ITEM_SIZES[dtype]
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [position, position + length],
            }
            self._expected.append((name, length))
            position += length
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._next: Iterator[tuple[str, int]] = iter(self._expected)
        self._file = path.open("xb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, data: memoryview | bytes) -> None:
        """Appends one tensor's bytes; they must come in the announced order and size."""
        expected, length = next(self._next)
        if name != expected or len(data) != length:
            raise ValueError(f"expected {length} bytes of {expected}, got {len(data)} of {name}")
        self._file.write(data)

    def close(self) -> None:
        self._file.close()

"""Puts the weights of a package's programs into it, as links where the filesystem can."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from QEfficient.onnx_io import FileTensor, file_tensors, write_tensors
from QEfficient.store.files import place_file
from QEfficient.targets.base import CompileRequest
from QEfficient.targets.prepacked import PrepackedTensor

WEIGHTS_DIR = "weights"
#: A file of which less than this is read is written anew with what is read.
_MOSTLY = 0.99


def place_weights(models: Sequence[ir.Model], request: CompileRequest) -> None:
    """Places every weight file in ``weights/`` of the package and points the tensors of all programs there.

    Programs that read the same bytes share them. Of files made for this package only what some program reads is kept.
    """
    tensors = [tensor for model in models for tensor in file_tensors(model).values()]
    by_file: dict[Path, list[FileTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    place = request.directory / WEIGHTS_DIR
    if by_file:
        place.mkdir()
    names: set[str] = set()
    for number, (file, members) in enumerate(by_file.items()):
        request.progress("placing weights", number, len(by_file))
        name = _unused(Path(members[0].location).name, names)
        status = file.stat()
        own = (status.st_dev, status.st_ino) not in request.originals
        whole = any(isinstance(tensor, PrepackedTensor) for tensor in members)  # the file holds more than they read
        if own and not whole and _read_share(file, members) < _MOSTLY:
            _rewrite(members, place / name)
        else:
            place_file(file, place / name)
        for tensor in members:
            tensor.location = f"{WEIGHTS_DIR}/{name}"
    request.progress("placing weights", len(by_file), len(by_file))


def _unused(name: str, names: set[str]) -> str:
    path, number, found = Path(name), 1, name
    while found in names:
        number += 1
        found = f"{path.stem}-{number}{path.suffix}"
    names.add(found)
    return found


def _read_share(file: Path, members: Sequence[FileTensor]) -> float:
    ranges = {(tensor.offset, tensor.length) for tensor in members}
    return sum(length for _, length in ranges) / max(1, file.stat().st_size)


def _rewrite(members: Sequence[FileTensor], path: Path) -> None:
    """Copies what is read of one file into ``path``, one tensor at a time, and moves the offsets there."""
    first: dict[tuple[int, int], FileTensor] = {}
    for tensor in members:
        first.setdefault((tensor.offset, tensor.length), tensor)
    written = write_tensors({str(tensor.name): tensor for tensor in first.values()}, path)
    places = {key: written[str(tensor.name)].offset for key, tensor in first.items()}
    for tensor in members:
        tensor.file, tensor.offset = path, places[tensor.offset, tensor.length]

"""Keeps weights also in the layout ONNX Runtime's kernels read, so that opening a program maps it instead of making it.

ONNX Runtime saves such layouts on request (``session.save_external_prepacked_constant_initializers``): an external
initializer gets entries ``prepacked_N`` with the value ``KEY|offset;length;check|...``, byte ranges of the file that
the initializer is in. The key holds a hash of the bytes. A kernel that arranges a weight in another way, on another
processor or in another version, has another key, does not find it, and uses its own arrangement: the answer is the same
everywhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir
import onnxruntime as ort

from QEfficient.onnx_io import FileTensor, file_tensors, save_model, weight_files
from QEfficient.store.files import place_file
from QEfficient.targets.host_runtime import set_up

_ENTRY = "prepacked_"
#: ONNX Runtime maps each layout on its own, and its kernels count on the alignment it writes them with.
_ALIGNMENT = 4096
#: Bytes that are copied at a time.
_BLOCK = 1 << 24


class PrepackedTensor(FileTensor):
    """A weight whose file also holds what kernels made of it; ``entries`` says where, as ONNX Runtime spells it."""

    entries: Mapping[str, str]

    @classmethod
    def at(cls, tensor: FileTensor, file: Path, offset: int, entries: Mapping[str, str]) -> PrepackedTensor:
        shape = ir.Shape(tensor.shape)
        found = cls(file, file.name, offset, tensor.length, tensor.dtype, shape, str(tensor.name))
        found.entries = entries
        return found


def prepack(program: ir.Model, others: Sequence[ir.Model], scratch: Path, runtime: Mapping[str, Any]) -> None:
    """Replaces the weights of ``program`` that kernels rearrange by a `PrepackedTensor` in a new file in ``scratch``.

    Tensors of ``others``, or of the program itself, that read the same bytes read them in the new file.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        place = Path(name)
        path = place / "program.onnx"
        for location, file in weight_files(program).items():
            (place / location).parent.mkdir(parents=True, exist_ok=True)
            place_file(file, place / location)
        save_model(program, path)
        arranged, blobs = _arranged_by_kernels(path, runtime)
        if not arranged:
            return
        _replace(program, others, arranged, blobs, scratch / "prepacked.bin")


def record_entries(program: ir.Model, path: Path) -> None:
    """Writes the entries of the program's prepacked tensors into its file, which ``save_model`` wrote."""
    tensors = {name: tensor for name, tensor in file_tensors(program).items() if isinstance(tensor, PrepackedTensor)}
    if not tensors:
        return
    proto = onnx.load(path, load_external_data=False)
    for initializer in proto.graph.initializer:
        if initializer.name in tensors:
            for key, value in tensors[initializer.name].entries.items():
                initializer.external_data.add(key=key, value=value)
    onnx.save(proto, path)


def _arranged_by_kernels(path: Path, runtime: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], Path]:
    """Initializer name -> its entries, and the file they speak of, beside the program."""
    saved = path.with_name("arranged.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(saved)
    entries = {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": f"{saved.stem}.bin",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    set_up(options, runtime)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: dict[str, dict[str, str]] = {}
    for initializer in onnx.load(saved, load_external_data=False).graph.initializer:
        own = {e.key: e.value for e in initializer.external_data if e.key.startswith(_ENTRY)}
        if own:
            found[initializer.name] = own
    return found, saved.with_suffix(".bin")


def _replace(
    program: ir.Model,
    others: Sequence[ir.Model],
    arranged: Mapping[str, Mapping[str, str]],
    blobs: Path,
    path: Path,
) -> None:
    moved: dict[tuple[Path, int, int], int] = {}
    values = program.graph.initializers
    with open(path, "xb") as out, open(blobs, "rb") as source:
        for name, entries in arranged.items():
            tensor = values[name].const_value if name in values else None
            if not isinstance(tensor, FileTensor):
                continue  # made by the runtime's own rewriting
            with open(tensor.file, "rb") as weights:
                offset = _append(weights, tensor.offset, tensor.length, out)
            moved[tensor.file, tensor.offset, tensor.length] = offset
            new = {key: _moved(value, source, out) for key, value in entries.items()}
            values[name].const_value = PrepackedTensor.at(tensor, path, offset, new)
    for model in (program, *others):
        for tensor in file_tensors(model).values():
            place = moved.get((tensor.file, tensor.offset, tensor.length))
            if place is not None and not isinstance(tensor, PrepackedTensor):
                tensor.file, tensor.location, tensor.offset = path, path.name, place


def _moved(entry: str, source: BinaryIO, out: BinaryIO) -> str:
    """Copies the byte ranges of an entry; returns the entry with their new offsets."""
    key, *pieces = entry.split("|")
    written = [key]
    for piece in pieces:
        offset, length, check = piece.split(";")
        written.append(f"{_append(source, int(offset), int(length), out)};{length};{check}")
    return "|".join(written)


def _append(source: BinaryIO, offset: int, length: int, out: BinaryIO) -> int:
    """Copies a byte range to the next aligned offset of ``out``; returns that offset."""
    place = -(-out.tell() // _ALIGNMENT) * _ALIGNMENT
    out.seek(place)
    source.seek(offset)
    while length > 0:
        block = source.read(min(length, _BLOCK))
        if not block:
            raise EOFError(f"{source.name} ended {length} bytes too early")
        out.write(block)
        length -= len(block)
    return place

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
from QEfficient.store.files import copy_bytes, place_file
from QEfficient.targets.host_runtime import set_up

_ENTRY = "prepacked_"
#: Operators whose kernels arrange weights.
_PRODUCTS = ("MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMul", "Gemm")
#: Kernels count on a layout beginning as a block of memory does. ONNX Runtime itself aligns the large ones only, and
#: computes nonsense with the others.
_ALIGNMENT = 4096
#: Bytes below which a weight stays in the model file.
_LEAST = 1024


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
    """Moves the weights of ``program`` that kernels rearrange into a new file in ``scratch``, beside their layouts.

    Tensors of ``others``, or of the program itself, that read the same bytes read them in the new file.
    """
    kernels = _kernels_with_weights(program)
    if not file_tensors(kernels):
        return
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        place = Path(name)
        for location, file in weight_files(kernels).items():
            (place / location).parent.mkdir(parents=True, exist_ok=True)
            place_file(file, place / location)
        save_model(kernels, place / "kernels.onnx")
        saved = _arranged(place / "kernels.onnx", runtime)
        _move(program, others, saved, scratch / "prepacked.bin")


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


def _kernels_with_weights(program: ir.Model) -> ir.Model:
    """A graph of nothing but the products with matrices in files, each with inputs of its own."""
    graph = program.graph
    inputs: list[ir.Value] = []
    nodes: list[ir.Node] = []
    weights: dict[str, ir.Value] = {}
    for node in graph:
        if node.op_type not in _PRODUCTS or not any(_is_file(value) for value in node.inputs):
            continue
        taken: list[ir.Value | None] = []
        for value in node.inputs:
            if value is None or value.is_initializer():
                taken.append(None if value is None else weights.setdefault(str(value.name), _copy(value)))
                continue
            dtype = value.dtype or ir.DataType.FLOAT
            inputs.append(ir.Value(name=f"input_{len(inputs)}", type=ir.TensorType(dtype)))
            taken.append(inputs[-1])
        nodes.append(ir.Node(node.domain, node.op_type, taken, list(node.attributes.values()), num_outputs=1))
        result = nodes[-1].outputs[0]
        result.name, result.type = f"output_{len(nodes)}", ir.TensorType(ir.DataType.FLOAT)
    outputs = [node.outputs[0] for node in nodes]
    kernels = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=list(weights.values()), opset_imports=dict(graph.opset_imports)
    )
    return ir.Model(kernels, ir_version=program.ir_version)


def _is_file(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and isinstance(value.const_value, FileTensor)


def _copy(value: ir.Value) -> ir.Value:
    tensor = value.const_value
    if isinstance(tensor, FileTensor):  # the program's own keeps its place
        shape = ir.Shape(tensor.shape)
        tensor = FileTensor(
            tensor.file, tensor.location, tensor.offset, tensor.length, tensor.dtype, shape, str(tensor.name)
        )
    return ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=tensor)


def _arranged(path: Path, runtime: Mapping[str, Any]) -> Path:
    """The model as ONNX Runtime saves it, with its weights and their arrangements in a file beside it."""
    saved = path.with_name("arranged.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    set_up(options, runtime)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(saved)
    entries = {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": f"{saved.stem}.bin",
        "session.optimized_model_external_initializers_min_size_in_bytes": str(_LEAST),
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return saved


def _move(program: ir.Model, others: Sequence[ir.Model], saved: Path, path: Path) -> None:
    """Copies what the saved model arranged, and the weights it comes from, to ``path``; tensors then read it there."""
    moved: dict[tuple[Path, int, int], int] = {}
    values = program.graph.initializers
    with open(path, "xb") as out, open(saved.with_suffix(".bin"), "rb") as source:
        for initializer in onnx.load(saved, load_external_data=False).graph.initializer:
            where = {entry.key: entry.value for entry in initializer.external_data}
            entries = {key: value for key, value in where.items() if key.startswith(_ENTRY)}
            if not entries:
                continue
            tensor = values[initializer.name].const_value
            assert isinstance(tensor, FileTensor)
            offset = _append(source, int(where.get("offset", 0)), tensor.length, out)
            moved[tensor.file, tensor.offset, tensor.length] = offset
            new = {key: _moved(value, source, out) for key, value in entries.items()}
            values[initializer.name].const_value = PrepackedTensor.at(tensor, path, offset, new)
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
    copy_bytes(source, out, length)
    return place

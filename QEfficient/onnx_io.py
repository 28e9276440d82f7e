"""Reading and writing ONNX models whose weights stay in the files they came from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from google.protobuf.message import DecodeError

from QEfficient.errors import PackageError
from QEfficient.safetensors_io import SafetensorsWriter, read_header


class FileTensor(ir.LazyTensor):
    """A tensor that is a byte range of a file; read through a memory map, one tensor at a time, never cached.

    `onnx_ir.ExternalTensor` refuses to read files with several hard links, and hard links are how an artefact shares
    a checkpoint's bytes; this class reads them, and becomes an ordinary external tensor when the model is saved.
    """

    def __init__(
        self,
        file: Path,
        location: str,
        offset: int,
        length: int,
        dtype: ir.DataType,
        shape: ir.Shape,
        name: str,
    ) -> None:
        self.file, self.location, self.offset, self.length = Path(file), location, offset, length
        super().__init__(self._read, dtype, shape, name=name)

    def _read(self) -> ir.TensorProtocol:
        shape = tuple(int(d) for d in self.shape)  # type: ignore[arg-type]
        if self.length == 0:
            array = np.zeros(shape, dtype=self.dtype.numpy())
        else:
            raw = np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.length,))
            if self.dtype.bitwidth < 8:  # several elements per byte, as ONNX packs them
                return ir.PackedTensor(np.asarray(raw), self.dtype, shape=shape, name=self.name)
            array = np.asarray(raw).view(self.dtype.numpy()).reshape(shape)
        return ir.Tensor(array, dtype=self.dtype, name=self.name)

    def external(self, base_dir: Path) -> ir.ExternalTensor:
        """The same bytes as ONNX describes them: location relative to the model, offset, length."""
        return ir.ExternalTensor(
            self.location,
            self.offset,
            self.length,
            self.dtype,
            shape=ir.Shape(self.shape),
            name=str(self.name),
            base_dir=base_dir,
        )


def load_model(path: Path) -> ir.Model:
    """Loads a model; its external tensors stay in their files.

    Raises:
        PackageError: not an ONNX file, or an external tensor lies outside the model's directory or its file.
    """
    path = Path(path)
    if not path.is_file():
        raise PackageError(f"{path} does not exist: pass the model.onnx that export() returned.")
    try:
        with warnings.catch_warnings():
            # ONNX Runtime's own entries beside location, offset and length (targets/prepacked.py).
            warnings.filterwarnings("ignore", "Ignoring unknown external data key", UserWarning)
            model = ir.load(path)
    # The ONNX parser raises its own protobuf errors besides these; all mean the same to a reader.
    except (ValueError, TypeError, OSError, RuntimeError, KeyError, DecodeError) as error:
        raise PackageError(f"{path} is not a readable ONNX model: {type(error).__name__}.") from None
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = _from_external(tensor, path, str(value.name))
    return model


def save_model(model: ir.Model, path: Path) -> None:
    """Writes the graph; file tensors become external data entries. The model object is unchanged afterwards."""
    swapped: list[tuple[ir.Value, FileTensor]] = []
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, FileTensor):
            swapped.append((value, value.const_value))
            value.const_value = value.const_value.external(path.parent)
    try:
        ir.save(model, path)
    finally:
        for value, tensor in swapped:
            value.const_value = tensor


def file_tensors(model: ir.Model) -> dict[str, FileTensor]:
    """Initializer name -> tensor, for every weight that lives in a file."""
    return {
        str(value.name): value.const_value
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, FileTensor)
    }


def weight_files(model: ir.Model) -> dict[str, Path]:
    """Location beside the model -> file, for every file the model's weights lie in.

    Files of one name from several directories get a number, and their tensors the new location.
    """
    locations: dict[Path, str] = {}
    for tensor in file_tensors(model).values():
        if tensor.file not in locations:
            wanted, n = Path(tensor.location), 1
            name = tensor.location
            while name in locations.values():
                n += 1
                name = wanted.with_name(f"{wanted.stem}-{n}{wanted.suffix}").as_posix()
            locations[tensor.file] = name
        tensor.location = locations[tensor.file]
    return {location: file for file, location in locations.items()}


def _from_external(tensor: ir.ExternalTensor, path: Path, name: str) -> FileTensor:
    location = str(tensor.location)
    parts = Path(location).parts
    if Path(location).is_absolute() or ".." in parts:
        raise PackageError(f"{path} keeps the weight {name!r} outside its own directory ({location}): refused.")
    file = path.parent / location
    offset, length = tensor.offset or 0, tensor.length
    if length is None:
        length = math.ceil(tensor.dtype.bitwidth * tensor.size / 8)
    if not file.is_file() or file.stat().st_size < offset + length:
        raise PackageError(f"{file} is missing or too short for the weight {name!r}: the model is incomplete.")
    return FileTensor(file, location, offset, length, tensor.dtype, ir.Shape(tensor.shape), name)


#: onnx_ir dtype -> the name safetensors uses.
_SAFETENSORS = {
    ir.DataType.DOUBLE: "F64",
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT64: "I64",
    ir.DataType.INT32: "I32",
    ir.DataType.INT16: "I16",
    ir.DataType.INT8: "I8",
    ir.DataType.UINT8: "U8",
    ir.DataType.BOOL: "BOOL",
}


def write_tensors(tensors: Mapping[str, ir.TensorProtocol], path: Path) -> dict[str, FileTensor]:
    """Writes tensors into one safetensors file, one in memory at a time, and returns references to them.

    Raises:
        ValueError: a dtype safetensors has no name for.
    """
    described = {name: (tensor.dtype, tuple(tensor.shape.numpy())) for name, tensor in tensors.items()}
    return stream_tensors(described, (tensor.tobytes() for tensor in tensors.values()), path)


def stream_tensors(
    described: Mapping[str, tuple[ir.DataType, tuple[int, ...]]], contents: Iterable[bytes | memoryview], path: Path
) -> dict[str, FileTensor]:
    """Writes tensors whose contents are made one after the other, in the order they were described.

    Elements smaller than a byte are stored as ONNX packs them, as bytes in the eyes of safetensors.

    Raises:
        ValueError: a dtype safetensors has no name for, or contents of another size than described.
    """
    if not described:
        return {}
    announced: list[tuple[str, str, tuple[int, ...]]] = []
    for name, (dtype, shape) in described.items():
        if dtype.bitwidth < 8:
            announced.append((name, "U8", (math.ceil(math.prod(shape) * dtype.bitwidth / 8),)))
        elif dtype in _SAFETENSORS:
            announced.append((name, _SAFETENSORS[dtype], shape))
        else:
            raise ValueError(f"{name} has dtype {dtype}, which safetensors cannot hold")
    writer = SafetensorsWriter(path, announced)
    try:
        for name, content in zip(described, contents, strict=True):
            writer.write(name, content)
    finally:
        writer.close()
    refs = read_header(path)
    return {
        name: FileTensor(path, path.name, refs[name].offset, refs[name].length, dtype, ir.Shape(shape), name)
        for name, (dtype, shape) in described.items()
    }


def store_tensors(arrays: Mapping[str, np.ndarray], path: Path) -> dict[str, FileTensor]:
    """`write_tensors` for numpy arrays; an empty mapping writes nothing."""
    return write_tensors({name: ir.tensor(array, name=name) for name, array in arrays.items()}, path)

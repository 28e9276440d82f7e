"""Reading and writing ONNX models whose weights stay in the files they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
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

    def _read(self) -> ir.Tensor:
        shape = tuple(int(d) for d in self.shape)  # type: ignore[arg-type]
        if self.length == 0:
            array = np.zeros(shape, dtype=self.dtype.numpy())
        else:
            raw = np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.length,))
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
    if not tensors:
        return {}
    announced = []
    for name, tensor in tensors.items():
        if tensor.dtype not in _SAFETENSORS:
            raise ValueError(f"{name} has dtype {tensor.dtype}, which safetensors cannot hold")
        announced.append((name, _SAFETENSORS[tensor.dtype], tuple(tensor.shape.numpy())))
    writer = SafetensorsWriter(path, announced)
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor.tobytes())
    finally:
        writer.close()
    return {
        name: FileTensor(path, path.name, ref.offset, ref.length, tensors[name].dtype, ir.Shape(ref.shape), name)
        for name, ref in read_header(path).items()
    }


def store_tensors(arrays: Mapping[str, np.ndarray], path: Path) -> dict[str, FileTensor]:
    """`write_tensors` for numpy arrays; an empty mapping writes nothing."""
    return write_tensors({name: ir.tensor(array, name=name) for name, array in arrays.items()}, path)

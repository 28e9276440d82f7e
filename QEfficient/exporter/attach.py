"""Points a traced graph's initializers at the checkpoint's bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from QEfficient.errors import ExportError
from QEfficient.onnx_io import FileTensor
from QEfficient.safetensors_io import TensorRef, WeightMap

_DTYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL,
}
_FLOATS = {ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@dataclass
class Attached:
    """What `attach` did: files the graph now points into, by the location written in the graph."""

    files: dict[str, Path] = field(default_factory=dict)
    referenced: list[str] = field(default_factory=list)
    inline: list[str] = field(default_factory=list)


def attach(model: ir.Model, weights: WeightMap, parameters: set[str], aliases: dict[str, str]) -> Attached:
    """Replaces initializers by external tensors; a stored dtype other than the graph's gets a Cast.

    Must run before any optimisation: until then all weightless parameters look like equal zeros.

    Args:
        weights: tensor name -> bytes.
        parameters: names that must be found in ``weights``.
        aliases: name in the graph -> name in ``weights``, for tied tensors.

    Raises:
        ExportError: a parameter is missing from the weights or has another shape there.
    """
    done = Attached()
    graph = model.graph
    locations = _locations(weights)
    missing = []
    for name, value in list(graph.initializers.items()):
        ref = weights.get(name) or weights.get(aliases.get(name, ""))
        if ref is None:
            if name in parameters:
                missing.append(name)
            done.inline.append(name)
            continue
        wanted = value.const_value.shape if value.const_value is not None else value.shape
        if wanted is None or tuple(wanted.numpy()) != ref.shape:
            raise ExportError(f"{name} has shape {ref.shape} in the checkpoint but {wanted} in the model.")
        location = locations[ref.file]
        done.files[location] = ref.file
        done.referenced.append(name)
        _point(graph, value, name, ref, location)
    if missing:
        raise ExportError(
            f"the checkpoint lacks {len(missing)} of the model's weights, e.g. {missing[0]}: it was made for another "
            "model class or is incomplete."
        )
    return done


def _locations(weights: WeightMap) -> dict[Path, str]:
    """File -> name beside the graph; files of one name from two places get numbered."""
    out: dict[Path, str] = {}
    taken: set[str] = set()
    for file in dict.fromkeys(ref.file for ref in weights.values()):
        name, n = file.name, 1
        while name in taken:
            n += 1
            name = f"{file.stem}-{n}{file.suffix}"
        taken.add(name)
        out[file] = name
    return out


def _point(graph: ir.Graph, value: ir.Value, name: str, ref: TensorRef, location: str) -> None:
    stored = _DTYPES.get(ref.dtype)
    if stored is None:
        raise ExportError(f"{name} is stored as {ref.dtype}, which this exporter cannot read.")
    wanted = value.dtype or (value.const_value.dtype if value.const_value is not None else stored)
    tensor = FileTensor(ref.file, location, ref.offset, ref.length, stored, ir.Shape(ref.shape), name)
    if stored == wanted:
        value.const_value = tensor
        value.shape = ir.Shape(ref.shape)
        return
    if not {stored, wanted} <= _FLOATS:
        raise ExportError(f"{name} is stored as {ref.dtype} but the model computes in {wanted.name}.")
    graph.initializers.pop(name)
    source = ir.Value(name=name, shape=ir.Shape(ref.shape), type=ir.TensorType(stored), const_value=tensor)
    cast = ir.node("Cast", [source], attributes={"to": wanted.value}, name=f"{name}/cast")
    cast.outputs[0].name = f"{name}/{wanted.name.lower()}"
    cast.outputs[0].shape = ir.Shape(ref.shape)
    cast.outputs[0].type = ir.TensorType(wanted)
    value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
    graph.register_initializer(source)
    graph.insert_before(graph[0], cast)

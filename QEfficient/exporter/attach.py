"""Points a traced graph's initializers at the checkpoint's bytes."""

from __future__ import annotations

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


def attach(model: ir.Model, weights: WeightMap, parameters: set[str], aliases: dict[str, str]) -> None:
    """Replaces initializers by external tensors; a stored dtype other than the graph's gets a Cast.

    Must run before any optimisation: until then all weightless parameters look like equal zeros.

    Args:
        weights: tensor name -> bytes.
        parameters: names that must be found in ``weights``.
        aliases: name in the graph -> name in ``weights``, for tied tensors.

    Raises:
        ExportError: a parameter is missing from the weights or has another shape there.
    """
    graph = model.graph
    missing = []
    for name, value in list(graph.initializers.items()):
        ref = weights.get(name) or weights.get(aliases.get(name, ""))
        if ref is None:
            if name in parameters:
                missing.append(name)
            continue
        wanted = value.const_value.shape if value.const_value is not None else value.shape
        if wanted is None or tuple(wanted.numpy()) != ref.shape:
            raise ExportError(f"{name} has shape {ref.shape} in the checkpoint but {wanted} in the model.")
        _point(graph, value, name, ref)
    if missing:
        raise ExportError(
            f"the checkpoint lacks {len(missing)} of the model's weights, e.g. {missing[0]}: it was made for another "
            "model class or is incomplete."
        )


def _point(graph: ir.Graph, value: ir.Value, name: str, ref: TensorRef) -> None:
    stored = _DTYPES.get(ref.dtype)
    if stored is None:
        raise ExportError(f"{name} is stored as {ref.dtype}, which this exporter cannot read.")
    wanted = value.dtype or (value.const_value.dtype if value.const_value is not None else stored)
    tensor = FileTensor(ref.file, ref.file.name, ref.offset, ref.length, stored, ir.Shape(ref.shape), name)
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

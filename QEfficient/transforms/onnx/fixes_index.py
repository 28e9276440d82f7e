"""Rules of FixTrainingOps: gathering, scattering, padding, splitting and sorting in basic operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from QEfficient.errors import TransformError
from QEfficient.transforms.onnx.fixes_math import Rule, attribute, count_along, dtype, known, rank, required, scalar
from QEfficient.transforms.onnx.graph import Maker

INDEX_RULES: dict[str, Rule] = {}
_FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            INDEX_RULES[name] = function
        return function

    return register


def _reduction(node: ir.Node) -> str:
    found = node.attributes.get("reduction")
    kind = found.as_string() if found is not None else "none"
    if kind not in ("none", "add"):
        raise TransformError(f"FixTrainingOps has no rule for {node.op_type} with reduction {kind} (node {node.name}).")
    return kind


def _from_start(make: Maker, index: ir.Value, length: ir.Value) -> ir.Value:
    """Indices counted from the front: negative ones count from the end."""
    index = make.op("Cast", index, to=ir.DataType.INT64.value) if dtype(index) != ir.DataType.INT64 else index
    return make.op("Where", make.op("Less", index, make.constant(0)), make.op("Add", index, length), index)


def _length(make: Maker, value: ir.Value, axis: int) -> ir.Value:
    """int64 [1]."""
    return make.op("Shape", value, start=axis, end=axis + 1)


def _flat(make: Maker, node: ir.Node, data: ir.Value, indices: ir.Value) -> tuple[ir.Value, ir.Value, int]:
    """Index tuples as numbers of rows [n]; the number of rows [1]; how many dimensions a tuple covers."""
    shape = indices.shape
    last = shape[-1] if shape is not None else None
    depth = last if isinstance(last, int) else 1
    if not isinstance(last, int):
        maker = indices.producer()
        added = known(maker.inputs[1]) if maker is not None and maker.op_type == "Unsqueeze" else None
        if added is None or added.tolist() != [-1]:
            raise TransformError(
                f"FixTrainingOps: the depth of the indices of {node.name} ({node.op_type}) is not known."
            )
    total: ir.Value | None = None
    rows = make.constant([1])
    for axis in range(depth):
        length = _length(make, data, axis)
        column = make.op("Gather", indices, make.constant(axis), axis=-1)
        column = _from_start(make, make.op("Reshape", column, make.constant([-1])), length)
        total = column if total is None else make.op("Add", make.op("Mul", total, length), column)
        rows = make.op("Mul", rows, length)
    assert total is not None
    return total, rows, depth


@rule("ScatterND")
def scatter_nd(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    """A one-hot matrix says which update belongs to which row; duplicates add up in the product."""
    data, indices, updates = (required(node, place) for place in range(3))
    kind = _reduction(node)
    index, rows, depth = _flat(make, node, data, indices)
    rest = make.op("Shape", data, start=depth)
    # The width is written out: -1 could not be resolved where there are no rows.
    width = _product(make, rest) if rank(node, data) > depth else make.constant([1])
    table = make.op("Reshape", data, make.op("Concat", rows, width, axis=0))
    added = make.op("Reshape", updates, make.op("Concat", make.op("Shape", index), width, axis=0))
    numbers = make.op("Range", make.constant(0), make.op("Squeeze", rows), make.constant(1))
    hits = make.op(
        "Equal", make.op("Unsqueeze", numbers, make.constant([1])), make.op("Unsqueeze", index, make.constant([0]))
    )
    element = dtype(data)
    if element in _FLOATS:
        sums = make.op("MatMul", make.op("Cast", hits, to=element.value), added)
    else:  # whole numbers exactly, whatever their size
        chosen = make.op(
            "Where", make.op("Unsqueeze", hits, make.constant([-1])), make.op("Unsqueeze", added, make.constant([0])),
            scalar(make, 0, data),
        )  # fmt: skip
        sums = make.op("ReduceSum", chosen, make.constant([1]), keepdims=0)
    if kind == "add":
        result = make.op("Add", table, sums)
    else:
        counted = make.op(
            "ReduceSum", make.op("Cast", hits, to=ir.DataType.INT32.value), make.constant([1]), keepdims=1
        )
        written = make.op("Greater", counted, make.constant(0, ir.DataType.INT32))
        result = make.op("Where", written, sums, table)
    return [make.op("Reshape", result, make.op("Shape", data))]


def _product(make: Maker, sizes: ir.Value) -> ir.Value:
    """The product of a list of sizes, int64 [1]: the length of a vector of that shape."""
    ones = make.op("Expand", make.constant(1), sizes)
    return make.op("Shape", make.op("Reshape", ones, make.constant([-1])))


def _hits(make: Maker, index: ir.Value, data: ir.Value, axis: int) -> ir.Value:
    """Whether an index names a place along the axis: the index's dimensions, then the places."""
    places = _from_start(make, index, _length(make, data, axis))
    return make.op("Equal", make.op("Unsqueeze", places, make.constant([-1])), count_along(make, data, axis))


def _check_equal_dims(node: ir.Node, data: ir.Value, index: ir.Value, axis: int) -> None:
    """An index may be smaller than the data beside the axis; no training graph does that, and no rule here could."""
    if data.shape is None or index.shape is None:
        return
    for place, (a, b) in enumerate(zip(data.shape, index.shape, strict=True)):
        if place != axis and a != b and isinstance(a, int) and isinstance(b, int):
            raise TransformError(
                f"FixTrainingOps: {node.name} ({node.op_type}) has an index of another size than its data beside the "
                "axis, which has no rule."
            )


@rule("GatherElements")
def gather_elements(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    data, index = required(node, 0), required(node, 1)
    dims = rank(node, data)
    axis = attribute(node, "axis", 0) % dims
    _check_equal_dims(node, data, index, axis)
    others = [a for a in range(dims) if a != axis]
    lying = make.op("Unsqueeze", make.op("Transpose", data, perm=[*others, axis]), make.constant([axis]))
    chosen = make.op("Where", _hits(make, index, data, axis), lying, scalar(make, 0, data))
    return [make.op("ReduceSum", chosen, make.constant([-1]), keepdims=0)]


@rule("ScatterElements")
def scatter_elements(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    data, index, updates = (required(node, place) for place in range(3))
    kind = _reduction(node)
    dims = rank(node, data)
    axis = attribute(node, "axis", 0) % dims
    _check_equal_dims(node, data, index, axis)
    hits = _hits(make, index, data, axis)
    back = [*range(axis), dims - 1, *range(axis, dims - 1)]

    def along_axis(value: ir.Value) -> ir.Value:
        summed = make.op("ReduceSum", value, make.constant([axis]), keepdims=0)
        return make.op("Transpose", summed, perm=back)

    spread = make.op("Unsqueeze", updates, make.constant([-1]))
    sums = along_axis(make.op("Where", hits, spread, scalar(make, 0, data)))
    if kind == "add":
        return [make.op("Add", data, sums)]
    counted = along_axis(make.op("Cast", hits, to=ir.DataType.INT32.value))
    return [make.op("Where", make.op("Greater", counted, make.constant(0, ir.DataType.INT32)), sums, data)]


@rule("GatherND")
def gather_nd(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    data, indices = required(node, 0), required(node, 1)
    if attribute(node, "batch_dims", 0):
        raise TransformError(f"FixTrainingOps has no rule for GatherND with batch_dims (node {node.name}).")
    index, rows, depth = _flat(make, node, data, indices)
    rest = make.op("Shape", data, start=depth)
    table = make.op("Reshape", data, make.op("Concat", rows, rest, axis=0))
    shape = make.op("Concat", make.op("Shape", indices, end=-1), rest, axis=0)
    return [make.op("Reshape", make.op("Gather", table, index, axis=0), shape)]


@rule("Pad")
def pad(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    """A Concat with constant blocks, one axis after the other."""
    value, pads = required(node, 0), required(node, 1)
    mode, axes = node.attributes.get("mode"), node.inputs[3] if len(node.inputs) > 3 else None
    amounts, places = known(pads), known(axes)
    if (mode is not None and mode.as_string() != "constant") or (axes is not None and places is None):
        raise TransformError(f"FixTrainingOps has a rule for Pad with a constant only (node {node.name}).")
    if amounts is not None and amounts.min() < 0:
        raise TransformError(f"FixTrainingOps has no rule for Pad with negative amounts (node {node.name}).")
    dims = rank(node, value)
    used = list(range(dims)) if places is None else [int(axis) % dims for axis in places]
    given = node.inputs[2] if len(node.inputs) > 2 else None
    fill = given if given is not None else scalar(make, 0, value)
    for number, axis in enumerate(used):
        parts: list[ir.Value] = [value]
        for place, front in ((number, True), (number + len(used), False)):
            if amounts is not None and amounts[place] == 0:
                continue
            amount = make.op("Slice", pads, make.constant([place]), make.constant([place + 1]))
            sizes = [_length(make, value, a) if a != axis else amount for a in range(dims)]
            block = make.op("Expand", fill, make.op("Concat", *sizes, axis=0))
            parts = [block, *parts] if front else [*parts, block]
        if len(parts) > 1:
            value = make.op("Concat", *parts, axis=axis)
    return [value if value is not node.inputs[0] else make.op("Identity", value)]


@rule("Split")
def split(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    value, lengths = required(node, 0), known(node.inputs[1]) if len(node.inputs) > 1 else None
    axis, count = attribute(node, "axis", 0), len(node.outputs)
    total = value.shape[axis] if value.shape is not None else None
    if lengths is None and isinstance(total, int):
        share = -(-total // count)
        lengths = np.array([min(share, total - share * part) for part in range(count)])
    if lengths is None:
        raise TransformError(f"FixTrainingOps: the lengths of {node.name} (Split) are not constant.")
    ends = np.cumsum(lengths)
    return [
        make.op("Slice", value, make.constant([end - length]), make.constant([end]), make.constant([axis]))
        for length, end in zip(lengths.tolist(), ends.tolist(), strict=True)
    ]


@rule("TopK")
def top_k(make: Maker, node: ir.Node) -> Sequence[ir.Value]:
    """A value's place is how many come before it; ties go to the lower index. Quadratic in the length of the axis."""
    x, k = required(node, 0), required(node, 1)
    dims = rank(node, x)
    axis = attribute(node, "axis", -1) % dims
    order = [a for a in range(dims) if a != axis] + [axis]
    moved = make.op("Transpose", x, perm=order)
    numbers = count_along(make, moved, dims - 1)
    mine, other = make.op("Unsqueeze", moved, make.constant([-1])), make.op("Unsqueeze", moved, make.constant([-2]))
    earlier = make.op(
        "Less", make.op("Unsqueeze", numbers, make.constant([0])), make.op("Unsqueeze", numbers, make.constant([1]))
    )
    better = make.op("Greater" if attribute(node, "largest", 1) else "Less", other, mine)
    before = make.op("Or", better, make.op("And", make.op("Equal", other, mine), earlier))
    place = make.op("ReduceSum", make.op("Cast", before, to=ir.DataType.INT64.value), make.constant([-1]), keepdims=0)
    wanted = make.op("Range", make.constant(0), make.op("Squeeze", k), make.constant(1))
    hits = make.op(
        "Equal", make.op("Unsqueeze", place, make.constant([-2])), make.op("Unsqueeze", wanted, make.constant([1]))
    )
    back = [order.index(a) for a in range(dims)]

    def pick(value: ir.Value, zero: ir.Value) -> ir.Value:
        chosen = make.op("ReduceSum", make.op("Where", hits, value, zero), make.constant([-1]), keepdims=0)
        return make.op("Transpose", chosen, perm=back)

    return [pick(make.op("Unsqueeze", moved, make.constant([-2])), scalar(make, 0, x)), pick(numbers, make.constant(0))]

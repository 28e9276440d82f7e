"""How large the values of a graph are when its symbolic dimensions have given sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean

Dims = tuple[int, ...]

_COMPARISONS = {
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
    "And",
    "Or",
    "Xor",
    "Not",
    "IsNaN",
    "IsInf",
}
_PRODUCTS = {"MatMul", "Gemm"}


class Sizes:
    """Shapes and bytes of values.

    Values carry shapes whose dimensions are numbers or expressions of symbols (``2*batch_size``). Where a value has
    none, its shape follows from its inputs: exactly for element-wise operators, products and indexing with constants;
    a slice whose bounds depend on data counts as an equal share among the slices of one value, and anything else as
    large as its largest input.

    Args:
        symbols: the size of every symbol, or one size for all of them.
    """

    def __init__(self, symbols: Mapping[str, int] | int) -> None:
        self.symbols = symbols
        self._dims: dict[str, int] = {}
        self._shapes: dict[ir.Value, Dims] = {}

    def elements(self, value: ir.Value) -> int:
        return math.prod(self.shape(value))

    def nbytes(self, value: ir.Value) -> int:
        dtype = self.dtype(value)
        return math.ceil(self.elements(value) * dtype.bitwidth / 8)

    def shape(self, value: ir.Value) -> Dims:
        """The value's dimensions.

        Raises:
            OptionError: a symbol has no size.
        """
        if value not in self._shapes:
            todo = [value]
            while todo:  # not by recursion: a chain of nodes may be thousands long
                current = todo[-1]
                producer = current.producer()
                if current.shape is None and current.const_value is None and producer is not None:
                    missing = [v for v in producer.inputs if v is not None and v not in self._shapes]
                    if missing:
                        todo += missing
                        continue
                self._shapes[current] = self._of(current, producer)
                todo.pop()
        return self._shapes[value]

    def _of(self, value: ir.Value, producer: ir.Node | None) -> Dims:
        if value.shape is not None:
            return tuple(self._dim(d) for d in value.shape)
        if value.const_value is not None:
            return tuple(value.const_value.shape.numpy())
        if producer is None:
            return ()
        return self._inferred(producer)

    def _dim(self, dim: int | ir.SymbolicDim) -> int:
        if isinstance(dim, int):
            return dim
        text = str(dim.value)
        if text not in self._dims:
            names = sorted(dim.free_symbols())
            sizes = dict.fromkeys(names, self.symbols) if isinstance(self.symbols, int) else self.symbols
            unknown = [name for name in names if name not in sizes]
            if unknown or not names:
                raise OptionError(
                    f"the graph has a dimension {text!r} and no size was given for {unknown or [text]}."
                    f"{did_you_mean((unknown or [text])[0], sizes)}"
                )
            self._dims[text] = int(dim.evaluate(dict(sizes)))  # type: ignore[arg-type]
        return self._dims[text]

    def _inferred(self, node: ir.Node) -> Dims:
        shapes = [self._shapes[v] for v in node.inputs if v is not None]
        if not shapes:
            return ()
        first, kind = shapes[0], node.op_type
        if kind == "Shape":
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(first))
            return (len(range(len(first))[start:end]),)
        if kind in _PRODUCTS:
            return _product(node, shapes)
        if kind == "Gather" and first:
            axis = node.attributes.get_int("axis", 0) % len(first)
            return (*first[:axis], *shapes[1], *first[axis + 1 :])
        if kind == "Concat":
            axis = node.attributes.get_int("axis", 0) % len(first)
            return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])
        if kind == "Slice":
            return self._slice(node, first)
        if kind == "Unsqueeze":
            added = {axis % (len(first) + len(axes)) for axes in [_constants(node, 1) or [0]] for axis in axes}
            left = iter(first)
            return tuple(1 if axis in added else next(left) for axis in range(len(first) + len(added)))
        if kind == "Squeeze":
            gone = {axis % len(first) for axis in _constants(node, 1) or [i for i, d in enumerate(first) if d == 1]}
            return tuple(d for axis, d in enumerate(first) if axis not in gone)
        if kind.startswith("Reduce") or kind == "ArgMax":
            reduced = [node.attributes.get_int("axis", 0)] if kind == "ArgMax" else _constants(node, 1)
            given = reduced or list(range(len(first)))
            axes = {axis % max(1, len(first)) for axis in given}
            keep = node.attributes.get_int("keepdims", 1)
            return tuple(1 if axis in axes else d for axis, d in enumerate(first) if keep or axis not in axes)
        try:
            return np.broadcast_shapes(*shapes)
        except ValueError:
            return max(shapes, key=math.prod)

    def _slice(self, node: ir.Node, shape: Dims) -> Dims:
        starts, ends, axes, steps = (_constants(node, place) for place in range(1, 5))
        result = list(shape)
        if starts is not None and ends is not None:
            for number, axis in enumerate(axes or range(len(starts))):
                step = steps[number] if steps else 1
                result[axis] = len(range(shape[axis])[starts[number] : ends[number] : step])
            return tuple(result)
        source = node.inputs[0]
        siblings = [n for n in source.consumers() if n.op_type == "Slice"] if source is not None else []
        axis = axes[0] if axes else 0
        result[axis] = math.ceil(shape[axis] / max(1, len(siblings)))
        return tuple(result)

    def dtype(self, value: ir.Value) -> ir.DataType:
        """The value's type: as noted, or as that of what it was made from."""
        for _ in range(32):
            producer = value.producer()
            if value.dtype is not None:
                return value.dtype
            if value.const_value is not None:
                return value.const_value.dtype
            if producer is None:
                return ir.DataType.FLOAT
            if producer.op_type in _COMPARISONS:
                return ir.DataType.BOOL
            if producer.op_type == "Cast":
                return ir.DataType(producer.attributes.get_int("to", 1))
            if producer.op_type in ("Shape", "Size"):
                return ir.DataType.INT64
            known = [v for v in producer.inputs if v is not None]
            if not known:
                return ir.DataType.FLOAT
            value = known[-1] if producer.op_type == "Where" else known[0]
        return ir.DataType.FLOAT


def _product(node: ir.Node, shapes: list[Dims]) -> Dims:
    a, b = shapes[0], shapes[1]
    if node.op_type == "Gemm":
        return (
            a[1] if node.attributes.get_int("transA", 0) else a[0],
            b[0] if node.attributes.get_int("transB", 0) else b[1],
        )
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])


def _constants(node: ir.Node, place: int) -> list[int] | None:
    """The whole numbers of a constant input."""
    value = node.inputs[place] if len(node.inputs) > place else None
    if value is None or value.const_value is None:
        return None
    return [int(x) for x in np.atleast_1d(value.const_value.numpy())]

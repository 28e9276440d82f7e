"""Lowering rules: views, permutations, slices, joins and constants of a shape."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from QEfficient.exporter.training.lowering import Lowering, dtype_of, rule, same_shape

_END = 2**63 - 1
aten = torch.ops.aten


@rule(
    "_assert_tensor_metadata.default",
    "_assert_scalar.default",
    "_assert_async.msg",
    "sym_constrain_range_for_size.default",
)
def nothing(s: Lowering, n: Node, *args: Any, **kwargs: Any) -> None:
    """Checks made while tracing."""


@rule("alias.default", "detach.default", "clone.default", "lift_fresh_copy.default", "contiguous.default")
def same(s: Lowering, n: Node, x: Node, **options: Any) -> ir.Value:
    return s.value(x)


@rule("sym_size.int")
def size(s: Lowering, n: Node, x: Node, dim: int) -> ir.Value:
    return s.build.op("Shape", s.value(x), start=dim, end=dim + 1)


@rule("view.default", "reshape.default", "_unsafe_view.default")
def view(s: Lowering, n: Node, x: Node, shape: Any) -> ir.Value:
    while x.target is aten.view.default:  # a view of a view needs one Reshape
        x = x.args[0]  # type: ignore[assignment]
    if same_shape(x, n):
        return s.value(x)
    shape = list(shape)
    symbolic = [place for place, dim in enumerate(shape) if not isinstance(dim, int)]
    if len(symbolic) == 1 and -1 not in shape:
        shape[symbolic[0]] = -1
    elif symbolic:
        # Leading dimensions kept from the input need no size: 0 copies them.
        source = list(x.meta["val"].shape)
        target = list(n.meta["val"].shape)
        for place, (kept, wanted) in enumerate(zip(source, target, strict=False)):
            if str(kept) != str(wanted) or isinstance(wanted, int):
                break
            shape[place] = 0
        left = [place for place, dim in enumerate(shape) if not isinstance(dim, int)]
        if len(left) == 1 and -1 not in shape:
            shape[left[0]] = -1
    return s.build.op("Reshape", s.value(x), s.sizes(shape))


@rule("permute.default")
def permute(s: Lowering, n: Node, x: Node, order: list[int]) -> ir.Value:
    order = [axis % len(order) for axis in order]
    while x.target is aten.permute.default:
        inner = x.args[1]
        order = [inner[axis] % len(order) for axis in order]  # type: ignore[index, operator, misc]
        x = x.args[0]  # type: ignore[assignment]
    return s.value(x) if order == sorted(order) else s.build.op("Transpose", s.value(x), perm=order)


@rule("unsqueeze.default")
def unsqueeze(s: Lowering, n: Node, x: Node, dim: int) -> ir.Value:
    return s.build.op("Unsqueeze", s.value(x), s.build.constant([dim]))


@rule("squeeze.dim", "squeeze.dims")
def squeeze(s: Lowering, n: Node, x: Node, dims: Any) -> ir.Value:
    wanted = [dims] if isinstance(dims, int) else list(dims)
    shape = x.meta["val"].shape
    ones = [d for d in wanted if shape[d] == 1]
    return s.build.op("Squeeze", s.value(x), s.build.constant(ones)) if ones else s.value(x)


@rule("expand.default")
def expand(s: Lowering, n: Node, x: Node, shape: Any) -> ir.Value:
    if same_shape(x, n):
        return s.value(x)
    return s.build.op("Expand", s.value(x), s.sizes([1 if d == -1 else d for d in shape]))


@rule("slice.Tensor")
def slice_(s: Lowering, n: Node, x: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> ir.Value:
    start, end = start or 0, _END if end is None else end
    if start == 0 and step == 1 and (end == _END or same_shape(x, n)):
        return s.value(x)
    constant = s.build.constant
    return s.build.op("Slice", s.value(x), s.size(start), s.size(end), constant([dim]), constant([step]))


@rule("select.int")
def select(s: Lowering, n: Node, x: Node, dim: int, index: int) -> ir.Value:
    return s.build.op("Gather", s.value(x), s.build.constant(index), axis=dim)


@rule("slice_scatter.default")
def slice_scatter(
    s: Lowering, n: Node, x: Node, source: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> ir.Value:
    """Writing into zeros, which is how a slice's gradient arrives, is a Pad; anything else a Concat."""
    start, end = start or 0, _END if end is None else end
    rank = x.meta["val"].dim()
    dim %= rank
    if same_shape(x, source):
        return s.value(source)
    if step != 1:
        return _write_every(s, x, source, dim, start, end, step)
    if is_zeros(x) and isinstance(start, int) and start >= 0:
        total, length = x.meta["val"].shape[dim], source.meta["val"].shape[dim]
        after: Any
        if isinstance(total, int) and isinstance(length, int):
            after = total - start - length
        else:
            whole = s.size(total) if isinstance(total, int) else s.size(_shape_of_zeros(x)[dim])
            part = s.build.op("Shape", s.value(source), start=dim, end=dim + 1)
            after = s.build.op("Sub", whole, s.build.op("Add", part, s.build.constant([start])))
        before = [0] * rank
        before[dim] = start
        pads = s.build.concat_sizes([*before, *([0] * dim), after, *([0] * (rank - dim - 1))])
        return s.build.op("Pad", s.value(source), pads)
    constant = s.build.constant
    parts = []
    if start != 0:
        parts.append(s.build.op("Slice", s.value(x), constant([0]), s.size(start), constant([dim])))
    parts.append(s.value(source))
    if end != _END:
        parts.append(s.build.op("Slice", s.value(x), s.size(end), constant([_END]), constant([dim])))
    return s.build.op("Concat", *parts, axis=dim)


def _write_every(s: Lowering, x: Node, source: Node, dim: int, start: Any, end: Any, step: int) -> ir.Value:
    """Writes ``source`` into every ``step``-th place of an axis, which ScatterND takes in front."""
    constant = s.build.constant
    length = s.build.op("Shape", s.value(x), start=dim, end=dim + 1)
    columns = s.build.op("Range", constant(0), s.build.op("Squeeze", length), constant(1))
    places = s.build.op("Slice", columns, s.size(start), s.size(end), constant([0]), constant([step]))
    front = [dim, *(axis for axis in range(x.meta["val"].dim()) if axis != dim)]
    turned = [s.build.op("Transpose", s.value(value), perm=front) for value in (x, source)]
    written = s.build.op("ScatterND", turned[0], s.build.op("Unsqueeze", places, constant([-1])), turned[1])
    return s.build.op("Transpose", written, perm=[front.index(axis) for axis in range(len(front))])


@rule("flip.default")
def flip(s: Lowering, n: Node, x: Node, dims: list[int]) -> ir.Value:
    """Slices that run backwards: the gradient of a running sum."""
    ends = [s.build.constant([number] * len(dims)) for number in (-1, -_END, -1)]
    return s.build.op("Slice", s.value(x), ends[0], ends[1], s.build.constant(list(dims)), ends[2])


@rule("select_scatter.default")
def select_scatter(s: Lowering, n: Node, x: Node, source: Node, dim: int, index: int) -> ir.Value:
    constant = s.build.constant
    rank = x.meta["val"].dim()
    dim, length = dim % rank, x.meta["val"].shape[dim]
    row = s.build.op("Unsqueeze", s.value(source), constant([dim]))
    if is_zeros(x) and isinstance(length, int):
        before, after = [0] * rank, [0] * rank
        before[dim] = index % length
        after[dim] = length - 1 - before[dim]
        return s.build.op("Pad", row, constant(before + after))
    parts = [s.build.op("Slice", s.value(x), constant([0]), constant([index]), constant([dim])), row]
    if index != -1:
        parts.append(s.build.op("Slice", s.value(x), constant([index + 1]), constant([_END]), constant([dim])))
    return s.build.op("Concat", *parts, axis=dim)


def is_zeros(x: Node) -> bool:
    """Whether a node makes a tensor of zeros."""
    return x.target in (aten.full.default, aten.full_like.default) and bool(x.args[1] == 0)


def _shape_of_zeros(x: Node) -> Any:
    return x.args[0]


def joined_halves(s: Lowering, x: Node, y: Node) -> ir.Value | None:
    """The sum of two slice gradients that fill complementary parts of one axis: a Concat instead of two Pads."""
    parts = []
    for node in (x, y):
        if node.target is not aten.slice_scatter.default or not is_zeros(node.args[0]):  # type: ignore[arg-type]
            return None
        arguments = [*node.args, *([None] * (6 - len(node.args)))]
        target, source, dim, start, end, step = arguments
        rank = target.meta["val"].dim()  # type: ignore[union-attr]
        axis = (dim or 0) % rank
        total = target.meta["val"].shape[axis]  # type: ignore[union-attr]
        if not isinstance(total, int) or (step or 1) != 1:
            return None
        first = start or 0
        last = total if end is None or end > total else end  # type: ignore[operator]
        if not isinstance(first, int) or not isinstance(last, int) or first < 0 or last < 0:
            return None
        parts.append((first, last, axis, total, source))
    (a, b) = sorted(parts, key=lambda part: part[0])
    if a[2] != b[2] or a[0] != 0 or a[1] != b[0] or b[1] != b[3] or not same_shape(x, y):
        return None
    return s.build.op("Concat", s.value(a[4]), s.value(b[4]), axis=a[2])  # type: ignore[arg-type]


@rule("cat.default")
def cat(s: Lowering, n: Node, parts: list[Node], dim: int = 0) -> ir.Value:
    values = [s.number(part, dtype_of(n)) for part in parts]
    return values[0] if len(values) == 1 else s.build.op("Concat", *values, axis=dim)


@rule("split_with_sizes.default")
def split(s: Lowering, n: Node, x: Node, lengths: list[int], dim: int = 0) -> tuple[ir.Value, ...]:
    return s.build.ops("Split", [s.value(x), s.sizes(lengths)], len(lengths), axis=dim)


@rule("repeat.default")
def repeat(s: Lowering, n: Node, x: Node, times: Any) -> ir.Value:
    value, missing = s.value(x), len(times) - x.meta["val"].dim()
    if missing:
        value = s.build.op("Unsqueeze", value, s.build.constant(list(range(missing))))
    return s.build.op("Tile", value, s.sizes(times))


@rule("full.default")
def full(s: Lowering, n: Node, shape: Any, fill: Any, **options: Any) -> ir.Value:
    value = s.number(fill, dtype_of(n))
    return s.build.op("Expand", value, s.sizes(shape)) if len(shape) else value


@rule("empty_permuted.default", "empty.memory_format")
def empty(s: Lowering, n: Node, shape: Any, *args: Any, **options: Any) -> ir.Value:
    """Memory that is written in full later; zeros, because a graph has no uninitialised values."""
    return s.build.op("Expand", s.build.scalar(0, dtype_of(n)), s.sizes(shape))


@rule("new_empty.default", "new_empty_strided.default")
def new_empty(s: Lowering, n: Node, x: Node, shape: Any, *args: Any, **options: Any) -> ir.Value:
    return s.build.op("Expand", s.build.scalar(0, dtype_of(n)), s.sizes(shape))


@rule("copy.default")
def copy(s: Lowering, n: Node, x: Node, source: Node, non_blocking: bool = False) -> ir.Value:
    """``source`` in the shape and dtype of ``x``, whose content is overwritten."""
    value = s.number(source, dtype_of(n))
    return value if same_shape(x, source) else s.build.op("Expand", value, s.build.op("Shape", s.value(x)))


@rule("full_like.default")
def full_like(s: Lowering, n: Node, x: Node, fill: Any, **options: Any) -> ir.Value:
    value = s.number(fill, dtype_of(n))
    return s.build.op("Expand", value, s.build.op("Shape", s.value(x))) if n.meta["val"].dim() else value


@rule("scalar_tensor.default")
def scalar_tensor(s: Lowering, n: Node, x: Any, **options: Any) -> ir.Value:
    return s.number(x, dtype_of(n))


@rule("arange.start_step")
def arange(s: Lowering, n: Node, start: Any, end: Any, step: Any = 1, **options: Any) -> ir.Value:
    numbers = [s.number(x, torch.int64) for x in (start, end, step)]
    return s.build.cast(s.build.op("Range", *numbers), torch.int64, dtype_of(n))


@rule("constant_pad_nd.default")
def constant_pad(s: Lowering, n: Node, x: Node, pads: list[int], fill: float = 0) -> ir.Value:
    """torch lists pads from the last axis as (before, after); ONNX all befores, then all afters."""
    pairs = list(zip(pads[::2], pads[1::2], strict=True))
    missing = x.meta["val"].dim() - len(pairs)
    ordered = [(0, 0)] * missing + pairs[::-1]
    flat = [before for before, _ in ordered] + [after for _, after in ordered]
    return s.build.op("Pad", s.value(x), s.build.constant(flat), s.build.scalar(fill, dtype_of(n)))


@rule("tril.default", "triu.default")
def triangle(s: Lowering, n: Node, x: Node, diagonal: int = 0) -> ir.Value:
    upper = int(n.target is aten.triu.default)
    return s.build.op("Trilu", s.value(x), s.build.constant(diagonal), upper=upper)


@rule("_local_scalar_dense.default")
def item(s: Lowering, n: Node, x: Node) -> ir.Value:
    value = s.build.cast(s.value(x), dtype_of(x), torch.int64)
    return s.build.op("Reshape", value, s.build.constant([1]))

"""CacheFunctions: reads and writes of the KV state become the functions the Cloud AI compiler knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from QEfficient.errors import TransformError
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import Maker
from QEfficient.transforms.onnx.probe import Part

DOMAIN = "com.qualcomm.cloud"
INPUT = "comp_ctx_lengths"
OPSET = 17

# Bodies in operators of ONNX, so that any runtime can inline them. Indices are in range always: reads are of slots
# 0 ... L-1, padding writes what its row's last token writes.
_BODIES = {
    "CtxScatter": """
CtxScatter (data, position_ids, updates) => (result) {
    shape = Shape <end = 3> (updates)
    one = Constant <value_ints = [1]> ()
    shape4 = Concat <axis = 0> (shape, one)
    zero = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    batch = Shape <start = 0, end = 1> (updates)
    heads = Shape <start = 1, end = 2> (updates)
    batch0 = Squeeze (batch, first)
    heads0 = Squeeze (heads, first)
    rows = Range (zero, batch0, step)
    others = Constant <value_ints = [1, 2, 3]> ()
    rows4 = Unsqueeze (rows, others)
    places = Range (zero, heads0, step)
    beside = Constant <value_ints = [0, 2, 3]> ()
    places4 = Unsqueeze (places, beside)
    around = Constant <value_ints = [1, 3]> ()
    slots4 = Unsqueeze (position_ids, around)
    a = Expand (rows4, shape4)
    b = Expand (places4, shape4)
    c = Expand (slots4, shape4)
    indices = Concat <axis = 3> (a, b, c)
    result = ScatterND (data, indices, updates)
}""",
    "CtxScatterCB": """
CtxScatterCB (data, batch_index, position_ids, updates) => (result) {
    shape = Shape <end = 3> (updates)
    one = Constant <value_ints = [1]> ()
    shape4 = Concat <axis = 0> (shape, one)
    zero = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    heads = Shape <start = 1, end = 2> (updates)
    heads0 = Squeeze (heads, first)
    after = Constant <value_ints = [2, 3]> ()
    rows4 = Unsqueeze (batch_index, after)
    places = Range (zero, heads0, step)
    beside = Constant <value_ints = [0, 2, 3]> ()
    places4 = Unsqueeze (places, beside)
    around = Constant <value_ints = [1, 3]> ()
    slots4 = Unsqueeze (position_ids, around)
    a = Expand (rows4, shape4)
    b = Expand (places4, shape4)
    c = Expand (slots4, shape4)
    indices = Concat <axis = 3> (a, b, c)
    result = ScatterND (data, indices, updates)
}""",
    "CtxGather": """
CtxGather (data, ctx_indices, comp_ctx_len) => (result) {
    front = Shape <end = 2> (data)
    flat = Constant <value_ints = [-1]> ()
    length = Reshape (comp_ctx_len, flat)
    shape = Concat <axis = 0> (front, length)
    wide = Expand (ctx_indices, shape)
    indices = Unsqueeze (wide, flat)
    result = GatherND <batch_dims = 2> (data, indices)
}""",
    "CtxGatherCB": """
CtxGatherCB (data, batch_index, ctx_indices, comp_ctx_len) => (result) {
    zero = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    batch = Shape <start = 0, end = 1> (batch_index)
    heads = Shape <start = 1, end = 2> (data)
    length = Shape <start = 2, end = 3> (ctx_indices)
    one = Constant <value_ints = [1]> ()
    shape = Concat <axis = 0> (batch, heads, length, one)
    after = Constant <value_ints = [2, 3]> ()
    rows4 = Unsqueeze (batch_index, after)
    heads0 = Squeeze (heads, first)
    places = Range (zero, heads0, step)
    beside = Constant <value_ints = [0, 2, 3]> ()
    places4 = Unsqueeze (places, beside)
    last = Constant <value_ints = [3]> ()
    slots4 = Unsqueeze (ctx_indices, last)
    a = Expand (rows4, shape)
    b = Expand (places4, shape)
    c = Expand (slots4, shape)
    indices = Concat <axis = 3> (a, b, c)
    result = GatherND (data, indices)
}""",
}


@dataclass(frozen=True)
class CacheFunctions(OnnxTransform):
    """Writes keys and values with ``CtxScatter`` and reads them with ``CtxGather`` (``…CB`` with ``batch_index``).

    The functions' bodies are in the graph. A value at a slot above its row's largest position reads as 0, and so does a
    key unless a mask selects its score, so that device memory nobody wrote cannot reach a result. State that is written
    in another way keeps its operators.

    Parameters:
        comp_ctx: add the input ``comp_ctx_lengths`` int64 [L], of which only the length counts: L slots are read
            instead of the whole context.
    """

    name: ClassVar[str] = "CacheFunctions"
    changes_interface: ClassVar[bool] = True
    comp_ctx: bool = False

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError when ``comp_ctx`` is asked for and some state is not read by a plain attention."""
        graph = model.graph
        writes, left = [], {}
        for node in graph:
            if node.op_type == "ScatterND" and node.domain == "" and node.outputs[0].is_graph_output():
                found = _find_write(model, node)
                if isinstance(found, str):
                    left[str(node.outputs[0].name)] = found
                else:
                    writes.append(found)
        if self.comp_ctx:
            _require_plain(writes, left)
        if not writes:
            return TransformResult(False, {"states": 0, "left": left})
        make = Maker(graph, "cache")
        plan = _Reads.prepare(graph, make, writes[0], self.comp_ctx)
        for write in writes:
            _rewrite(graph, make, write, plan)
        used = {node.op_type for node in graph if node.domain == DOMAIN}
        for name in sorted(used):
            function = onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>{_BODIES[name]}')
            made = ir.serde.deserialize_function(function)
            for number, inner in enumerate(made):  # a compiler that inlines it names the parts after the call and them
                inner.name = f"{inner.op_type}_{number}"
            model.functions[made.identifier()] = made
        graph.opset_imports[DOMAIN] = 1
        passes.RemoveUnusedNodesPass()(model)
        passes.TopologicalSortPass()(model)
        return TransformResult(True, {"states": len(writes), "functions": sorted(used), "left": left})


@dataclass(frozen=True)
class _Write:
    """A state [rows, heads, slots, dim] written at ``slots`` int64 [batch, seq]; ``readers`` read its new value."""

    node: ir.Node
    slots: ir.Value
    rows: ir.Value | None
    readers: tuple[ir.Value, ...]

    @property
    def read_as_zero(self) -> bool:
        """Whether slots nobody wrote must read as 0: values are multiplied by a weight of 0, and NaN times 0 is NaN.

        Keys need it too unless their scores are selected, as those of an ``Attention`` with a bool mask are.
        """
        users = [use.node for value in self.readers for use in value.uses()]
        return "value" in str(self.node.outputs[0].name) or not all(map(_selects_scores, users))


def _find_write(model: ir.Model, node: ir.Node) -> _Write | str:
    """How a state is written, proven by running its indices; words when it is written in another way."""
    data, indices, updates = node.inputs
    assert data is not None
    if not data.is_graph_input() or data.shape is None or len(data.shape) != 4 or updates is None:
        return "it is no state of four dimensions"
    maker = indices.producer() if indices is not None else None
    heads = data.shape[1]
    if (
        indices is None
        or maker is None
        or maker.op_type != "Concat"
        or len(maker.inputs) != 3
        or not isinstance(heads, int)
    ):
        return "its indices are not of row, head and slot"
    slots = _before_expansion(maker.inputs[2])
    rows = next((v for v in model.graph.inputs if v.name == "batch_index"), None)
    try:
        part = Part(model, [indices, slots])
    except ValueError as error:
        return str(error)
    known = {v.name for v in model.graph.inputs}
    if not set(part.inputs) <= known or "input_ids" in part.inputs:
        return "its indices depend on more than positions"
    sizes = {"batch_size": 2, "full_batch_size": 3, "seq_len": 4, "ctx_len": 16}
    feeds = {
        name: np.zeros(
            [sizes.get(str(d), 1) if not isinstance(d, int) else d for d in value.shape], value.dtype.numpy()
        )
        for name, value in part.inputs.items()
        if value.shape is not None and value.dtype is not None
    }
    feeds["position_ids"] = np.array([[3, 4, 5, -1], [0, 1, -1, -1]])
    feeds["batch_index"] = np.array([[2], [0]])
    found, at = part.run(feeds)
    row = np.arange(2) if rows is None else feeds["batch_index"][:, 0]
    parts = (row[:, None, None], np.arange(heads)[None, :, None], at[:, None, :] if at.ndim == 2 else at)
    expected = np.stack(np.broadcast_arrays(*parts), axis=-1)
    if at.shape != (2, 4) or not np.array_equal(found, expected):
        return "its indices are not of row, head and slot"
    new = node.outputs[0]
    readers = []
    for use in new.uses():
        reader = use.node
        if rows is None:
            readers = [new]
        elif reader.op_type == "Gather" and use.idx == 0 and reader.attributes["axis"].as_int() == 0:
            readers.append(reader.outputs[0])
        else:
            return "it is read other than by the rows of the batch"
    return _Write(node, slots, rows, tuple(readers))


def _selects_scores(node: ir.Node) -> bool:
    mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
    return mask is not None and mask.dtype == ir.DataType.BOOL


def _before_expansion(value: ir.Value | None) -> ir.Value:
    while value is not None and (node := value.producer()) is not None and node.op_type in ("Unsqueeze", "Expand"):
        value = node.inputs[0]
    assert value is not None
    return value


def _require_plain(writes: list[_Write], left: dict[str, str]) -> None:
    for write in writes:
        for value in write.readers:
            for use in value.uses():
                if use.node.op_type != "Attention" or use.idx not in (1, 2):
                    left[str(write.node.outputs[0].name)] = f"{use.node.op_type} reads it"
    if left or not writes:
        state, reason = next(iter(left.items()), ("the state", "there is none"))
        raise TransformError(
            f"compute context lengths are for models whose attention reads the whole KV state, "
            f"and of {state} {reason}: leave out ccl_enabled and comp_ctx_lengths."
        )


@dataclass(frozen=True)
class _Reads:
    """What all reads share: slots 0 … L-1 int64 [1, 1, L], their number, and which hold nothing for a row."""

    slots: ir.Value
    count: ir.Value
    invalid: ir.Value
    cut: ir.Value | None
    #: Mask -> its part for the slots that are read.
    masks: dict[ir.Value, ir.Value]

    @classmethod
    def prepare(cls, graph: ir.Graph, make: Maker, write: _Write, comp_ctx: bool) -> _Reads:
        state = write.node.inputs[0]
        assert state is not None
        if comp_ctx:
            asked = ir.Value(name=INPUT, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([ir.SymbolicDim(INPUT)]))
            graph.inputs.append(asked)
            count = make.op("Shape", asked)
        else:
            count = make.op("Shape", state, start=2, end=3)
        number = make.op("Squeeze", count, make.constant([0]))
        steps = make.op("Range", make.constant(0), number, make.constant(1))
        slots = make.op("Unsqueeze", steps, make.constant([0, 1]))
        positions = next(v for v in graph.inputs if v.name == "position_ids")
        last = make.op("ReduceMax", positions, make.constant([1]), keepdims=1)
        rows4 = make.op("Unsqueeze", last, make.constant([2, 3]))
        invalid = make.op("Greater", make.op("Unsqueeze", slots, make.constant([3])), rows4)
        # These depend on inputs alone, so they can stand at the front.
        graph.insert_before(graph[0], make.take())
        return cls(slots, count, invalid, count if comp_ctx else None, {})


def _rewrite(graph: ir.Graph, make: Maker, write: _Write, reads: _Reads) -> None:
    node, (data, _, updates) = write.node, write.node.inputs
    rows = [] if write.rows is None else [write.rows]
    end = "" if write.rows is None else "CB"
    old = node.outputs[0]
    name = str(old.name)
    new = make.op(f"CtxScatter{end}", data, *rows, write.slots, updates, like=old, domain=DOMAIN)
    read = make.op(f"CtxGather{end}", new, *rows, reads.slots, reads.count, domain=DOMAIN)
    if write.read_as_zero:
        read = make.op("Where", reads.invalid, make.constant(0, old.dtype or ir.DataType.FLOAT), read)
    _shape_of_read(read, old, reads)
    graph.insert_before(node, make.take())
    for value in write.readers:
        users = [use.node for use in value.uses()]
        value.replace_all_uses_with(read) if value is not old else _move(old, read)
        for user in users:
            if reads.cut is not None and user.op_type == "Attention":
                _cut_mask(graph, make, user, reads.cut, reads.masks)
    graph.outputs[list(graph.outputs).index(old)] = new
    graph.remove(node, safe=False)
    old.name = f"{name}/before"
    new.name = name


def _move(old: ir.Value, new: ir.Value) -> None:
    for use in list(old.uses()):
        use.node.replace_input_with(use.idx, new)


def _shape_of_read(read: ir.Value, state: ir.Value, reads: _Reads) -> None:
    if state.shape is None:
        return
    rows = state.shape[0] if str(state.shape[0]) == "batch_size" else ir.SymbolicDim("batch_size")
    length = state.shape[2] if reads.cut is None else ir.SymbolicDim(INPUT)
    read.type, read.shape = state.type, ir.Shape([rows, state.shape[1], length, state.shape[3]])


def _cut_mask(
    graph: ir.Graph, make: Maker, attention: ir.Node, count: ir.Value, made: dict[ir.Value, ir.Value]
) -> None:
    """The mask [batch, heads or 1, seq, slots] of an attention, for the slots that are read."""
    mask = attention.inputs[3]
    assert mask is not None
    if mask in made.values():
        return
    if mask not in made:
        cut = make.op("Slice", mask, make.constant([0]), count, make.constant([-1]))
        cut.type = mask.type
        if mask.shape is not None:
            cut.shape = ir.Shape([*mask.shape[:-1], ir.SymbolicDim(INPUT)])
        graph.insert_before(attention, make.take())
        made[mask] = cut
    attention.replace_input_with(3, made[mask])

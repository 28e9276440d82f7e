"""MXINT8State: keys and values are what is left of them when a card keeps them in MXINT8."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from QEfficient.errors import TransformError
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import RETAINED, Maker
from QEfficient.transforms.onnx.microscaling import BLOCK, MXINT8

_KV = "past_"
_WRITERS = ("ScatterND", "CtxScatter", "CtxScatterCB")
#: Exponents that the largest magnitude of a block of float16 numbers can have.
_LEAST, _MOST = -24, 15


@dataclass(frozen=True)
class MXINT8State(OnnxTransform):
    """Rounds keys and values where they are written, so that the retained state holds what MXINT8 gives back.

    Blocks of 32 lie along the last axis (the head's dimension; the last block may be shorter). What is decoded is
    rounded to float16, in which a card goes on computing. Run it after `RoundToFloat16`: the values written must be
    float16 numbers. Convolution and recurrent states stay.
    """

    name: ClassVar[str] = "MXINT8State"

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises TransformError when there is no KV state, or one that is written in an unknown way."""
        graph = model.graph
        make = Maker(graph, "mxint8")
        written = 0
        for value in list(graph.outputs):
            name = str(value.name)
            if not (name.startswith(_KV) and name.endswith(RETAINED)):
                continue
            node = value.producer()
            updates = node.inputs[-1] if node is not None else None
            if node is None or node.op_type not in _WRITERS or updates is None or updates.shape is None:
                raise TransformError(f"MXINT8State does not know how {name} is written: leave out mxint8_kv_cache.")
            width = updates.shape[-1]
            if not isinstance(width, int):
                raise TransformError(f"MXINT8State: the width of {name} is not known: leave out mxint8_kv_cache.")
            node.replace_input_with(len(node.inputs) - 1, _stored(make, updates, width))
            graph.insert_before(node, make.take())
            written += 1
        if not written:
            raise TransformError("MXINT8State: this model keeps no keys and values: leave out mxint8_kv_cache.")
        return TransformResult(True, {"states": written})


def _stored(make: Maker, x: ir.Value, width: int) -> ir.Value:
    """float32 [..., width] of float16 numbers -> what MXINT8 keeps of them, by the rules of `microscaling.encode`."""
    number = ir.DataType.FLOAT
    blocks, last = -(-width // BLOCK), make.constant([-1])
    padded = x
    if blocks * BLOCK > width:
        ends = make.constant([0] * 7 + [blocks * BLOCK - width])
        padded = make.op("Pad", x, ends)
    split = make.op("Reshape", padded, make.constant([0, 0, 0, blocks, BLOCK]))
    peak = make.op("ReduceMax", make.op("Abs", split), axes=[-1], keepdims=1)
    # How many powers of two the peak reaches is its exponent, exactly; a logarithm would be off by one next to them.
    powers = np.ldexp(np.float32(1), np.arange(_LEAST, _MOST + 1))
    below = make.op("Less", peak, make.constant(powers, number))
    count = make.op("Cast", make.op("Not", below), to=number.value)
    reached = make.op("ReduceSum", count, last, keepdims=1)
    # Nothing reached: a block of zeros, for which any scale will do.
    steps = np.concatenate([[1], np.ldexp(powers, -MXINT8.mantissa_bits)])
    step = make.op("Gather", make.constant(steps, number), make.op("Cast", reached, to=ir.DataType.INT64.value))
    most = make.constant(MXINT8.largest_code, number)
    whole = make.op("Round", make.op("Div", split, step))
    kept = make.op("Clip", whole, make.op("Neg", most), most)
    # 0 * infinity and 0 * NaN are NaN: added, they make the block NaN, and otherwise change nothing.
    spoiled = make.op("ReduceSum", make.op("Mul", split, make.constant(0, number)), last, keepdims=1)
    decoded = make.op("Add", make.op("Mul", kept, step), spoiled)
    flat = make.op("Reshape", decoded, make.constant([0, 0, 0, blocks * BLOCK]))
    if padded is not x:
        flat = make.op("Slice", flat, make.constant([0]), make.constant([width]), last)
    half = make.op("Cast", flat, to=ir.DataType.FLOAT16.value)
    half.type, half.shape = ir.TensorType(ir.DataType.FLOAT16), x.shape
    return make.op("Cast", half, to=number.value, like=x)

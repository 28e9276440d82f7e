"""Grouped matrix products of mixture-of-experts layers: unrolled for few experts, a loop over the hit ones for many."""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import FLOAT, INT32, script
from onnxscript import opset18 as op  # torch.onnx builds its graph in this one and converts it afterwards

#: Up to this many experts each gets nodes of its own: a runtime then packs their weights once. Beyond, nodes multiply
#: (128 experts x 48 layers would be 10^5) while a step only ever uses a few experts.
UNROLL_LIMIT = 16


@script(default_opset=op)
def _loop_over_hit_experts(x: FLOAT, weights: FLOAT, ends: INT32) -> FLOAT:
    """``out[r] = x[r] @ weights[expert of r]``; rows are sorted by expert, ``ends`` [E] are cumulative counts."""
    last = op.Cast(ends, to=7)
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_int=1)
    starts = op.Concat(zero, op.Slice(last, zero, op.Constant(value_ints=[-1])), axis=0)
    hits = op.Squeeze(op.NonZero(op.Sub(last, starts)), zero)
    parts = op.SequenceEmpty()
    for i in range(op.Size(hits)):
        expert = op.Gather(hits, i)
        rows = op.Range(op.Gather(starts, expert), op.Gather(last, expert), one)
        product = op.MatMul(op.Gather(x, rows), op.Gather(weights, expert))
        parts = op.SequenceInsert(parts, product)
    return op.ConcatFromSequence(parts, axis=0)


def grouped_products(
    unrolled: dict[Callable[..., Any], Callable[..., Any]],
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of torch's grouped matrix products; ``unrolled`` are transformers' own, used for few experts."""
    names = (
        torch.ops.aten._grouped_mm.default,
        torch.ops.transformers.grouped_mm_fallback.default,
    )
    return {name: _choose(unrolled[name]) for name in names if name in unrolled}


def _choose(unrolled: Callable[..., Any]) -> Callable[..., Any]:
    def translate(mat_a: Any, mat_b: Any, offs: Any, bias: Any = None, out_dtype: Any = None) -> Any:
        experts = mat_b.shape[0]
        if bias is None and out_dtype is None and isinstance(experts, int) and experts > UNROLL_LIMIT:
            return _loop_over_hit_experts(mat_a, mat_b, offs)
        return unrolled(mat_a, mat_b, offs, bias, out_dtype)

    return translate

"""AdamW as an ONNX graph of its own, so that a training package needs no torch to train."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from QEfficient.errors import OptionError

OPSET = 21
#: Vectors of a run, one element per trained number, and what it returns in their place.
VECTORS = ("parameter", "gradient", "exp_avg", "exp_avg_sq")
SCALARS = ("lr", "step", "weight_decay", "grad_norm", "max_norm")
RESULTS = {name: f"new_{name}" for name in VECTORS if name != "gradient"}


def adamw_graph(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> ir.Model:
    """One AdamW update with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101), as `torch.optim.AdamW`.

    The update is element-wise, so the graph knows nothing of the model: it takes vectors of any length, and whoever
    runs it passes the trained tensors flat, whole or in pieces.

    Inputs, float32: ``parameter``, ``gradient``, ``exp_avg``, ``exp_avg_sq`` [n]; 0-d ``lr``, ``step`` (from 1),
    ``weight_decay``, ``grad_norm`` (of all gradients together, before clipping) and ``max_norm``. Gradients are scaled
    by min(1, max_norm / (grad_norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does; ``max_norm`` of 0 or less, or
    infinity, leaves them alone.

    Outputs: ``new_parameter``, ``new_exp_avg``, ``new_exp_avg_sq`` [n]. Each may be bound to the memory of the input
    it replaces: every reader of an old value comes before the write of the new one.

    Raises:
        OptionError: a beta outside [0, 1) or an eps that is not above 0.
    """
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise OptionError(f"AdamW's betas must lie in [0, 1), got {beta1!r} and {beta2!r}.")
    if not eps > 0:
        raise OptionError(f"AdamW's eps must be above 0, got {eps!r}.")
    tape = ir.tape.Tape()
    single, double = ir.DataType.FLOAT, ir.DataType.DOUBLE
    p, g, m, v = (ir.val(name, single, ["elements"]) for name in VECTORS)
    lr, step, weight_decay, grad_norm, max_norm = (ir.val(name, single, []) for name in SCALARS)

    def op(kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return tape.op(kind, inputs, attributes)

    def number(value: float, dtype: ir.DataType = single) -> ir.Value:
        name = f"c{len(tape.initializers)}"
        return tape.initializer(ir.tensor(np.asarray(value, dtype.numpy()), name=name))

    def to(value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return op("Cast", value, to=dtype.value)

    one, zero = number(1), number(0)
    allowed = op("Min", one, op("Div", max_norm, op("Add", grad_norm, number(1e-6))))
    clip = op("Where", op("Greater", max_norm, zero), allowed, one)
    # In float32 the first steps' 1 - beta2^step would be wrong in the fifth digit.
    count, whole = to(step, double), number(1, double)
    correction1 = op("Sub", whole, op("Pow", number(beta1, double), count))
    root2 = op("Sqrt", op("Sub", whole, op("Pow", number(beta2, double), count)))
    rate = to(op("Div", op("Mul", to(lr, double), root2), correction1), single)
    floor = to(op("Mul", number(eps, double), root2), single)

    clipped = op("Mul", g, clip)
    new_m = op("Add", op("Mul", m, number(beta1)), op("Mul", clipped, number(1 - beta1)))
    new_v = op("Add", op("Mul", v, number(beta2)), op("Mul", op("Mul", clipped, clipped), number(1 - beta2)))
    # lr / c1 * m / (sqrt(v) / sqrt(c2) + eps), with sqrt(c2) moved to the scalars.
    update = op("Mul", op("Div", new_m, op("Add", op("Sqrt", new_v), floor)), rate)
    kept = op("Mul", p, op("Sub", one, op("Mul", lr, weight_decay)))
    outputs = [op("Sub", kept, update), new_m, new_v]
    for value, name in zip(outputs, RESULTS.values(), strict=True):
        value.name, value.type, value.shape = name, ir.TensorType(single), ir.Shape(["elements"])
    graph = ir.Graph(
        [p, g, m, v, lr, step, weight_decay, grad_norm, max_norm],
        outputs,
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": OPSET},
        name="adamw",
    )
    return ir.Model(graph, ir_version=10, producer_name="QEfficient")

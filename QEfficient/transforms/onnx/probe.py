"""Runs a part of a graph on chosen inputs: a transform that replaces a part can so prove what that part computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from QEfficient.transforms.onnx.graph import ancestors

#: A part that reads more than this from the weights is no formula of positions, and not worth running.
_MOST_BYTES = 1 << 20


class Part:
    """The nodes between some values of a graph and others, as an ONNX Runtime session.

    Args:
        model: not changed.
        outputs: what to compute.
        cut: values to be fed although nodes of the graph compute them.

    Raises:
        ValueError: the part reads large weights.
    """

    def __init__(self, model: ir.Model, outputs: Sequence[ir.Value], cut: Sequence[ir.Value] = ()) -> None:
        nodes = ancestors(outputs, lambda value: value in cut)
        read = {v for node in nodes for v in node.inputs if v is not None} | set(outputs)
        weights = [v.const_value for v in read if v.is_initializer() and v.const_value is not None]
        if sum(tensor.nbytes for tensor in weights) > _MOST_BYTES:
            raise ValueError("it reads large weights")
        own = {v for node in nodes for v in node.outputs}
        fed = [v for v in read if v in cut or (v not in own and not v.is_initializer())]
        part = ir.convenience.extract(model.graph, fed, list(outputs))
        copy = ir.Model(part, ir_version=model.ir_version)
        copy.graph.opset_imports.update(model.graph.opset_imports)
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        self._session = ort.InferenceSession(
            ir.to_proto(copy).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {str(value.name): value for value in fed}

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs; of ``feeds`` only what the part reads is used."""
        return list(self._session.run(None, {n: a for n, a in feeds.items() if n in self.inputs}))


def positional_values(graph: ir.Graph) -> set[ir.Value]:
    """Values that depend on positions, shapes and constants only, not on tokens, weights in files or state."""
    found = {value for value in graph.inputs if value.name == "position_ids"}
    found |= {v for v in graph.initializers.values() if v.const_value is not None and v.const_value.size <= 1 << 14}
    for node in graph:
        if node.op_type in ("Shape", "Size") or all(v is None or v in found for v in node.inputs):
            found.update(node.outputs)
    return found

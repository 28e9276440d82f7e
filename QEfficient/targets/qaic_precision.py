"""Node precision files: which nodes the compiler keeps in another precision, named by their first output tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean
from QEfficient.targets.given_file import NORMS

if TYPE_CHECKING:
    import onnx_ir as ir

NODE_PRECISION = "node_precision.yaml"
_FP32 = "FP32NodeInstanceNames"


def node_precision(asked: Mapping[str, Sequence[str]] | str, model: ir.Model) -> dict[str, list[str]]:
    """The lists to write, every name that of a node's first output in this graph.

    Raises:
        OptionError: a name is that of no node, or ``"norms"`` was asked for and the graph has no normalisation.
    """
    firsts = [str(node.outputs[0].name) for node in model.graph if node.outputs]
    if asked == NORMS:
        names = _normalisations(model)
        if not names:
            raise OptionError("node_precision_info='norms': this graph has no normalisation, leave it out.")
        return {_FP32: names}
    assert isinstance(asked, Mapping)
    known = set(firsts)
    for key, wanted in asked.items():
        for name in wanted:
            if name not in known:
                raise OptionError(
                    f"node_precision_info: {key} lists {name!r}, which is the first output of no node of this graph."
                    f"{did_you_mean(name, known)}"
                )
    return {key: list(names) for key, names in asked.items()}


def node_precision_text(lists: Mapping[str, Sequence[str]]) -> str:
    """``KEY: [name, name]``, a line for each key."""
    return "".join(f"{key}: [{', '.join(names)}]\n" for key, names in lists.items())


def _normalisations(model: ir.Model) -> list[str]:
    """Square, mean, epsilon, root: the chain whose squares leave the range of float16 first."""
    names: list[str] = []
    for node in model.graph:
        if node.op_type in ("LayerNormalization", "InstanceNormalization"):
            names.append(str(node.outputs[0].name))
        if node.op_type != "ReduceMean":
            continue
        chain: list[Any] = [node]
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        squares = before is not None and (
            before.op_type == "Pow" or (before.op_type == "Mul" and before.inputs[0] is before.inputs[1])
        )
        if not squares:
            continue
        chain = [before, node]
        for wanted in ("Add", "Sqrt", "Reciprocal"):
            following = [use.node for use in chain[-1].outputs[0].uses() if use.node.op_type == wanted]
            chain += following[:1]
        names += [str(part.outputs[0].name) for part in chain]
    return names

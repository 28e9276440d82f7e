"""Node precision files: which nodes the compiler keeps in another precision, named by their first output tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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
    from QEfficient.transforms.onnx.normalisations import normalisation_nodes

    firsts = [str(node.outputs[0].name) for node in model.graph if node.outputs]
    if asked == NORMS:
        names = [str(node.outputs[0].name) for node in normalisation_nodes(model.graph)]
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

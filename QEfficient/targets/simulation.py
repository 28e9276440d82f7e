"""The host computing as a card would: the card's own graph, with every number rounded as its formats say."""

from __future__ import annotations

from QEfficient.errors import OptionError
from QEfficient.targets import cloud_graph
from QEfficient.targets.given_file import NORMS
from QEfficient.targets.options import CompileOptions


def normalise(options: CompileOptions) -> CompileOptions:
    """The card's graph is run as it is: the host's own operators and layouts would compute otherwise."""
    return options.replace(fuse=False, prepack=False)


def transforms(options: CompileOptions, task: str) -> tuple[str, ...]:
    """The transforms that make the card's graph, and after them those that round.

    What only shapes the card's program (drafts, shorter contexts, partitions) is left out: numbers do not depend on it.

    Raises:
        OptionError: a training step, which this does not simulate.
    """
    if task == "training":
        raise OptionError("simulate is for inference: compile a training step without it.")
    queue = cloud_graph.transforms(CompileOptions(ctx_len=options.ctx_len), task)
    if options.mxfp6_matmul:
        queue += ("MXFP6Weights",)
    queue += (f"RoundToFloat16:keep_norms={str(options.node_precision_info == NORMS).lower()}",)
    if options.mxint8_kv_cache:
        queue += ("MXINT8State",)
    return queue

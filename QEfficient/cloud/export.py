"""``python -m QEfficient.cloud.export``: export a causal model to ONNX, as ``qefficient export`` does.

Example:
    python -m QEfficient.cloud.export --model-name gpt2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from QEfficient.cli.user_errors import user_errors
from QEfficient.cloud.arguments import CloudParser, add_model, positive, verbose
from QEfficient.cloud.checkpoint import causal_model


def main(arguments: Sequence[str]) -> None:
    """Runs one command line (without the program's name)."""
    parser = CloudParser("export", "Export a causal language model to ONNX and print the path of model.onnx.")
    add_model(parser)
    parser.add_argument(
        "--full-batch-size", type=positive, help="give the graph the input that continuous batching needs"
    )
    parser.add_argument("--mxint8-kv-cache", "--mxint8", action="store_true", help="no effect: decided by compile")
    with user_errors(verbose(arguments)):
        values = parser.read(arguments)
        if values.mxint8_kv_cache:
            print("note: --mxint8-kv-cache has no effect on an export; pass it to compile.", file=sys.stderr)
        print(causal_model(values, continuous_batching=values.full_batch_size is not None).export())


if __name__ == "__main__":
    main(sys.argv[1:])

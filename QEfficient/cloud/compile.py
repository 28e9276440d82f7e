"""``python -m QEfficient.cloud.compile``: compile an exported graph, as ``qefficient compile`` does.

Example:
    python -m QEfficient.cloud.compile --onnx-path export/model.onnx --qpc-path ./package --ctx-len 512
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from QEfficient.cli.compile import summarize
from QEfficient.cli.user_errors import user_errors
from QEfficient.cloud.arguments import CloudParser, add_compile, compile_options, verbose


def main(arguments: Sequence[str]) -> None:
    """Runs one command line (without the program's name)."""
    parser = CloudParser("compile", "Compile the model.onnx that export printed; prints the package's path.")
    parser.add_argument("--onnx-path", type=Path, required=True, help="the model.onnx that export printed")
    parser.add_argument("--qpc-path", type=Path, help="new directory for a copy of the package")
    add_compile(parser)
    with user_errors(verbose(arguments)):
        values = parser.read(arguments)
        options = compile_options(values)

        from QEfficient.api import compile

        package = compile(values.onnx_path, values.qpc_path, **options.to_json())
        summarize(package)
        print(package)


if __name__ == "__main__":
    main(sys.argv[1:])

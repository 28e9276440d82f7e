"""``python -m QEfficient.cloud.infer``: compile a causal model and generate text, as ``qefficient infer`` does.

Example:
    python -m QEfficient.cloud.infer --model-name gpt2 --prompt "My name is|The sun" --ctx-len 128 --num-cores 16
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from QEfficient.cli.answers import answer, streams
from QEfficient.cli.user_errors import user_errors
from QEfficient.cloud.arguments import (
    CloudParser,
    add_compile,
    add_model,
    add_prompts,
    compile_options,
    prompts,
    verbose,
)
from QEfficient.cloud.checkpoint import causal_model


def main(arguments: Sequence[str]) -> None:
    """Runs one command line (without the program's name)."""
    parser = CloudParser("infer", "Compile a causal language model and generate text.")
    for add in (add_model, add_prompts, add_compile):
        add(parser)
    with user_errors(verbose(arguments)):
        values = parser.read(arguments)
        texts, options = prompts(values), compile_options(values)
        package_path = causal_model(values).compile(**options.to_json())

        from QEfficient.engine.package import open_package

        # Compiling has just checked or written every file.
        with open_package(package_path, verify=False) as package:
            settings = {} if values.generation_len is None else {"max_new_tokens": values.generation_len}
            live = streams(texts, None, as_json=False)
            answer(package, texts, chat=False, settings=settings, stream=live, as_json=False)


if __name__ == "__main__":
    main(sys.argv[1:])

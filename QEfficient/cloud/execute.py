"""``python -m QEfficient.cloud.execute``: run a compiled package, as ``qefficient execute`` does.

Example:
    python -m QEfficient.cloud.execute --qpc-path ./package --prompt "My name is" --generation-len 32
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from QEfficient.cli.answers import answer, streams
from QEfficient.cli.opening import expect_task
from QEfficient.cli.user_errors import user_errors
from QEfficient.cloud.arguments import CloudParser, add_device_group, add_model, add_prompts, positive, prompts, verbose

#: Flags that efficient-transformers needs and a package answers itself.
_IDLE = (
    "model_name",
    "local_model_dir",
    "cache_dir",
    "hf_token",
    "trust_remote_code",
    "device_group",
    "full_batch_size",
)


def main(arguments: Sequence[str]) -> None:
    """Runs one command line (without the program's name)."""
    parser = CloudParser("execute", "Generate text with a compiled package; it brings its own tokenizer.")
    parser.add_argument("--qpc-path", type=Path, required=True, help="the directory that compile printed")
    add_prompts(parser)
    add_model(parser, required=False)
    add_device_group(parser)
    parser.add_argument("--full-batch-size", type=positive, help="no effect: the package knows it")
    with user_errors(verbose(arguments)):
        values = parser.read(arguments)
        texts = prompts(values)
        from QEfficient.cli.compile_flags import device_ids
        from QEfficient.engine.package import open_package
        from QEfficient.targets.manifest import Manifest

        on_card = Manifest.load(values.qpc_path).target != "host"
        devices = device_ids(values.device_group) if on_card and values.device_group else None
        without = [name for name in _IDLE if getattr(values, name) and not (on_card and name == "device_group")]
        idle = [f"--{name.replace('_', '-')}" for name in without]
        if idle:
            print(f"note: without effect, the package knows it: {', '.join(idle)}.", file=sys.stderr)

        with expect_task(open_package(values.qpc_path, device_ids=devices), "text-generation") as package:
            settings = {} if values.generation_len is None else {"max_new_tokens": values.generation_len}
            live = streams(texts, None, as_json=False)
            answer(package, texts, chat=False, settings=settings, stream=live, as_json=False)


if __name__ == "__main__":
    main(sys.argv[1:])

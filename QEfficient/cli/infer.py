"""``qefficient infer``: generate text."""

from __future__ import annotations

from QEfficient.cli.answers import Stream, answer, streams
from QEfficient.cli.common import AsJson, CacheDir, Model, Threads, Transforms, TrustRemoteCode
from QEfficient.cli.compile_flags import ShapeFlags, TargetFlags, asked
from QEfficient.cli.opening import open_model
from QEfficient.cli.text_flags import GenerationFlags, PromptFlags


def infer(
    model: Model,
    prompts: PromptFlags,
    generation: GenerationFlags,
    shapes: ShapeFlags,
    target: TargetFlags,
    transform: Transforms = None,
    stream: Stream = None,
    as_json: AsJson = False,
    threads: Threads = None,
    cache_dir: CacheDir = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generates text with a causal language model.

    A checkpoint is exported and compiled first; the next run finds the package in the cache.
    The text goes to stdout, the speed to stderr.

    [bold]Examples[/bold]

    qefficient infer ./my-model --prompt "The capital of France is" --generation-len 32
    qefficient infer org/chat-model --message "Tell me a joke" --sample --temperature 0.7 --seed 1
    qefficient infer ./my-package --prompts-file prompts.txt --json > answers.json
    """
    texts, settings, options = prompts.read(), generation.settings(), asked(shapes, target)
    live = streams(texts, stream, as_json)
    with open_model(
        model,
        "text-generation",
        options,
        transforms=transform or (),
        pooling=None,
        trust_remote_code=trust_remote_code,
        cache_dir=cache_dir,
        threads=threads,
    ) as package:
        answer(package, texts, chat=prompts.chat, settings=settings, stream=live, as_json=as_json)

"""The worker's half of the protocol: what an engine must do, and the loop that serves it.

A worker is a process with its own interpreter, so that engines whose dependencies exclude each other run side by side.
It needs the standard library and numpy, and is started in one of four ways:

    python llama_worker.py                    serves commands: one JSON object a line on stdin, one answer on stdout
    python llama_worker.py --versions         prints the versions of what is measured; fails when it is not installed
    python llama_worker.py --convert '{...}'  makes the engine's files from a checkpoint, prints where and how large
    python llama_worker.py --cold '{...}'     loads, makes one token, prints it: a start from nothing

Commands, and what the answer holds besides ``peak_mb`` (the largest resident memory of the process so far, in MB):

    {"do": "load", "model": path, "precision": "int4", "threads": 2, "context": 640}   -> seconds, float_bytes
    {"do": "generate", "ids": [...], "new": 64}        -> prefill_s, decode_s, tokens (1 + new)
    {"do": "embed", "texts": [...], "batch": 32, "out": "vectors.npy"}    -> seconds
    {"do": "logits", "windows": [[...]], "prompt": 128, "out": "logits.npy"}
        -> seconds; the file holds float32 [window, position from prompt on, vocabulary]
    {"do": "exit"}

Times are taken here with `time.perf_counter`. A command that fails answers {"error": one line}.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

Message = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """How to load a model.

    Attributes:
        model: what `Engine.convert` made.
        precision: of the weights, as the contender names it.
        threads: threads an engine may use.
        context: tokens there must be room for.
    """

    model: str
    precision: str
    threads: int
    context: int


class Engine:
    """One engine. Subclasses import their library in the methods, so that a worker starts quickly."""

    #: Distributions whose versions the report states; the first one is the engine itself.
    distributions: tuple[str, ...] = ()

    @classmethod
    def convert(cls, source: Path, destination: Path, precision: str) -> Path:
        """Makes the engine's own files from a Hugging Face checkpoint; returns what `load` takes."""
        return source

    @classmethod
    def weight_bytes(cls, model: Path) -> int:
        """Bytes of weights that a decode step reads: of the files, without tokenizer and graph where they count."""
        return tree_bytes(model)

    def load(self, setup: Setup) -> Message | None:
        """Makes the model ready to run; what it returns is added to the answer.

        An engine that keeps float weights in another type than the files' says so: ``{"float_bytes": 2}``.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot load models")

    def first(self, ids: list[int]) -> int:
        """The most likely token after a prompt, with the prompt's state kept for `next`."""
        raise NotImplementedError(f"{type(self).__name__} does not generate text")

    def next(self, token: int) -> int:
        """The most likely token after one more token."""
        raise NotImplementedError(f"{type(self).__name__} does not generate text")

    def generate(self, ids: list[int], new: int) -> Message:
        """Prefill and decode, timed from the call to the first token and from there to the last."""
        began = time.perf_counter()
        tokens = [self.first(ids)]
        prefilled = time.perf_counter()
        for _ in range(new):
            tokens.append(self.next(tokens[-1]))
        ended = time.perf_counter()
        return {"prefill_s": prefilled - began, "decode_s": ended - prefilled, "tokens": tokens}

    def embed(self, texts: list[str], batch: int) -> Any:
        """One vector per text: float32 [texts, size]."""
        raise NotImplementedError(f"{type(self).__name__} does not embed texts")

    def logits(self, window: list[int], prompt: int) -> Any:
        """Logits of a text that is given, not generated: float32 [len(window) - prompt, vocabulary].

        The first ``prompt`` tokens go in as a prompt does; row i belongs to token ``prompt + i`` and says what follows
        it. An engine that computes prompts and single tokens in the same way may feed the whole window at once.
        """
        raise NotImplementedError(f"{type(self).__name__} does not give logits")


def versions(engine: type[Engine]) -> dict[str, str]:
    """Versions of the engine's distributions; PackageNotFoundError when it is not installed."""
    return {name: importlib.metadata.version(name) for name in engine.distributions}


def tree_bytes(path: Path) -> int:
    """Size of a file, or of all files in a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def memory_mb(key: str = "VmHWM") -> float | None:
    """A memory figure of this process in MB (10^6 bytes); None where the kernel does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith(key))
    except (OSError, StopIteration):
        return None


def main(engine: type[Engine]) -> None:
    """What a worker script calls."""
    answers = _take_stdout()
    mode, argument = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2] if len(sys.argv) > 2 else "{}"
    if mode == "--versions":
        _say(answers, versions(engine))
    elif mode == "--convert":
        _say(answers, _convert(engine, json.loads(argument)))
    elif mode == "--cold":
        _cold(engine, json.loads(argument), answers)
    elif not mode:
        _serve(engine(), answers)
    else:
        sys.exit(f"unknown argument {mode}: see the description at the top of {Path(__file__).name}")


def _take_stdout() -> TextIO:
    """The real stdout, kept for answers alone: what libraries print there goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, message: Message) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _convert(engine: type[Engine], command: Message) -> Message:
    destination = Path(command["destination"])
    destination.parent.mkdir(parents=True, exist_ok=True)
    model = engine.convert(Path(command["source"]), destination, command["precision"])
    sizes = {"bytes": tree_bytes(model), "weight_bytes": engine.weight_bytes(model)}
    return {"model": str(model), **sizes, "peak_mb": _peak_with_children()}


def _peak_with_children() -> float | None:
    """Peak memory of this process or of the largest it started; some converters are command lines of their own.

    Not what the parent would learn from ``wait4``: that counts the parent's own size before the program was loaded.
    """
    own = memory_mb()
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    return None if own is None else max(own, children)


def _cold(engine: type[Engine], command: Message, answers: TextIO) -> None:
    running = engine()
    running.load(_setup(command))
    token = running.first(command["ids"])
    _say(answers, {"first_token": token})
    _say(answers, {"peak_mb": memory_mb()})
    # Tearing down is not part of what is measured, and some runtimes take their time over it.
    os._exit(0)


def _serve(engine: Engine, answers: TextIO) -> None:
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "exit":
            break
        try:
            answer = _answer(engine, command)
        # Every engine raises its own kinds of errors, and one that fails must not end the whole run.
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        _say(answers, {**answer, "peak_mb": memory_mb()})
    os._exit(0)


def _answer(engine: Engine, command: Message) -> Message:
    what = command["do"]
    began = time.perf_counter()
    if what == "load":
        facts = engine.load(_setup(command)) or {}
        return {"seconds": time.perf_counter() - began, **facts}
    if what == "generate":
        return engine.generate(command["ids"], command["new"])
    if what == "embed":
        vectors = engine.embed(command["texts"], command["batch"])
        elapsed = time.perf_counter() - began
        _save(command.get("out"), vectors)
        return {"seconds": elapsed}
    if what == "logits":
        _save(command["out"], [engine.logits(window, command["prompt"]) for window in command["windows"]])
        return {"seconds": time.perf_counter() - began}
    raise ValueError(f"unknown command {what!r}")


def _setup(command: Message) -> Setup:
    return Setup(command["model"], command["precision"], command["threads"], command["context"])


def _save(path: str | None, arrays: Any) -> None:
    if path is not None:
        import numpy as np

        np.save(path, np.asarray(arrays, dtype=np.float32))

"""The harness's half of the protocol: worker processes, one command at a time, with a limit on its time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, Any]
#: Seconds after which a worker that does not answer counts as hung.
LIMIT = 1800.0
#: Environment variables through which libraries are told how many threads to use.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


class PeerError(Exception):
    """An engine failed; the message is one line for the report."""


@dataclass(frozen=True)
class Launch:
    """How to start the workers of one engine.

    Attributes:
        command: interpreter and script.
        log: where the error output of all its workers goes.
    """

    command: tuple[str, ...]
    log: Path
    threads: int
    settings: tuple[tuple[str, str], ...] = ()

    def environment(self) -> dict[str, str]:
        """Ours, with the number of threads, without the network, and without paths of our own packages."""
        own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        threads = dict.fromkeys(_THREADS, str(self.threads))
        return own | threads | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} | dict(self.settings)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            try:
                return subprocess.Popen(
                    [*self.command, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,  # so that a line is not in a buffer here while `select` waits for it
                    env=self.environment(),
                )
            except OSError as error:
                raise PeerError(f"{self.command[0]} cannot be started: {error.strerror}") from None


class Worker:
    """A running worker. Everything but `ask` leaves it idle."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.process = launch.start()
        #: Largest resident memory it has reported, MB.
        self.peak_mb: float | None = None

    def ask(self, limit: float = LIMIT, **command: Any) -> Message:
        """Sends a command and returns the answer.

        Raises:
            PeerError: the engine failed, ended or hung; in the last two cases the worker is gone.
        """
        pipe = self.process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError):  # it has ended; reading says how
            pipe.write(json.dumps(command).encode() + b"\n")
        answer = read_answer(self.process, self.launch.log, limit)
        self.peak_mb = answer.get("peak_mb") or self.peak_mb
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the worker, by force when it does not end by itself."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b'{"do": "exit"}\n')
            self.process.stdin.close()
            self.process.wait(20)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()


def read_answer(process: subprocess.Popen[bytes], log: Path, limit: float) -> Message:
    """The next line of a worker; PeerError when there is none within ``limit`` seconds."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], limit)
    if not ready:
        process.kill()
        process.wait()
        raise PeerError(f"no answer after {limit:.0f} s")
    line = process.stdout.readline()
    if not line:
        code = process.wait()
        raise PeerError(f"the worker ended with code {code}: {last_line(log)}")
    try:
        answer: Message = json.loads(line)
    except ValueError:
        raise PeerError(f"an answer that is not JSON: {line[:100]!r}") from None
    return answer


def last_line(log: Path) -> str:
    """What a failed worker said last."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        return "no error output"
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no error output")


def one_answer(launch: Launch, *arguments: str, limit: float = LIMIT) -> Message:
    """Runs a worker that gives one answer and ends, such as ``--convert``; adds the ``seconds`` it took in all."""
    began = time.perf_counter()
    process = launch.start(*arguments)
    answer = read_answer(process, launch.log, limit)
    assert process.stdin is not None
    process.stdin.close()
    code = process.wait()
    if code:
        raise PeerError(f"the worker ended with code {code}: {last_line(launch.log)}")
    return {**answer, "seconds": time.perf_counter() - began}


def cold_start(launch: Launch, setup: Message, ids: Sequence[int], limit: float = LIMIT) -> tuple[float, float]:
    """(seconds from starting a process to its first token, its peak memory in MB)."""
    command = json.dumps({**setup, "ids": list(ids)})
    began = time.perf_counter()
    process = launch.start("--cold", command)
    read_answer(process, launch.log, limit)
    elapsed = time.perf_counter() - began
    peak = read_answer(process, launch.log, limit)["peak_mb"]
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
    return elapsed, peak

"""Runs a vendor's command-line tool: both its streams in a log, a time limit, one sentence when it fails."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from QEfficient.errors import QEfficientError

#: The log's name in a finished package.
LOG = "compiler.log"
#: What a compiler that knows only the flat form of specializations.json says about the named form.
_NAMED_FORM = "type must be string, but is object"


def run_tool(command: Sequence[str], directory: Path, *, time_limit: float | None = None) -> None:
    """Runs ``command`` in ``directory`` and appends what it writes to ``compiler.log`` there.

    A package directory that fails is removed, so the log of a failure is kept in the temporary directory and named in
    the error.

    Args:
        time_limit: seconds; the tool and what it started are killed then.

    Raises:
        QEfficientError: it could not be started, failed, was killed, or took too long.
    """
    log = directory / LOG
    name = Path(command[0]).name
    with log.open("ab") as stream:
        stream.write(f"$ {' '.join(command)}\n".encode())
        stream.flush()
        start = stream.tell()
        try:
            process = subprocess.Popen(
                command, cwd=directory, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
            )
        except OSError as error:
            raise QEfficientError(f"{command[0]} cannot be started ({error.strerror}): reinstall its SDK.") from None
        try:
            code = process.wait(time_limit)
        except subprocess.TimeoutExpired:
            _kill(process)
            raise QEfficientError(
                f"{name} was stopped after {time_limit:g} seconds: raise compile_timeout, or see its log {_kept(log)}."
            ) from None
        except BaseException:  # a Ctrl-C must not leave a compiler running for hours
            _kill(process)
            raise
    if code < 0:
        raise QEfficientError(
            f"{name} was killed ({signal.Signals(-code).name}), perhaps for want of memory: see its log {_kept(log)}."
        )
    if code != 0:
        with log.open("rb") as stream:
            stream.seek(start)
            lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1][:300].rstrip(".") if lines else "it said nothing"
        hint = ""
        if any(_NAMED_FORM in line for line in lines):
            hint = "; this compiler takes the older form of specializations.json, pass sdk_profile='1.21'"
        raise QEfficientError(f"{name} stopped with exit code {code}: {last}{hint}; its log is {_kept(log)}.")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _kept(log: Path) -> Path:
    """A copy of the log that outlives the package."""
    handle, kept = tempfile.mkstemp(prefix="qefficient-", suffix=".log")
    os.close(handle)
    shutil.copyfile(log, kept)
    return Path(kept)

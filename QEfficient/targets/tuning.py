"""How a package runs fastest on this machine, as `qefficient tune` measured it, kept in the cache directory."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3

from QEfficient.errors import ArtifactWriteError
from QEfficient.store.files import replacing
from QEfficient.store.home import cache_home
from QEfficient.targets.manifest import Manifest

DIRECTORY = "tuning"


@dataclass(frozen=True)
class Tuning:
    """What the host can choose when it opens a package.

    Attributes:
        threads: threads of one program.
        spinning: threads wait busily for the next operator instead of going to sleep.
        pinned: each thread stays on one core.
        chunk: tokens per step of a prompt, or per call of an encoder's texts; None takes what the package was compiled
            for, or the encoder's default.
    """

    threads: int
    spinning: bool = True
    pinned: bool = False
    chunk: int | None = None

    def __str__(self) -> str:
        words = [f"{self.threads} thread{'s' if self.threads > 1 else ''}", "spinning" if self.spinning else "sleeping"]
        words += ["pinned"] * self.pinned
        words += [f"{self.chunk} tokens per step"] if self.chunk else []
        return ", ".join(words)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def recall(manifest: Manifest, cores: int) -> Tuning | None:
    """What was measured for this package on this machine with so many cores; None when nothing was."""
    try:
        path = _path(manifest, cores)
        values = json.loads(path.read_text(encoding="utf-8"))
        found = Tuning(**values)
    except (ArtifactWriteError, OSError, ValueError, TypeError):
        return None
    right = isinstance(found.threads, int) and 1 <= found.threads <= cores and isinstance(found.spinning, bool)
    return found if right and isinstance(found.pinned, bool) and isinstance(found.chunk, int | None) else None


def remember(manifest: Manifest, cores: int, tuning: Tuning) -> Path:
    """Writes the choice for the next time the package is opened here.

    Raises:
        ArtifactWriteError: the cache directory cannot be written.
    """
    path = _path(manifest, cores)
    with replacing(path, "the tuning of a package") as temporary:
        path.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(asdict(tuning)), encoding="utf-8")
    return path


def forget(manifest: Manifest, cores: int) -> bool:
    """Removes the choice; returns whether there was one."""
    path = _path(manifest, cores)
    existed = path.is_file()
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return existed


def _path(manifest: Manifest, cores: int) -> Path:
    """One file for a package, a kind of processor, a number of cores and a version of ONNX Runtime."""
    about = json.dumps([manifest.key, manifest.files.get(manifest.program, ""), processor(), cores], default=str)
    name = blake3(f"{about}{manifest.libraries.get('onnxruntime')}".encode()).hexdigest()[:32]
    return cache_home() / DIRECTORY / f"{name}.json"


def processor() -> str:
    """The processor's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{platform.machine()} {platform.processor()}"

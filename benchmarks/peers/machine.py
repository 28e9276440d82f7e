"""What the numbers were measured on: processor, memory, versions, and how fast memory can be read."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from QEfficient.targets.tuning import available_cores

#: Much larger than any cache.
_BYTES = 400_000_000
_REPEATS = 3


class Bandwidth:
    """Measures how fast this machine reads memory now; GB/s, 10^9 bytes.

    Each thread reads its part of one large array, in two ways: which of them a processor does faster differs. The best
    of a few repetitions counts, for a ceiling is asked for.
    """

    def __init__(self, threads: int) -> None:
        self._parts = np.array_split(np.ones(_BYTES // 4, np.float32), threads)

    def measure(self) -> float:
        ways: tuple[Callable[[np.ndarray], Any], ...] = (lambda part: np.dot(part, part), lambda part: part.sum())
        return max(self._read(way) for way in ways for _ in range(_REPEATS))

    def _read(self, way: Callable[[np.ndarray], Any]) -> float:
        threads = [threading.Thread(target=way, args=(part,)) for part in self._parts]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(part.nbytes for part in self._parts) / (time.perf_counter() - began) / 1e9


def describe() -> dict[str, Any]:
    """The machine, for the report."""
    return {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "flags": _flags(),
        "cores": available_cores(),
        "memory_gb": round(_kilobytes("MemTotal") * 1024 / 1e9, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
    }


def available_mb() -> float:
    """Memory that can be had without swapping, MB; plenty where the kernel does not say."""
    return _kilobytes("MemAvailable") * 1024 / 1e6 or float("inf")


def resident_mb(process: int) -> float:
    """Memory that a process has now, mapped files included, MB; 0 where the kernel does not say."""
    line = _line(f"/proc/{process}/status", "VmRSS")
    return float(line.split()[0]) * 1024 / 1e6 if line else 0.0


def _flags() -> list[str]:
    """The processor's instructions that matrix products are faster with."""
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "i8mm", "sve")
    present = set((_line("/proc/cpuinfo", "flags") or _line("/proc/cpuinfo", "Features")).split())
    return [flag for flag in known if flag in present]


def _kilobytes(key: str) -> float:
    line = _line("/proc/meminfo", key)
    return float(line.split()[0]) if line else 0.0


def _line(path: str, key: str) -> str:
    """What follows the colon in the first line that begins with ``key``."""
    try:
        with open(path, encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith(key))
    except (OSError, StopIteration):
        return ""

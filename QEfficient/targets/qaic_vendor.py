"""The Python modules of the Cloud AI Platform SDK: where they are, what is missing, importing them."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from QEfficient.errors import TargetUnavailableError

RUNTIME, MESSAGES = "qaicrt", "QAicApi_pb2"
HOW_TO_GET = "install the Cloud AI Platform SDK (https://quic.github.io/cloud-ai-sdk-pages)"
#: Seconds the SDK's device listing may take.
_LISTING = 10


@dataclass(frozen=True)
class Vendor:
    """The imported modules.

    Attributes:
        qaicrt: contexts, queues, programs and buffers.
        messages: the protobuf messages a program describes its inputs and outputs with.
        stand_in: whether these are a stand-in's, which runs no card.
    """

    qaicrt: Any
    messages: Any
    stand_in: bool


def _places(root: Path) -> dict[str, Path]:
    return {RUNTIME: root / "dev" / "lib" / platform.machine(), MESSAGES: root / "dev" / "python"}


def missing_modules(root: Path) -> list[str]:
    """One phrase for each module that Python does not find under the SDK's root."""
    phrases = []
    for name, place in _places(root).items():
        if importlib.machinery.PathFinder.find_spec(name, [str(place)]) is not None:
            continue
        others = sorted(path.name for path in place.glob(f"{name}*"))
        if others:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            phrases.append(f"{others[0]} in {place} is not for Python {version} on {platform.machine()}")
        else:
            phrases.append(f"{name} is not in {place}")
    return phrases


def import_vendor(root: Path) -> Vendor:
    """Imports both modules.

    Raises:
        TargetUnavailableError: one is not there, or Python cannot import it.
    """
    missing = missing_modules(root)
    if missing:
        raise TargetUnavailableError(f"nothing can run on Cloud AI 100 here, {missing[0]}: {HOW_TO_GET}.")
    qaicrt, messages = (_import(name, place) for name, place in _places(root).items())
    return Vendor(qaicrt, messages, stand_in=bool(getattr(qaicrt, "STAND_IN", False)))


def _import(name: str, place: Path) -> Any:
    """The module, under its own name as an ordinary import leaves it: an extension can be set up only once."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.machinery.PathFinder.find_spec(name, [str(place)])
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    except (ImportError, TypeError, AttributeError) as error:
        # TypeError and AttributeError: protobuf's answer to modules generated for another release of it.
        sys.modules.pop(name, None)
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise TargetUnavailableError(
            f"{name} in {place} cannot be imported ({said}): use the Python and the protobuf the SDK was made for."
        ) from None
    return module


def ready_devices(root: Path) -> list[int] | None:
    """Ids of the devices that ``qaic-util -q`` lists as ready; None when there is no such tool, or it fails."""
    tool = root / "tools" / "qaic-util"
    try:
        done = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=_LISTING, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    ready: list[int] = []
    device: int | None = None
    for line in done.stdout.splitlines():
        if (found := re.match(r"\s*QID\s*:?\s*(\d+)", line)) is not None:
            device = int(found.group(1))
        elif re.match(r"\s*Status\s*:\s*Ready", line) and device is not None:
            ready.append(device)
    return ready


def runtime_missing(root: Path) -> str | None:
    """What running on a card lacks here, in one phrase; None when nothing does."""
    missing = missing_modules(root)
    if missing:
        return f"to run: a card, and {HOW_TO_GET}: {'; '.join(missing)}"
    ready = ready_devices(root)
    if ready is None:
        return f"to run: {root / 'tools' / 'qaic-util'} -q lists no devices; see whether its driver is loaded"
    return None if ready else "to run: no device is ready; see qaic-util -q"

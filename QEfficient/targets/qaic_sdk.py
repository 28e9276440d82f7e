"""The Cloud AI Apps SDK on this machine: where its compiler is, its version, the forms that version takes."""

from __future__ import annotations

import os
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

#: Where the SDK's installer puts everything.
ROOT = Path("/opt/qti-aic")
HOW_TO_GET = (
    "install the Cloud AI Apps SDK for x86-64 Linux (https://quic.github.io/cloud-ai-sdk-pages), "
    "or write the compiler's input without compiling: dry_run=True, `qefficient compile --dry-run`"
)


#: The oldest release whose pages describe what is written here; MXFP6 came with it.
OLDEST = (1, 12)


@dataclass(frozen=True)
class Profile:
    """The forms a range of SDK releases takes.

    At which release exactly a form became accepted is not public, so a profile can also be chosen by hand.

    Attributes:
        executable: the compiler's file name.
        hw_version: value of ``-aic-hw-version`` for Cloud AI 100.
        named: whether an entry of ``specializations.json`` is an object with a name, or only sizes.
        compile_only: whether ``-compile-only`` is passed; without it older compilers go on to run random data.
    """

    name: str
    executable: str
    hw_version: str
    named: bool
    compile_only: bool


LEGACY = Profile("legacy", "qaic-exec", "2.0", named=False, compile_only=True)
MIDDLE = Profile("1.21", "qaic-compile", "ai100", named=False, compile_only=True)
CURRENT = Profile("current", "qaic-compile", "ai100", named=True, compile_only=False)
PROFILES = {profile.name: profile for profile in (LEGACY, MIDDLE, CURRENT)}


@dataclass(frozen=True)
class Sdk:
    """What was found: the compiler, its version (None when the SDK does not say) and the profile that fits both."""

    compiler: Path
    version: str | None

    @property
    def root(self) -> Path:
        """Where the SDK is installed: its compilers are in ``exec``."""
        return self.compiler.parent.parent

    @property
    def profile(self) -> Profile:
        if self.compiler.name == LEGACY.executable:
            return LEGACY
        release = _release(self.version)
        if release is None or release > (1, 21):
            return CURRENT
        return MIDDLE if release == (1, 21) else LEGACY

    @property
    def too_old(self) -> bool:
        release = _release(self.version)
        return release is not None and release < OLDEST


def find_sdk(root: Path = ROOT) -> Sdk | None:
    """The SDK under ``root``, or one whose compiler is on the PATH; None when there is neither."""
    for name in (CURRENT.executable, LEGACY.executable):
        installed = root / "exec" / name
        if installed.is_file() and os.access(installed, os.X_OK):
            return Sdk(installed, _version(root))
        found = shutil.which(name)
        if found is not None:
            return Sdk(Path(found), _version(Path(found).parent.parent))
    return None


def _version(root: Path) -> str | None:
    try:
        tree = ElementTree.parse(root / "versions" / "apps.xml")
    except (OSError, ElementTree.ParseError):
        return None
    return next((e.text.strip() for e in tree.iter("base_version") if e.text and e.text.strip()), None)


def _release(version: str | None) -> tuple[int, int] | None:
    """``"1.20.0.100"`` -> (1, 20)."""
    parts = (version or "").split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 and parts[0].isdigit() and parts[1].isdigit() else None

"""The QNN (QAIRT) SDK on this machine: where its two tools are, and its version."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

#: The vendor's own variable for where the SDK is.
VARIABLE = "QNN_SDK_ROOT"
_PLATFORM = "x86_64-linux-clang"
HOW_TO_GET = (
    f"install the QAIRT SDK and set {VARIABLE} to its directory, or write the tools' input without compiling: "
    "dry_run=True, `qefficient compile --dry-run`"
)
#: Stands for the SDK in the files of a dry run without one.
NOWHERE = f"${{{VARIABLE}}}"


@dataclass(frozen=True)
class QnnSdk:
    """Paths below the SDK's root, and its version (None when it does not say)."""

    root: str
    version: str | None = None

    @property
    def converter(self) -> str:
        return f"{self.root}/bin/{_PLATFORM}/qairt-converter"

    @property
    def generator(self) -> str:
        return f"{self.root}/bin/{_PLATFORM}/qnn-context-binary-generator"

    @property
    def backend(self) -> str:
        return f"{self.root}/lib/{_PLATFORM}/libQnnAic.so"

    @property
    def extensions(self) -> str:
        return f"{self.root}/lib/{_PLATFORM}/libQnnAicNetRunExtensions.so"

    def lacking(self) -> list[str]:
        """The tools that are not there or may not be run."""
        return [tool for tool in (self.converter, self.generator) if not os.access(tool, os.X_OK)]


def find_qnn_sdk() -> QnnSdk | None:
    """The SDK that the vendor's variable names; None when it is not set. Its tools may still be lacking."""
    root = os.environ.get(VARIABLE)
    if not root:
        return None
    try:
        text = (Path(root) / "sdk.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    found = re.search(r"^\s*version\s*:\s*[\"']?([^\s\"']+)", text, re.MULTILINE)
    return QnnSdk(root.rstrip("/"), found[1] if found else None)

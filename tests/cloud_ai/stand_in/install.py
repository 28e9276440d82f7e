"""Puts the stand-in's executables where the vendor's installers put theirs, below a directory of the caller's."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

_SCRIPT = "#!{python}\nimport sys\nsys.path.insert(0, {place!r})\n{body}\n"


def install_qaic(root: Path, *, executable: str = "qaic-compile", version: str = "1.23.0") -> Path:
    """An Apps SDK with one compiler; returns the directory to put on the PATH."""
    release = tuple(int(part) for part in version.split(".")[:2])
    body = f"from stand_in.compiler import main\nsys.exit(main({executable!r}, {release}))"
    _script(root / "exec" / executable, body)
    (root / "versions").mkdir(parents=True, exist_ok=True)
    (root / "versions" / "apps.xml").write_text(f"<versions><base_version>{version}</base_version></versions>")
    return root / "exec"


def install_qnn(root: Path, *, version: str = "2.40.0", twice: bool = False) -> Path:
    """A QNN SDK; ``twice`` appends ``.bin`` to the program once more, as some releases do."""
    platform = "x86_64-linux-clang"
    for tool in ("qairt-converter", "qnn-context-binary-generator"):
        body = f"from stand_in.qnn_tools import main\nsys.exit(main({tool!r}, twice={twice}))"
        _script(root / "bin" / platform / tool, body)
    for library in ("libQnnAic.so", "libQnnAicNetRunExtensions.so"):
        path = root / "lib" / platform / library
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"stand-in")
    (root / "sdk.yaml").write_text(f"name: stand-in\nversion: {version}\n")
    return root


def _script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    place = str(Path(__file__).parent.parent)
    path.write_text(_SCRIPT.format(python=sys.executable, place=place, body=body))
    path.chmod(0o755)


def install_runtime(root: Path, *, devices: int = 4) -> Path:
    """A Platform SDK: the two Python modules and ``qaic-util``, which lists so many devices as ready."""
    place = str(Path(__file__).parent.parent)
    for name, directory, module in (
        ("qaicrt", root / "dev" / "lib" / platform.machine(), "runtime"),
        ("QAicApi_pb2", root / "dev" / "python", "messages"),
    ):
        directory.mkdir(parents=True, exist_ok=True)
        words = f"import sys\n\nsys.path.insert(0, {place!r})\nfrom stand_in.{module} import *  # noqa: F403\n"
        (directory / f"{name}.py").write_text(f'"""A stand-in: runs no card."""\n{words}')
    listing = "".join(f"QID {number}\n\tStatus:Ready\n" for number in range(devices))
    _script(root / "tools" / "qaic-util", f"print({listing!r}, end='')")
    return root

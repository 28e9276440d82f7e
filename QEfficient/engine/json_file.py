"""Reads the JSON files that lie beside a program in a package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from QEfficient.errors import PackageError


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, empty when there is no such file; PackageError when it holds anything else."""
    if not path.is_file():
        return {}
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise PackageError(f"{path} is not a JSON object: the package is corrupt, compile it again.")
    return body

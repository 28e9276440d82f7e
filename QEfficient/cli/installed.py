"""What is installed: the requirements this package declares and the versions that are here."""

from __future__ import annotations

import re
from importlib import metadata

DISTRIBUTION = "qefficient"
#: The extra that loading, exporting and compiling a checkpoint needs.
EXPORT = "export"

_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)\s*([^;]*)(?:;(.*))?")


def requirements(extra: str | None = None) -> dict[str, str]:
    """Name -> version range of what ``extra`` (None: the package itself) needs, as its metadata says."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match is None:
            continue
        marker = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", match[3] or "")
        if (marker[1] if marker else None) == extra:
            found[match[1]] = match[2].strip()
    return found


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None

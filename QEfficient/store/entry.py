"""The record of an entry: ``entry.json`` lists every file with size and digest, and carries metadata."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import platform
import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from QEfficient.store.digest import json_digest
from QEfficient.store.files import walk_files
from QEfficient.store.layout import ENTRY_FILE
from QEfficient.version import __version__

FORMAT = "qefficient-entry"
FORMAT_VERSION = 1

_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and BLAKE3 digest (64 hex digits) of a file of an entry."""

    size: int
    blake3: str


@dataclass(frozen=True)
class EntryRecord:
    """What ``entry.json`` says. ``meta`` has at least ``label``, ``created`` (Unix s) and ``libraries``."""

    kind: str
    key: str
    files: dict[str, StoredFile]
    meta: dict[str, Any]

    def save(self, directory: Path) -> None:
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        body["digest"] = json_digest(body)
        (directory / ENTRY_FILE).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> EntryRecord | None:
        """The record of a directory, or None if there is none that this version wrote and nobody changed."""
        try:
            body = json.loads((directory / ENTRY_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
            return None
        if not isinstance(body, dict) or body.get("format") != FORMAT or body.get("format_version") != FORMAT_VERSION:
            return None
        # With the record's own digest intact, its fields are what save() wrote and need no further checks.
        try:
            if body.pop("digest", None) != json_digest(body):
                return None
        except TypeError:  # NaN, which json.loads lets through
            return None
        files = {name: StoredFile(**record) for name, record in body["files"].items()}
        return cls(body["kind"], body["key"], files, body["meta"])


def describe(
    directory: Path,
    kind: str,
    key: str,
    *,
    label: str,
    outcome: Mapping[str, Any],
    digest_of: Callable[[Path], str],
) -> EntryRecord:
    """Makes the record of a freshly built directory; ``outcome`` is what the builder returned.

    Raises:
        ValueError: the builder left something that cannot be kept (a symbolic link, a file named
        ``entry.json``),
            or returned unknown fields, a malformed digest or the digest of a file that does not exist.
        TypeError: the builder's ``meta`` is not JSON.
    """
    if unknown := sorted(set(outcome) - {"digests", "meta"}):
        raise ValueError(f"The builder of {label} returned {unknown}: it may return 'digests' and 'meta' only.")
    supplied = {PurePosixPath(name).as_posix(): value for name, value in outcome.get("digests", {}).items()}
    files: dict[str, StoredFile] = {}
    for name, path in walk_files(directory):
        status = path.lstat()
        if name == ENTRY_FILE or not stat.S_ISREG(status.st_mode):
            raise ValueError(f"The builder of {label} left {name}, which an entry cannot hold: write plain files only.")
        files[name] = StoredFile(status.st_size, supplied.pop(name, None) or digest_of(path))
        if not _HEX_DIGEST.fullmatch(files[name].blake3):
            raise ValueError(f"The builder of {label} gave a digest of {name} that is not 64 hex digits: fix it.")
    if supplied:
        raise ValueError(f"The builder of {label} gave digests of {sorted(supplied)}, which it did not write.")
    meta = {
        "libraries": {"qefficient": __version__, "python": platform.python_version()},
        **outcome.get("meta", {}),
        "label": label,
        "created": time.time(),
    }
    return EntryRecord(kind, key, files, meta)


def find_damage(directory: Path, record: EntryRecord, digest_of: Callable[[Path], str] | None) -> str | None:
    """The first way in which a directory differs from its record, or None.

    ``digest_of=None`` checks sizes only. Files the record does not list are not damage. Raises OSError when
    the directory may not be read.
    """
    for name, expected in record.files.items():
        path = directory / name
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a plain file"
            if status.st_size != expected.size:
                return f"{name} has {status.st_size} bytes instead of {expected.size}"
            if digest_of is not None and digest_of(path) != expected.blake3:
                return f"{name} does not have the bytes that were written"
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except OSError as error:
            # A bad sector is damage. Missing permission is not: rebuilding would not help.
            if error.errno == errno.EIO:
                return f"{name} cannot be read from the disk"
            raise
    return None


def last_used(directory: Path) -> float:
    """When an entry was last asked for, in Unix seconds: the mtime of its ``entry.json``."""
    return os.stat(directory / ENTRY_FILE).st_mtime

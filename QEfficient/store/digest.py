"""BLAKE3 digests of files and JSON values, and a memo so that many gigabytes are hashed only once."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from blake3 import blake3

from QEfficient.errors import ArtifactWriteError
from QEfficient.store.files import replacing

logger = logging.getLogger("QEfficient.store")

#: Files up to this many bytes are cheaper to hash than to look up.
SMALL_FILE_BYTES = 1 << 20
#: Bytes read at a time: enough for every core to have a share.
_READ_BYTES = 8 << 20
#: A file modified less than this many seconds ago could change again without its mtime changing.
RACY_SECONDS = 2.0
#: A half-written memo file older than this many seconds belongs to a process that was killed.
STALE_TEMPORARY_SECONDS = 3600.0


def file_digest(path: Path, threads: int | None = None) -> str:
    """The BLAKE3 digest (64 hex digits) of a file's bytes; raises OSError when it cannot be read.

    ``threads`` is the number of CPU threads; None means one for a small file and every core for a large one.
    """
    if threads is None:
        threads = 1 if os.stat(path).st_size <= SMALL_FILE_BYTES else blake3.AUTO
    hasher = blake3(max_threads=threads)
    # Not a memory map: its pages count as this process's memory, and a checkpoint is larger than most machines'.
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()


def json_digest(value: Any) -> str:
    """The BLAKE3 digest (64 hex digits) of a JSON value; the order of object keys does not matter.

    Tuples count as arrays. ``1``, ``1.0``, ``True`` and ``"1"`` are four different values.

    Raises:
        TypeError: the value holds something JSON cannot hold (a path, a set, NaN, a key that is not text).
    """
    _require_json(value, "value")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return blake3(text.encode("ascii")).hexdigest()


def _require_json(value: Any, where: str) -> None:
    # json.dumps would turn the key 1 into "1", so two different dicts would share a digest: refuse.
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}, which is not a string: convert it to one.")
            _require_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_json(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{where} is {value!r}, which JSON cannot hold: pass a finite number or None.")
    elif value is not None and not isinstance(value, str | int | float):
        raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold: convert it to a JSON value.")


class DigestMemo:
    """Remembers digests of big files in small JSON files under ``<home>/digests/``, one per real path.

    A remembered digest counts while the file's size, mtime in ns, inode and device are unchanged; where the
    file comes from (a checkpoint, a hub cache) makes no difference. Safe to use from several processes.
    """

    def __init__(self, home: Path) -> None:
        self.directory = Path(home) / "digests"

    def digest(self, path: Path) -> str:
        """The BLAKE3 digest of a file, hashed only if small or changed; raises OSError if unreadable."""
        before = os.stat(path)
        if before.st_size <= SMALL_FILE_BYTES:
            return file_digest(path)
        if (known := self.lookup(path)) is not None:
            return known
        digest = file_digest(path)
        # A file that changed while it was hashed has no digest worth remembering.
        if _identity(before) == _identity(os.stat(path)):
            self.remember(path, digest)
        return digest

    def lookup(self, path: Path) -> str | None:
        """The remembered digest of an unchanged file, else None; raises OSError if the file is gone."""
        real = os.path.realpath(path)
        record = _read(self._record_path(real))
        if record is None or record.get("path") != real:
            return None
        if {name: record.get(name) for name in _IDENTITY_FIELDS} != _identity(os.stat(real)):
            return None
        digest = record.get("blake3")
        return digest if isinstance(digest, str) else None

    def remember(self, path: Path, digest: str) -> bool:
        """Stores the digest of a big file as it is now and says whether it did.

        Small files and files modified less than two seconds ago are not remembered. A memo that cannot be
        written costs time later and nothing else, so it is not an error.
        """
        real = os.path.realpath(path)
        status = os.stat(real)
        # Like git's racy index: a write in the same clock tick would leave size and mtime as they are.
        if status.st_size <= SMALL_FILE_BYTES or time.time() - status.st_mtime < RACY_SECONDS:
            return False
        record = {"path": real, **_identity(status), "blake3": digest}
        target = self._record_path(real)
        try:
            with replacing(target, "a digest") as temporary:
                self.directory.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(record), encoding="utf-8")
        except ArtifactWriteError as error:
            logger.debug("the digest of %s was not remembered: %s", real, error)
            return False
        return True

    def prune(self, dry_run: bool = False) -> int:
        """Removes records of files that changed or are gone; returns how many, may raise OSError."""
        if not self.directory.is_dir():
            return 0
        stale = [path for path in self.directory.iterdir() if _is_stale(path)]
        if not dry_run:
            for path in stale:
                path.unlink(missing_ok=True)
        return len(stale)

    def _record_path(self, real: str) -> Path:
        return self.directory / f"{blake3(os.fsencode(real)).hexdigest(length=16)}.json"


_IDENTITY_FIELDS = ("size", "mtime_ns", "inode", "device")


def _identity(status: os.stat_result) -> dict[str, int]:
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,
        "device": status.st_dev,
    }


def _read(path: Path) -> dict[str, Any] | None:
    # An unreadable record is the same as none: the file is hashed again.
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _is_stale(path: Path) -> bool:
    try:
        if path.suffix == ".tmp":
            return time.time() - path.stat().st_mtime > STALE_TEMPORARY_SECONDS
        record = _read(path)
        if record is None:
            return True
        return {name: record.get(name) for name in _IDENTITY_FIELDS} != _identity(os.stat(str(record.get("path"))))
    except OSError:
        return True

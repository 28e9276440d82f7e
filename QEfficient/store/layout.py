"""Names and locks of the store: where an entry, its lock and its workplace are, and who may touch them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from QEfficient.store.files import write_errors

#: Directories of the home that are not kinds of entry.
RESERVED = ("digests", "locks", "tmp")
ENTRY_FILE = "entry.json"

# No "-" in a kind: "<kind>-<key>" must have one reading. Nothing but a digest is a key: gc must never take a
# stranger's directory for an entry, even when QEFF_HOME points at a directory with other things in it.
_KIND = re.compile(r"[a-z][a-z0-9_]{0,31}")
_KEY = re.compile(r"[0-9a-f]{64}")
_TRASH = "~removed"


def is_kind(name: str) -> bool:
    """Whether ``name`` can be a kind of entry."""
    return _KIND.fullmatch(name) is not None and name not in RESERVED


def is_key(name: str) -> bool:
    """Whether ``name`` can be the key of an entry."""
    return _KEY.fullmatch(name) is not None


class Layout:
    """The paths of one cache home, and the lock of each entry. Creates nothing until a lock is taken."""

    def __init__(self, home: Path) -> None:
        self.home = Path(home).absolute()
        self.locks = self.home / "locks"
        self.tmp = self.home / "tmp"

    def entry(self, kind: str, key: str) -> Path:
        """The directory of an entry; raises ValueError for a kind or key that cannot name one."""
        if not is_kind(kind):
            raise ValueError(f"{kind!r} cannot be a kind of entry: use lower-case letters, digits and underscores.")
        if not is_key(key):
            raise ValueError(f"{key!r} cannot be the key of an entry: use what json_digest() returns.")
        return self.home / kind / key

    def workplace(self, kind: str, key: str) -> Path:
        """Where an entry is built before it is renamed into place."""
        return self.tmp / f"{kind}-{key}"

    def trash(self, kind: str, key: str) -> Path:
        """Where an entry is renamed to before its files are removed."""
        return self.tmp / f"{kind}-{key}{_TRASH}"

    def lock_file(self, kind: str, key: str) -> Path:
        return self.locks / f"{kind}-{key}.lock"

    def owner(self, name: str) -> tuple[str, str] | None:
        """The (kind, key) that a name in ``tmp/`` or ``locks/`` belongs to, or None for a foreign name."""
        kind, _, key = name.removesuffix(".lock").removesuffix(_TRASH).partition("-")
        return (kind, key) if is_kind(kind) and is_key(key) else None

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Holds the lock of an entry; ``on_wait`` is called once if another process or thread has it.

        Raises:
            ArtifactWriteError: the lock file cannot be created.
        """
        lock = self._file_lock(kind, key)
        with write_errors("The lock of a cache entry", self.lock_file(kind, key)):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if on_wait is not None:
                    on_wait()
                lock.acquire(timeout=-1)
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def try_lock(self, kind: str, key: str) -> Iterator[bool]:
        """Holds the lock of an entry if it is free; yields whether it does. Raises as ``lock``."""
        lock = self._file_lock(kind, key)
        with write_errors("The lock of a cache entry", self.lock_file(kind, key)):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                yield False
                return
        try:
            yield True
        finally:
            lock.release()

    def in_use(self, kind: str, key: str) -> bool:
        """Whether somebody holds the lock of an entry now; leaves no lock file where there was none."""
        if not os.path.lexists(self.lock_file(kind, key)):
            return False
        with self.try_lock(kind, key) as free:
            return not free

    def entry_paths(self) -> Iterator[tuple[str, str, Path]]:
        """Yields (kind, key, directory) of everything that lies where an entry would, sorted."""
        for folder in children(self.home):
            if is_kind(folder.name) and folder.is_dir():
                for path in children(folder):
                    if is_key(path.name) and path.is_dir() and not path.is_symlink():
                        yield folder.name, path.name, path

    def _file_lock(self, kind: str, key: str) -> FileLock:
        with write_errors("The lock of a cache entry", self.locks):
            self.locks.mkdir(parents=True, exist_ok=True)
        # A new object each time: filelock would let one object be taken twice by the same thread.
        return FileLock(self.lock_file(kind, key))


def children(directory: Path) -> list[Path]:
    """The sorted children of a directory; none if it does not exist (another process may have removed it)."""
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []

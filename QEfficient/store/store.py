"""The artefact store: get a verified entry by key, or build it once and put it in place atomically."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from QEfficient.errors import ArtifactWriteError, QEfficientError
from QEfficient.store import upkeep
from QEfficient.store.digest import DigestMemo, file_digest
from QEfficient.store.entry import EntryRecord, describe, find_damage
from QEfficient.store.files import (
    copy_file,
    lacks_room,
    place_file,
    remove_tree,
    sync_directory,
    sync_tree,
    write_error,
    write_errors,
)
from QEfficient.store.layout import ENTRY_FILE, Layout
from QEfficient.store.upkeep import EntryInfo, GcReport, Problem

__all__ = ["ArtifactStore", "Builder", "EntryInfo", "GcReport", "Problem", "copy_file", "place_file"]

logger = logging.getLogger("QEfficient.store")

#: Writes an entry into an empty directory. May return ``{"digests": {relative path: BLAKE3 hex}, "meta":
#: {...}}``: digests it already knows are not computed again.
Builder = Callable[[Path], Mapping[str, Any] | None]


class ArtifactStore:
    """Immutable entries ``<home>/<kind>/<key>/``, shared by any number of threads and processes.

    Never write to a file of an entry: it may be a hard link to a checkpoint.
    """

    def __init__(self, home: Path) -> None:
        self.layout = Layout(home)
        self.home = self.layout.home
        self.memo = DigestMemo(self.home)

    def get(self, kind: str, key: str, verify: bool = True) -> Path | None:
        """The directory of an entry, or None when there is none that is whole.

        ``verify`` checks digests (of big files only if they changed since the last check); without it sizes
        only. A damaged entry is removed, after waiting for whoever works on it, so that it can be built
        again.

        Raises:
            QEfficientError: the entry exists and may not be read.
            ArtifactWriteError: a damaged entry cannot be removed.
            ValueError: ``kind`` or ``key`` cannot name an entry.
        """
        path = self.layout.entry(kind, key)
        if not os.path.lexists(path):
            return None
        if self._damage(kind, key, verify) is None:
            return _touched(path)
        with self.layout.lock(kind, key):
            return self._get_locked(kind, key, verify)

    def build(
        self,
        kind: str,
        key: str,
        builder: Builder,
        label: str = "",
        on_wait: Callable[[], None] | None = None,
    ) -> Path:
        """The directory of an entry, built now if there is none.

        ``builder`` gets an empty directory and writes the entry's files into it. If another process or thread
        is building the same entry, ``on_wait`` is called once and its result is used. Whatever interrupts the
        builder, nothing of it is left. ``label`` is what people see, for example "gpt2 (export)".

        Raises:
            ArtifactWriteError: the disk is full or the home cannot be written. QEfficientError: the entry
            exists and may not be read. ValueError: ``kind`` or ``key`` cannot name an entry, or the builder
            broke the rules of ``describe``.
        """
        label = label or f"{kind}/{key[:12]}"
        if (found := self.get(kind, key)) is not None:
            return found
        with self.layout.lock(kind, key, on_wait):
            if (found := self._get_locked(kind, key, verify=True)) is not None:
                return found
            return self._build_locked(kind, key, builder, label)

    def entries(self) -> list[EntryInfo]:
        """Every readable entry, oldest first."""
        return upkeep.list_entries(self.layout)

    def verify_all(self) -> list[Problem]:
        """Rehashes every file of every entry, trusting no memo, and reports what does not belong."""
        return upkeep.verify(self.layout)

    def gc(
        self,
        max_age_days: float | None = None,
        max_bytes: int | None = None,
        everything: bool = False,
        dry_run: bool = False,
    ) -> GcReport:
        """Removes entries, least recently used first, and leftovers; see ``upkeep.collect``."""
        return upkeep.collect(self.layout, self.memo, max_age_days, max_bytes, everything, dry_run)

    def _damage(self, kind: str, key: str, verify: bool) -> str | None:
        path = self.layout.entry(kind, key)
        try:
            record = EntryRecord.load(path)
            if record is None or (record.kind, record.key) != (kind, key):
                return f"{ENTRY_FILE} is missing, changed or of another version"
            return find_damage(path, record, self.memo.digest if verify else None)
        except OSError as error:
            raise QEfficientError(
                f"The cache entry {path} cannot be read ({error.strerror}): "
                "change its permissions or set QEFF_HOME to another directory."
            ) from error

    def _get_locked(self, kind: str, key: str, verify: bool) -> Path | None:
        path = self.layout.entry(kind, key)
        if not os.path.lexists(path):
            return None
        # Asked again under the lock: somebody may have rebuilt the entry while this process waited.
        damage = self._damage(kind, key, verify)
        if damage is None:
            return _touched(path)
        logger.warning("the cache entry %s is damaged (%s): removing it, it will be built again", path, damage)
        with write_errors("The removal of a damaged cache entry", path):
            upkeep.remove_entry(self.layout, kind, key)
        return None

    def _build_locked(self, kind: str, key: str, builder: Builder, label: str) -> Path:
        final = self.layout.entry(kind, key)
        trash = self.layout.trash(kind, key)
        with write_errors("What an interrupted run left", trash):
            remove_tree(trash)
        with _Workplace(self.layout.workplace(kind, key), label) as workplace:
            outcome = builder(workplace) or {}
            record = describe(workplace, kind, key, label=label, outcome=outcome, digest_of=file_digest)
            with write_errors(label, final):
                record.save(workplace)
                # Bytes before names: after a power cut an entry is either whole or not there.
                sync_tree(workplace)
                final.parent.mkdir(parents=True, exist_ok=True)
                os.rename(workplace, final)
                sync_directory(final.parent)
        # Only now, because the memo goes by path; fresh files are too young for it and are hashed once more
        # later.
        for name, stored in record.files.items():
            self.memo.remember(final / name, stored.blake3)
        return final


class _Workplace:
    """An empty directory to build in; gone on any exit; a full disk becomes an ``ArtifactWriteError``."""

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.label = label

    def __enter__(self) -> Path:
        with write_errors(self.label, self.path):
            remove_tree(self.path)
            self.path.mkdir(parents=True)
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            remove_tree(self.path)
        except OSError as failure:
            logger.warning("%s could not be removed (%s): `qefficient cache gc` will try again", self.path, failure)
        # Only exceptions: a Ctrl-C during the handling of a full disk is still a Ctrl-C.
        if isinstance(error, Exception) and lacks_room(error) and not isinstance(error, ArtifactWriteError):
            raise write_error(self.label, self.path, error) from error


def _touched(path: Path) -> Path:
    # Another user's cache or a read-only disk can be used; it just does not remember when.
    with contextlib.suppress(OSError):
        os.utime(path / ENTRY_FILE)
    return path

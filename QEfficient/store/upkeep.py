"""Upkeep of the store: list entries with their sizes, verify every byte, remove what is old or left over."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from QEfficient.errors import OptionError, QEfficientError
from QEfficient.store.digest import DigestMemo, file_digest
from QEfficient.store.entry import EntryRecord, find_damage, last_used
from QEfficient.store.files import remove_tree, walk_files, write_errors
from QEfficient.store.layout import ENTRY_FILE, RESERVED, Layout, children, is_key, is_kind

_SECONDS_PER_DAY = 86400.0

#: Device and inode: one file, whatever its names.
Inode = tuple[int, int]


@dataclass(frozen=True)
class EntryInfo:
    """An entry as people see it; sizes in bytes, times in Unix seconds, ``meta`` as the builder gave it.

    ``size_apparent`` adds up every file. ``size_unique`` counts a file with several names once in the whole
    list, for the oldest entry that has it, so that the sum is what the store refers to. ``size_reclaimable``
    is what removing this entry alone would free: not what a checkpoint or another entry also links to.
    """

    kind: str
    key: str
    label: str
    path: Path
    size_apparent: int
    size_unique: int
    size_reclaimable: int
    created: float
    last_used: float
    meta: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Problem:
    """Something under the home that is damaged or does not belong; ``message`` says what to do."""

    path: Path
    message: str


@dataclass
class GcReport:
    """What a collection removed, or would remove when ``dry_run``.

    ``skipped`` entries are in use. ``damaged`` are directories in an entry's place without a valid record.
    ``freed_bytes`` is what removed entries gave back to the disk.
    """

    dry_run: bool
    removed: list[EntryInfo] = field(default_factory=list)
    skipped: list[EntryInfo] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
    freed_bytes: int = 0
    stale_tmp: list[Path] = field(default_factory=list)
    orphan_locks: int = 0
    orphan_memos: int = 0


@dataclass(frozen=True)
class _Scan:
    """Which files an entry has: inode to (size, number of names in this entry, number of names anywhere)."""

    kind: str
    key: str
    path: Path
    meta: dict[str, Any]
    created: float
    last_used: float
    inodes: dict[Inode, tuple[int, int, int]]
    size: int


class _Ownership:
    """Which entries hold each file that only the store has; knows what a removal frees."""

    def __init__(self, scans: list[_Scan]) -> None:
        names: dict[Inode, int] = {}
        for scan in scans:
            for inode, (_, here, _) in scan.inodes.items():
                names[inode] = names.get(inode, 0) + here
        self._owners: dict[Inode, set[Path]] = {}
        self._sizes: dict[Inode, int] = {}
        for scan in scans:
            for inode, (size, _, anywhere) in scan.inodes.items():
                # A name outside the store (a checkpoint) keeps the bytes alive whatever the store does.
                if anywhere <= names[inode]:
                    self._owners.setdefault(inode, set()).add(scan.path)
                    self._sizes[inode] = size

    @property
    def held(self) -> int:
        """Bytes that are on disk only because of the store."""
        return sum(self._sizes[inode] for inode, owners in self._owners.items() if owners)

    def freed_by(self, scan: _Scan) -> int:
        return sum(self._sizes[inode] for inode in scan.inodes if self._owners.get(inode) == {scan.path})

    def remove(self, scan: _Scan) -> int:
        freed = self.freed_by(scan)
        for inode in scan.inodes:
            self._owners.get(inode, set()).discard(scan.path)
        return freed


def list_entries(layout: Layout) -> list[EntryInfo]:
    """Every readable entry, oldest first."""
    scans = _scan_all(layout)
    ownership = _Ownership(scans)
    seen: set[Inode] = set()
    infos = []
    for scan in scans:
        unique = sum(size for inode, (size, _, _) in scan.inodes.items() if inode not in seen)
        seen.update(scan.inodes)
        infos.append(_info(scan, unique, ownership.freed_by(scan)))
    return infos


def verify(layout: Layout) -> list[Problem]:
    """Rehashes every file of every entry and reports damage, foreign files and what killed processes left.

    Raises:
        QEfficientError: something may not be read.
    """
    try:
        return [*_foreign(layout), *_damaged(layout), *_left_over(layout)]
    except OSError as error:
        raise QEfficientError(
            f"The cache cannot be verified because {error.filename} cannot be read ({error.strerror}): "
            "change its permissions."
        ) from error


def collect(
    layout: Layout,
    memo: DigestMemo,
    max_age_days: float | None = None,
    max_bytes: int | None = None,
    everything: bool = False,
    dry_run: bool = False,
) -> GcReport:
    """Removes entries, least recently used first, then what killed processes left and records nobody needs.

    ``max_age_days`` removes entries not used for that many days. ``max_bytes`` removes entries until what
    only the store keeps on disk fits; bytes that a checkpoint also links to do not count, for removing them
    frees nothing. ``everything`` removes all entries, damaged ones too. Entries whose lock is held are
    skipped. With none of the three, entries stay.

    Raises:
        OptionError: a limit is negative.
        ArtifactWriteError: something cannot be removed.
    """
    if (max_age_days is not None and max_age_days < 0) or (max_bytes is not None and max_bytes < 0):
        raise OptionError("The limits of a cache collection cannot be negative: pass 0 or more.")
    report = GcReport(dry_run)
    scans = sorted(_scan_all(layout), key=lambda scan: scan.last_used)
    ownership = _Ownership(scans)
    oldest = None if max_age_days is None else time.time() - max_age_days * _SECONDS_PER_DAY
    for scan in scans:
        too_old = oldest is not None and scan.last_used <= oldest
        too_much = max_bytes is not None and ownership.held > max_bytes
        if not (everything or too_old or too_much):
            continue
        info = _info(scan, sum(size for size, _, _ in scan.inodes.values()), ownership.freed_by(scan))
        if _remove_unused(layout, scan, dry_run):
            report.removed.append(info)
            report.freed_bytes += ownership.remove(scan)
        else:
            report.skipped.append(info)
    with write_errors("The removal of cache leftovers", layout.home):
        if everything:
            _remove_damaged(layout, report)
        _remove_stale_tmp(layout, report)
        _remove_orphan_locks(layout, report)
        report.orphan_memos = memo.prune(dry_run)
    return report


def remove_entry(layout: Layout, kind: str, key: str) -> None:
    """Removes an entry whose lock the caller holds; a kill halfway leaves it in ``tmp/``, not in place."""
    trash = layout.trash(kind, key)
    remove_tree(trash)
    trash.parent.mkdir(parents=True, exist_ok=True)
    os.rename(layout.entry(kind, key), trash)
    remove_tree(trash)


def _scan_all(layout: Layout) -> list[_Scan]:
    scans = []
    for kind, key, path in layout.entry_paths():
        try:
            record = EntryRecord.load(path)
            if record is not None:
                scans.append(_scan(kind, key, path, record))
        except OSError:
            # Removed by somebody else while it was read, or not readable: verify() tells which.
            continue
    return sorted(scans, key=lambda scan: (scan.created, scan.path))


def _scan(kind: str, key: str, path: Path, record: EntryRecord) -> _Scan:
    inodes: dict[Inode, tuple[int, int, int]] = {}
    total = 0
    for _, file in walk_files(path):
        status = file.lstat()
        inode = (status.st_dev, status.st_ino)
        inodes[inode] = (status.st_size, inodes.get(inode, (0, 0, 0))[1] + 1, status.st_nlink)
        total += status.st_size
    created = float(record.meta["created"])
    return _Scan(kind, key, path, record.meta, created, last_used(path), inodes, total)


def _info(scan: _Scan, unique: int, reclaimable: int) -> EntryInfo:
    return EntryInfo(
        scan.kind,
        scan.key,
        str(scan.meta["label"]),
        scan.path,
        scan.size,
        unique,
        reclaimable,
        scan.created,
        scan.last_used,
        scan.meta,
    )


def _remove_unused(layout: Layout, scan: _Scan, dry_run: bool) -> bool:
    if dry_run:
        return not layout.in_use(scan.kind, scan.key)
    with layout.try_lock(scan.kind, scan.key) as free:
        if not free:
            return False
        try:
            # Somebody fetched it since the list was made: it is no longer the least recently used.
            if last_used(scan.path) != scan.last_used:
                return False
        except FileNotFoundError:
            # Another collection was faster.
            return False
        with write_errors("The removal of a cache entry", scan.path):
            remove_entry(layout, scan.kind, scan.key)
    return True


def _remove_damaged(layout: Layout, report: GcReport) -> None:
    for kind, key, path in layout.entry_paths():
        if EntryRecord.load(path) is not None:
            continue
        if report.dry_run:
            if not layout.in_use(kind, key):
                report.damaged.append(path)
            continue
        with layout.try_lock(kind, key) as free:
            # Asked again under the lock: it may have been rebuilt meanwhile.
            if free and path.is_dir() and EntryRecord.load(path) is None:
                remove_entry(layout, kind, key)
                report.damaged.append(path)


def _remove_stale_tmp(layout: Layout, report: GcReport) -> None:
    for path in children(layout.tmp):
        owner = layout.owner(path.name)
        if owner is None:
            continue
        if report.dry_run:
            if not layout.in_use(*owner):
                report.stale_tmp.append(path)
            continue
        with layout.try_lock(*owner) as free:
            if free and os.path.lexists(path):
                remove_tree(path)
                report.stale_tmp.append(path)


def _remove_orphan_locks(layout: Layout, report: GcReport) -> None:
    for path in children(layout.locks):
        owner = layout.owner(path.name)
        if owner is None or _has_anything(layout, *owner):
            continue
        if report.dry_run:
            report.orphan_locks += not layout.in_use(*owner)
            continue
        # Removed while held: filelock notices a lock file that lost its name and starts over with a new one.
        with layout.try_lock(*owner) as free:
            if free and not _has_anything(layout, *owner):
                path.unlink(missing_ok=True)
                report.orphan_locks += 1


def _has_anything(layout: Layout, kind: str, key: str) -> bool:
    places = (layout.entry(kind, key), layout.workplace(kind, key), layout.trash(kind, key))
    return any(os.path.lexists(place) for place in places)


def _foreign(layout: Layout) -> list[Problem]:
    problems = []
    for folder in children(layout.home):
        if folder.name in RESERVED:
            continue
        if not is_kind(folder.name) or not folder.is_dir() or folder.is_symlink():
            problems.append(Problem(folder, "does not belong to the cache: move it elsewhere."))
            continue
        problems += [
            Problem(path, "does not belong to the cache: move it elsewhere.")
            for path in children(folder)
            if not is_key(path.name) or not path.is_dir() or path.is_symlink()
        ]
    return problems


def _damaged(layout: Layout) -> list[Problem]:
    problems = []
    for kind, key, path in layout.entry_paths():
        message = _damage(kind, key, path)
        # An entry that is gone by now was removed by somebody else while it was read.
        if message is not None and path.exists():
            problems.append(Problem(path, message))
    return problems


def _damage(kind: str, key: str, path: Path) -> str | None:
    record = EntryRecord.load(path)
    if record is None:
        if not (path / ENTRY_FILE).exists():
            return f"has no {ENTRY_FILE}, so it is not a finished entry: remove it."
        return f"has a changed {ENTRY_FILE} or one of another version: remove the entry, it will be built again."
    if (record.kind, record.key) != (kind, key):
        return f"was made as {record.kind}/{record.key} and moved here: move it back or remove it."
    if (damage := find_damage(path, record, file_digest)) is not None:
        return f"is damaged because {damage}: remove the entry, it will be built again."
    known = {*record.files, ENTRY_FILE}
    extra = [name for name, _ in walk_files(path) if name not in known]
    return f"also holds {extra[0]}, which was not built with it: move that elsewhere." if extra else None


def _left_over(layout: Layout) -> list[Problem]:
    problems = []
    for path in children(layout.tmp):
        owner = layout.owner(path.name)
        if owner is None:
            problems.append(Problem(path, "does not belong to the cache: move it elsewhere."))
        elif not layout.in_use(*owner) and path.exists():
            problems.append(Problem(path, "was left by a run that was killed: `qefficient cache gc` removes it."))
    return problems

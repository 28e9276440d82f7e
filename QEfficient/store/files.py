"""File primitives of the store: link, copy, make durable, remove, and explain a write that failed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from QEfficient.errors import ArtifactWriteError

#: ``FICLONE`` of linux/fs.h: share the blocks of another file until one is written (btrfs, xfs).
FICLONE = 0x40049409

#: Bytes that the kernel copies at a time, and that are read at a time where it does not.
_STEP, _BLOCK = 1 << 28, 1 << 24

#: EFBIG is the file size limit of the process or the filesystem: to the user it is the same lack of room.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# What a filesystem answers when it will not do this, as opposed to failing at it.
_UNSUPPORTED = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EINVAL, errno.ENOTTY, errno.ENOSYS}
    | {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.ETXTBSY, errno.EISDIR}
)


def place_file(source: Path, dest: Path) -> str:
    """Makes ``dest`` hold the bytes of ``source`` as cheaply as it can; returns "link", "reflink" or "copy".

    A hard link goes to the real file behind a symbolic link, so that it stays valid when the symbolic link
    goes. Neither file may be written in place afterwards: they may be one.

    Raises:
        FileExistsError: ``dest`` exists; it is never overwritten.
        OSError: ``source`` cannot be read or ``dest`` cannot be written.
    """
    real = os.path.realpath(source)
    try:
        os.link(real, dest)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return copy_file(Path(real), dest)
    return "link"


def copy_file(source: Path, dest: Path) -> str:
    """Copies the bytes of ``source`` into a new, independent ``dest``; returns "reflink" or "copy".

    Raises:
        FileExistsError: ``dest`` exists; it is never overwritten.
        OSError: ``source`` cannot be read or ``dest`` cannot be written; no partial ``dest`` is left.
    """
    # The reader is raw because its descriptor is read from directly; the writer is buffered because a raw
    # write may be short without an error.
    with open(source, "rb", buffering=0) as reader, open(dest, "xb") as writer:
        try:
            if _reflink(reader.fileno(), writer.fileno()):
                return "reflink"
            copy_bytes(reader, writer, os.fstat(reader.fileno()).st_size)
            writer.flush()
        except BaseException:
            os.unlink(dest)
            raise
    return "copy"


def copy_bytes(source: BinaryIO, out: BinaryIO, length: int) -> None:
    """Copies ``length`` bytes from where ``source`` stands to where ``out`` stands, inside the kernel where it can.

    Raises:
        EOFError: ``source`` has fewer.
        OSError: ``source`` cannot be read or ``out`` cannot be written.
    """
    out.flush()
    begin, place, done = source.tell(), out.tell(), 0
    while done < length:
        try:
            # A bounded step keeps Ctrl-C responsive on a file of many gigabytes.
            step = min(length - done, _STEP)
            count = os.copy_file_range(source.fileno(), out.fileno(), step, begin + done, place + done)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            break
        if not count:
            break
        done += count
    # Whatever the kernel's copy did not do (some filesystems refuse it): the plain way.
    source.seek(begin + done)
    out.seek(place + done)
    while done < length:
        block = source.read(min(length - done, _BLOCK))
        if not block:
            raise EOFError(f"{source.name} ended {length - done} bytes too early")
        out.write(block)
        done += len(block)


def _reflink(reader: int, writer: int) -> bool:
    try:
        fcntl.ioctl(writer, FICLONE, reader)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


@contextlib.contextmanager
def replacing(path: Path, what: str) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` in one step when the block ends well, else is removed.

    Raises:
        ArtifactWriteError: ``what`` cannot be written there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with write_errors(what, path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def walk_files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Yields (path relative to ``directory`` with forward slashes, path) of all but directories.

    Symbolic links are yielded and not followed.
    """
    for root, folders, names in os.walk(directory, onerror=_raise):
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*names, *linked]):
            path = Path(root, name)
            yield path.relative_to(directory).as_posix(), path


def _raise(error: OSError) -> None:
    # os.walk would skip an unreadable directory in silence.
    raise error


def sync_tree(directory: Path) -> None:
    """Asks the kernel to put every file and directory under ``directory`` on disk before it returns."""
    for _, path in walk_files(directory):
        _sync(path)
    for root, _, _ in os.walk(directory, topdown=False):
        _sync(Path(root))


def sync_directory(directory: Path) -> None:
    """Puts the names in one directory on disk, so that a rename survives a power cut."""
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Removes a file, a symbolic link or a directory with all it holds; does nothing if there is none."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def lacks_room(error: BaseException | None) -> bool:
    """Whether an exception, or one it came from, says that the disk, quota or file size limit is used up."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        # Native writers (safetensors, onnxruntime) raise their own types, with the errno only in the text.
        if isinstance(error, Exception) and os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_error(what: str, path: Path, error: BaseException, *, cached: bool = True) -> ArtifactWriteError:
    """The one-sentence error for ``what`` (a human label) that could not be written to ``path``.

    What to do about it depends on whether that is the cache or a place the user chose.
    """
    if lacks_room(error):
        remedy = "free some, or choose a directory on another disk."
        if cached:
            remedy = (
                "free some space on that disk (`qefficient cache gc` removes old artefacts) or set QEFF_HOME to a "
                "directory on a larger one."
            )
        return ArtifactWriteError(f"There is no space left to write {what} to {path}: {remedy}")
    reason = getattr(error, "strerror", None) or str(error)
    remedy = (
        "make it writable or set QEFF_HOME to a directory that is."
        if cached
        else ("choose a directory that can be written.")
    )
    return ArtifactWriteError(f"{what} cannot be written to {path} ({reason}): {remedy}")


@contextlib.contextmanager
def write_errors(what: str, path: Path) -> Iterator[None]:
    """Turns an OSError of the body into the one-sentence ``ArtifactWriteError``."""
    try:
        yield
    except ArtifactWriteError:
        raise
    except OSError as error:
        raise write_error(what, path, error) from error

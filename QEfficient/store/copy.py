"""Copies a directory out of the store: independent files, whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from QEfficient.store.entry import ENTRY_FILE
from QEfficient.store.files import copy_file, remove_tree, walk_files, write_errors


def copy_tree(source: Path, destination: Path) -> None:
    """Copies every file but the store's own record; ``destination`` must not exist or be an empty directory.

    Raises:
        ArtifactWriteError: the disk is full or not writable; nothing is left at ``destination``.
    """
    destination = Path(destination).absolute()
    temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.partial")
    with write_errors(f"A copy of {source.name}", destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            for name, path in walk_files(source):
                if name == ENTRY_FILE:
                    continue
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(path, temporary / name)
            if destination.is_dir():
                destination.rmdir()
            os.rename(temporary, destination)
        finally:
            remove_tree(temporary)

"""What a compiler left in ``programqpc.bin``: a container of the vendor's, a stand-in's mark, or something else."""

from __future__ import annotations

import struct
from pathlib import Path

from QEfficient.errors import QEfficientError

#: First four bytes, little endian, of a container as the open runtime reads it.
CONTAINER_MAGIC = 0x00A1CD7C
#: First bytes of what a stand-in toolchain writes, so that nothing takes it for a program.
STAND_IN_MAGIC = b"QEFFICIENT-STAND-IN"


def is_stand_in(path: Path) -> bool:
    """Whether a binary is a stand-in's: it was made without a compiler and runs on no card.

    Raises:
        QEfficientError: the file is empty.
    """
    with path.open("rb") as file:
        head = file.read(len(STAND_IN_MAGIC))
    if not head:
        raise QEfficientError(f"the compiler ended well but left {path.name} empty: check the SDK.")
    return head == STAND_IN_MAGIC


def is_container(path: Path) -> bool:
    """Whether a binary begins as the vendor's containers do."""
    with path.open("rb") as file:
        head = file.read(4)
    return len(head) == 4 and struct.unpack("<I", head)[0] == CONTAINER_MAGIC

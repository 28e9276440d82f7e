"""What a compiler left in ``programqpc.bin``: a program, a stand-in's mark, or nothing."""

from __future__ import annotations

from pathlib import Path

from QEfficient.errors import QEfficientError

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

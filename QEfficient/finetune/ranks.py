"""What the processes of one run must agree on before they train together."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from QEfficient.errors import OptionError
from QEfficient.finetune.checkpoint import checkpoints

_Value = TypeVar("_Value")
#: What the process that writes holds while a run is under way.
LOCK = ".lock"


def agreed(value: _Value) -> _Value:
    """The first process's value, on every process; every process has to call it."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def shared_checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first, as the process that writes them sees them.

    A process that looked for itself could see them before the first one has removed them, and start elsewhere.

    Raises:
        OptionError: this process does not see the directory that the first one writes to.
    """
    names, together = agreed(([path.name for path in checkpoints(output)], (output / LOCK).exists()))
    if together and not (output / LOCK).exists():
        raise OptionError(
            f"the first process writes to {output.absolute()}, which this one (rank {dist.get_rank()}) does not see: "
            "put output_dir on a file system that every host has."
        )
    return [output / name for name in names]

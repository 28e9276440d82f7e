"""A trained model as one safetensors file: trained tensors from memory, all others streamed from where they lie."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from QEfficient.finetune.checkpoint import save_tensors
from QEfficient.safetensors_io import SafetensorsWriter, TensorRef, WeightMap


@dataclass(frozen=True)
class BaseFiles:
    """What a model has besides its trained tensors.

    Attributes:
        find_weights: workspace directory -> every tensor of the base model; None when all of them train.
        aliases: names that share a tensor -> the one name it is trained under.
        extra: files that belong beside the weights.
    """

    find_weights: Callable[[Path], WeightMap] | None
    aliases: Mapping[str, str]
    extra: tuple[Path, ...] = ()


def write_model(trained: Mapping[str, np.ndarray], path: Path, base: BaseFiles | None = None) -> None:
    """Writes a model's weights. Tensors that did not train keep the precision their checkpoint stores.

    Args:
        trained: name -> float32 value.
        base: None when ``trained`` is all.
    """
    if base is None or base.find_weights is None:
        save_tensors(trained, path)
        return
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=path.parent) as scratch:
        found = base.find_weights(Path(scratch))
        kept = {name: ref for name, ref in found.items() if base.aliases.get(name, name) not in trained}
        plan = [(name, "F32", array.shape) for name, array in trained.items()]
        plan += [(name, ref.dtype, ref.shape) for name, ref in kept.items()]
        writer = SafetensorsWriter(path, plan)
        try:
            for name, array in trained.items():
                writer.write(name, np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint8).data)
            for name, ref in kept.items():
                _copy(writer, name, ref)
        finally:
            writer.close()


def _copy(writer: SafetensorsWriter, name: str, ref: TensorRef) -> None:
    if ref.length == 0:
        writer.write(name, b"")
        return
    with (
        ref.file.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as whole,
        whole[ref.offset : ref.offset + ref.length] as part,
    ):
        writer.write(name, part)

"""Checkpoint names -> module names, with transformers' own conversion rules (stacked experts, renamed parts)."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from QEfficient.errors import ExportError
from QEfficient.safetensors_io import ITEM_SIZES, SafetensorsWriter, TensorRef, WeightMap, read_header

CONVERTED_FILE = "converted.safetensors"
_TORCH_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def module_weights(ghost: PreTrainedModel, stored: WeightMap, workspace: Path) -> WeightMap:
    """Maps a checkpoint's tensors to the names ``ghost`` uses.

    Tensors that only change name stay where they are. Those that must be stacked, split or transposed are written to
    ``workspace/converted.safetensors``, one target at a time.

    Raises:
        ExportError: a conversion rule of transformers failed on this checkpoint.
    """
    rules = get_model_conversion_mapping(ghost)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    targets = ghost.state_dict()
    prefix = ghost.base_model_prefix
    out: WeightMap = {}
    pending: dict[str, WeightConverter] = {}
    dtypes: dict[str, str] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, targets)
        if name not in targets and key in targets:
            name, pattern = rename_source_key(key, [], [], prefix, targets)
        if name not in targets:
            continue  # weights of another head, rotary caches of old releases and the like
        if pattern is None:
            out[name] = stored[key]
            continue
        converter = pending.setdefault(name, copy.deepcopy(by_pattern[pattern]))
        dtypes.setdefault(name, stored[key].dtype)
        # transformers annotates a Future here and also takes a function, as its own synchronous loading passes.
        loader: Any = partial(_load, stored[key], key)
        converter.add_tensor(name, key, pattern, loader)
    if pending:
        out |= _convert(ghost, pending, dtypes, workspace / CONVERTED_FILE)
    return out


def _load(ref: TensorRef, key: str) -> torch.Tensor:
    with safe_open(ref.file, framework="pt") as file:
        return file.get_tensor(key)


def _convert(
    ghost: PreTrainedModel, pending: dict[str, WeightConverter], dtypes: dict[str, str], path: Path
) -> WeightMap:
    """Runs the converters in turn; each one's results are appended to ``path`` and dropped."""
    shapes = {name: tuple(t.shape) for name, t in ghost.state_dict().items()}
    plan: list[tuple[str, str, tuple[int, ...]]] = []
    outputs: dict[str, list[str]] = {}
    for name, converter in pending.items():
        outputs[name] = _target_names(name, converter, shapes)
        plan += [(target, dtypes[name], shapes[target]) for target in outputs[name]]
    writer = SafetensorsWriter(path, plan)
    try:
        for name, converter in pending.items():
            try:
                results = converter.convert(name, model=ghost, config=ghost.config)
            except (RuntimeError, ValueError, KeyError, IndexError) as error:
                raise ExportError(f"transformers could not convert the checkpoint's {name}: {error}") from error
            for target in outputs[name]:
                value = results[target]
                tensor = value[0] if isinstance(value, list) else value
                if tuple(tensor.shape) != shapes[target] or _TORCH_NAMES[tensor.dtype] != dtypes[name]:
                    raise ExportError(f"the converted {target} has shape {tuple(tensor.shape)}, not {shapes[target]}.")
                writer.write(target, _bytes(tensor))
            del results
    finally:
        writer.close()
    return read_header(path)


def _target_names(name: str, converter: WeightConverter, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """All tensors a converter makes: its first target pattern occurs in ``name``, the others replace it there."""
    first = converter.target_patterns[0]
    names = [name.replace(first, pattern) for pattern in converter.target_patterns] if first in name else [name]
    return [n for n in names if n in shapes]


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    data = memoryview(flat.numpy().data)
    if len(data) != tensor.numel() * ITEM_SIZES[_TORCH_NAMES[tensor.dtype]]:
        raise ExportError("a tensor's bytes do not match its size")
    return data


def save_module_weights(model: PreTrainedModel, path: Path) -> WeightMap:
    """Writes the parameters and persistent buffers of a model in memory, shared ones once, one at a time."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if identity in seen and tensor.numel():
            continue
        seen.add(identity)
        if tensor.dtype not in _TORCH_NAMES:
            raise ExportError(f"{name} has dtype {tensor.dtype}, which cannot be exported.")
        tensors[name] = tensor
    writer = SafetensorsWriter(path, [(n, _TORCH_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()])
    try:
        for name, tensor in tensors.items():
            writer.write(name, _bytes(tensor.to("cpu")))
    finally:
        writer.close()
    return read_header(path)

"""A training step's model from a checkpoint on disk: frozen weights stay where they are, only trained ones are read."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from QEfficient.errors import ExportError, OptionError
from QEfficient.exporter.adapters import scaling_vector
from QEfficient.exporter.program import model_facts
from QEfficient.exporter.quiet import quiet
from QEfficient.exporter.training.program import choose_trained
from QEfficient.finetune.step_model import StepModel, check_kind, file_names_of, identity_of, skeleton_of
from QEfficient.models.source import CheckpointSource
from QEfficient.safetensors_io import TensorRef, WeightMap
from QEfficient.store.digest import DigestMemo
from QEfficient.suggest import did_you_mean

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def from_checkpoint(
    source: CheckpointSource,
    factory: str,
    memo: DigestMemo,
    *,
    peft_config: Any = None,
    adapter_name: str = "default",
    trainable: Sequence[str] | None = None,
) -> StepModel:
    """A checkpoint whose frozen weights are never loaded: the package points at its files.

    Args:
        factory: an Auto class of transformers (``AutoModelForCausalLM`` …).
        peft_config: a ``peft`` configuration of the adapter to train; None trains what ``trainable`` names, or all.
        trainable: patterns of parameter names.

    Raises:
        OptionError: LoRA targets or patterns that match nothing, or an initialisation that needs the weights.
    """
    ghost = source.ghost(factory)
    check_kind(ghost)

    def find(workspace: Path) -> WeightMap:
        return dict(source.weights(source.ghost(factory), workspace))

    if peft_config is not None:
        skeleton: nn.Module = _with_adapter(ghost, peft_config, adapter_name)
        adapter: str | None = adapter_name
        names = file_names_of(skeleton, adapter)
        trained = {n: p for n, p in skeleton.named_parameters() if p.requires_grad}
    else:
        adapter, skeleton = None, ghost
        names = file_names_of(ghost, None)
        for parameter in skeleton.parameters():
            parameter.requires_grad_(trainable is None and parameter.is_floating_point())
        chosen = choose_trained(skeleton, trainable)
        trained = _load_trained(source, factory, skeleton, chosen)
    return StepModel(
        name=source.name,
        skeleton=skeleton_of(skeleton, set(trained)),
        trained={n: nn.Parameter(p.detach().float().clone()) for n, p in trained.items()},
        file_names=names,
        adapter=adapter,
        scaling=scaling_vector(skeleton, adapter) if adapter is not None else None,
        identity=identity_of(source.identity(memo), trained, names, adapter, peft_config, skeleton),
        find_weights=find,
        facts=model_facts(ghost),
        config=ghost.config,
        peft_config=peft_config,
    )


def _load_trained(
    source: CheckpointSource, factory: str, skeleton: nn.Module, names: Sequence[str]
) -> dict[str, nn.Parameter]:
    """The content of the tensors that train, read one at a time."""
    out: dict[str, nn.Parameter] = {}
    with tempfile.TemporaryDirectory() as scratch:
        refs = source.weights(source.ghost(factory), Path(scratch))
        groups: dict[int, list[str]] = {}
        for name, parameter in skeleton.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        aliases = {name: group for group in groups.values() for name in group}
        for name in names:
            found = next((n for n in aliases[name] if n in refs), None)
            if found is None:
                shape = dict(skeleton.named_parameters())[name].shape
                if "classifier" in name or "score" in name:  # a new head, as transformers would make one
                    out[name] = nn.Parameter(_fresh(shape, name))
                    continue
                raise ExportError(f"the checkpoint lacks {name}, which should train: it is incomplete.")
            out[name] = nn.Parameter(_read(refs[found]).float())
    return out


def _read(ref: TensorRef) -> torch.Tensor:
    with ref.file.open("rb") as file:
        file.seek(ref.offset)
        return torch.frombuffer(bytearray(file.read(ref.length)), dtype=_DTYPES[ref.dtype]).reshape(ref.shape)


def _fresh(shape: torch.Size, name: str) -> torch.Tensor:
    return torch.zeros(shape) if name.endswith("bias") else torch.randn(shape) * 0.02


def _with_adapter(ghost: Any, peft_config: Any, adapter_name: str) -> nn.Module:
    from peft import get_peft_model

    start = getattr(peft_config, "init_lora_weights", True)
    if start not in (True, False, "gaussian"):
        raise OptionError(f"init_lora_weights={start!r} needs the base weights in memory: use True or 'gaussian'.")
    try:
        with quiet():
            return get_peft_model(ghost, copy.deepcopy(peft_config), adapter_name=adapter_name)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        leaves = sorted({n.rpartition(".")[2] for n, m in ghost.named_modules() if isinstance(m, nn.Linear)})
        wanted = peft_config.target_modules
        first = wanted if isinstance(wanted, str) else sorted(wanted)[0]
        raise OptionError(
            f"LoRA target_modules {wanted!r} match nothing in {type(ghost).__name__}, whose linear layers are "
            f"{leaves}.{did_you_mean(first, leaves)}"
        ) from None

"""A training step's model from a checkpoint on disk: frozen weights stay where they are, only trained ones are read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from QEfficient.errors import OptionError
from QEfficient.exporter.adapters import adapted_modules
from QEfficient.exporter.program import model_facts
from QEfficient.exporter.quiet import quiet
from QEfficient.exporter.training.program import choose_trained
from QEfficient.finetune.adapter_start import adapter_starts
from QEfficient.finetune.initial import Start, initial_values
from QEfficient.finetune.step_model import StepModel, check_kind, file_names_of, identity_of, scaling_of, skeleton_of
from QEfficient.models.source import CheckpointSource
from QEfficient.safetensors_io import WeightMap
from QEfficient.store.digest import DigestMemo
from QEfficient.suggest import did_you_mean


def from_checkpoint(
    source: CheckpointSource,
    factory: str,
    memo: DigestMemo,
    *,
    peft_config: Any = None,
    adapter_name: str = "default",
    trainable: Sequence[str] | Callable[[Any], Sequence[str]] | None = None,
    new_head: bool = False,
) -> StepModel:
    """A checkpoint whose frozen weights are never loaded: the package points at its files.

    Args:
        factory: an Auto class of transformers (``AutoModelForCausalLM`` …).
        peft_config: a ``peft`` configuration of the adapter to train; None trains what ``trainable`` names, or all.
        trainable: patterns of parameter names, or a function of the model that returns them.
        new_head: draw a classifier's head anew, whatever the checkpoint has.

    Raises:
        OptionError: LoRA targets or patterns that match nothing, or an initialisation that needs the weights.
        ExportError: the checkpoint lacks a tensor that should train.
    """
    ghost = source.ghost(factory)
    check_kind(ghost)
    ghost.config.architectures = [type(ghost).__name__]

    def find(workspace: Path) -> WeightMap:
        return dict(source.weights(source.ghost(factory), workspace))

    completed = None
    if peft_config is not None:
        adapted = _with_adapter(ghost, peft_config, adapter_name)
        skeleton: nn.Module = adapted
        adapter: str | None = adapter_name
        completed = adapted.peft_config[adapter_name]
        completed.base_model_name_or_path = _place(source)
        trained = {n: p for n, p in skeleton.named_parameters() if p.requires_grad}
    else:
        adapter, skeleton = None, ghost
        if callable(trainable):
            trainable = trainable(ghost)
        for parameter in skeleton.parameters():
            parameter.requires_grad_(trainable is None and parameter.is_floating_point())
        named = dict(skeleton.named_parameters())
        trained = {name: named[name] for name in choose_trained(skeleton, trainable)}
    names = file_names_of(skeleton, adapter)
    if adapter is None:
        starts = {name: Start(name) for name in trained}
    else:
        starts = adapter_starts(skeleton, trained, adapter)
    contents = initial_values(source, factory, starts, new_head)
    return StepModel(
        name=source.name,
        skeleton=skeleton_of(skeleton, set(trained)),
        trained={n: nn.Parameter(contents.get(n, p).detach().float().clone()) for n, p in trained.items()},
        file_names=names,
        adapter=adapter,
        scaling=scaling_of(skeleton, adapter),
        identity=identity_of(source.identity(memo), trained, names, adapter, peft_config, skeleton),
        find_weights=find,
        facts=model_facts(ghost),
        config=ghost.config,
        peft_config=completed,
        own_config=source.changes_config,
    )


def _place(source: CheckpointSource) -> str:
    """What an adapter's configuration calls its base model: a hub id, or a directory that is found from anywhere."""
    return str(source.directory.resolve()) if Path(source.name).expanduser().is_dir() else source.name


def _with_adapter(ghost: Any, peft_config: Any, adapter_name: str) -> Any:
    from peft import get_peft_model

    start = getattr(peft_config, "init_lora_weights", True)
    if start not in (True, False, "gaussian"):
        raise OptionError(f"init_lora_weights={start!r} needs the base weights in memory: use True or 'gaussian'.")
    wanted = peft_config.target_modules
    asked = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    leaves = sorted({name.rpartition(".")[2] for name, module in ghost.named_modules() if _is_linear(module)})
    _check_whole(ghost, peft_config)
    lost = asked
    try:
        with quiet():
            model = get_peft_model(ghost, copy.deepcopy(peft_config), adapter_name=adapter_name)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise OptionError(f"lora_config does not fit {type(ghost).__name__}: {_sentence(error)}") from error
    else:
        found = [f".{name}" for name in adapted_modules(model)]
        # PEFT is content when one of several names matches; a single text is a pattern.
        lost = [a for a in asked if not isinstance(wanted, str) and not any(n.endswith(f".{a}") for n in found)]
    narrowed = [n for n in ("layers_to_transform", "exclude_modules") if getattr(peft_config, n, None) is not None]
    if lost and narrowed:
        given = ", ".join(f"{name}={getattr(peft_config, name)}" for name in narrowed)
        raise OptionError(
            f"LoRA target_modules {lost} with {given} match nothing in {type(ghost).__name__}, which has "
            f"{getattr(ghost.config, 'num_hidden_layers', 'no')} layers (from 0): change one of them."
        )
    if lost:
        raise OptionError(
            f"target_modules {lost} match nothing in {type(ghost).__name__}, whose linear layers are {leaves}."
            f"{did_you_mean(lost[0], leaves)}"
        )
    return model


def _check_whole(ghost: Any, peft_config: Any) -> None:
    """OptionError for modules to train besides the adapter that are not there, and tokens the embedding has not."""
    modules = [name for name, _ in ghost.named_modules()]
    tokens = getattr(peft_config, "trainable_token_indices", None) or {}
    rows = tokens if isinstance(tokens, dict) else {"": tokens}
    named = [("modules_to_save", name) for name in peft_config.modules_to_save or ()]
    named += [("trainable_token_indices", name) for name in rows]
    for option, wanted in named:
        if not any(name.endswith(wanted) for name in modules):  # PEFT's rule
            last = sorted({name.rpartition(".")[2] for name in modules})
            raise OptionError(
                f"{option} has {wanted!r}, and {type(ghost).__name__} has no such module.{did_you_mean(wanted, last)}"
            )
    largest = max((index for part in rows.values() for index in part), default=-1)
    if largest >= (size := ghost.get_input_embeddings().num_embeddings):
        raise OptionError(f"trainable_token_indices has {largest}, and the model has {size} tokens, counted from 0.")


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"

"""Export of a prepared, weightless model: trace, name, attach weights, clean up, write ``model.onnx``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from QEfficient.errors import ExportError, QEfficientError
from QEfficient.exporter.attach import attach
from QEfficient.exporter.cleanup import clean_up
from QEfficient.exporter.interface import ONNX_FILE, Interface
from QEfficient.exporter.lora import AdaptedCausalStep, graph_name, lora_specs
from QEfficient.exporter.naming import name_dimensions, name_initializers
from QEfficient.exporter.to_onnx import to_onnx
from QEfficient.exporter.twins import meta_twin
from QEfficient.onnx_io import save_model, weight_files
from QEfficient.safetensors_io import WeightMap
from QEfficient.store.files import place_file
from QEfficient.targets.manifest import StateSpec, TensorSpec
from QEfficient.transforms.onnx.lora_adapters import LoraAdapters
from QEfficient.transforms.pytorch.patching import patched, use_our_attention
from QEfficient.transforms.pytorch.pooling import Pool
from QEfficient.transforms.pytorch.state import StateLayout, StateTensor, probe
from QEfficient.transforms.pytorch.wrappers import CausalStep, Encoder

#: Sizes used while tracing; all become symbols. Above 1, because torch specialises 0 and 1, and pairwise different.
_BATCH, _SEQ, _CAPACITY, _ROWS = 2, 3, 16, 4


def export_causal(
    ghost: PreTrainedModel, weights: WeightMap, directory: Path, *, batch_index: bool, lora: bool = False
) -> Interface:
    """Writes the step graph of a causal LM into ``directory``; see `CausalStep` for its signature.

    Args:
        ghost: weightless model with a config of its own (it is changed).
        batch_index: whether rows address slots of a larger state (continuous batching).
        lora: ``ghost`` has LoRA layers (`inject_lora`); their tensors and scaling become parameters of the graph.

    Raises:
        UnsupportedModelError: the model keeps no cache or has no head.
        ExportError: tracing failed or weights do not fit the model.
    """
    layout = probe_layout(ghost)
    use_our_attention(ghost)
    step = (AdaptedCausalStep if lora else CausalStep)(ghost, layout).eval()
    rows = _ROWS if batch_index else _BATCH
    row_dim = "full_batch_size" if batch_index else "batch_size"
    dynamic = torch.export.Dim.DYNAMIC
    positions = torch.arange(_SEQ)[None] + torch.arange(_BATCH)[:, None]
    args: list[Any] = [torch.ones(_BATCH, _SEQ, dtype=torch.long), positions]
    args.append([t.zeros(rows, _CAPACITY) for t in layout.tensors])
    shapes: list[Any] = [{0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic}]
    shapes.append([{0: dynamic} | ({t.capacity_dim: dynamic} if t.capacity_dim else {}) for t in layout.tensors])
    names = ["input_ids", "position_ids", *(t.name for t in layout.tensors)]
    dims: dict[str, tuple[int | str | None, ...]] = {
        "input_ids": ("batch_size", "seq_len"),
        "position_ids": ("batch_size", "seq_len"),
    }
    dims |= {t.name: _state_shape(t, row_dim) for t in layout.tensors}
    if batch_index:
        args.append(torch.arange(_BATCH)[:, None])
        shapes.append({0: dynamic})
        names.append("batch_index")
        dims["batch_index"] = ("batch_size", 1)
    model = to_onnx(
        step,
        tuple(args),
        tuple(shapes),
        names,
        ["logits", *(t.output_name for t in layout.tensors)],
        lambda: patched(ghost),
    )
    states = tuple(
        StateSpec(
            t.name,
            t.output_name,
            _dtype_name(t.dtype),
            _state_shape(t, row_dim),
            "kv" if t.capacity_dim else t.kind,
        )
        for t in layout.tensors
    )
    own = [n for n in names if n in ("input_ids", "position_ids", "batch_index")]
    inputs = tuple(TensorSpec(n, "int64", tuple(d for d in dims[n] if d is not None)) for n in own)
    interface = Interface("text-generation", inputs, (), states, model_facts(ghost))
    if lora:
        interface = dataclasses.replace(interface, parameters=lora_specs(ghost))
    return _finish(model, ghost, weights, directory, interface, dims)


def probe_layout(ghost: PreTrainedModel) -> StateLayout:
    """The states of a model, read off a run without weights (`probe`).

    Raises:
        UnsupportedModelError: the model keeps no cache.
        ExportError: it cannot run without weights, for example because its control flow depends on values.
    """
    try:
        return probe(meta_twin(ghost))
    # A model's own code runs here; these are what torch and Python raise for one that needs real values.
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, LookupError) as error:
        if isinstance(error, QEfficientError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"{type(ghost).__name__} cannot be probed for its state: {reason[:300]}") from error


def export_encoder(
    ghost: PreTrainedModel,
    weights: WeightMap,
    directory: Path,
    *,
    task: str,
    pool: Pool | None,
) -> Interface:
    """Writes a model without state: ``output`` for embeddings, ``logits`` for classification.

    Raises:
        ExportError: tracing failed or weights do not fit the model.
    """
    use_our_attention(ghost)
    name, attribute = ("logits", "logits") if task == "text-classification" else ("output", "last_hidden_state")
    wrapper = Encoder(ghost, pool, attribute).eval()
    dynamic = torch.export.Dim.DYNAMIC
    count = 3 if wrapper.takes_token_types else 2
    mask = torch.ones(_BATCH, _SEQ, dtype=torch.long)
    mask[0, -1] = 0
    args = (torch.ones(_BATCH, _SEQ, dtype=torch.long), mask, torch.zeros(_BATCH, _SEQ, dtype=torch.long))[:count]
    names = ["input_ids", "attention_mask", "token_type_ids"][:count]
    dims: dict[str, tuple[int | str | None, ...]] = dict.fromkeys(names, ("batch_size", "seq_len"))
    shape = {0: dynamic, 1: dynamic}
    model = to_onnx(wrapper, args, (shape,) * count, names, [name], lambda: patched(ghost))
    inputs = tuple(TensorSpec(n, "int64", ("batch_size", "seq_len")) for n in names)
    interface = Interface(task, inputs, (), (), model_facts(ghost))
    return _finish(model, ghost, weights, directory, interface, dims)


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What a package says about its model; see `Interface`."""
    config = model.config.get_text_config(decoder=True)
    facts: dict[str, Any] = {
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "vocab_size": getattr(config, "vocab_size", None),
        "hidden_size": getattr(config, "hidden_size", None),
        "max_positions": max_positions(model),
        "token_types": getattr(config, "type_vocab_size", None),
        "parameters": sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n),
    }
    labels = getattr(model.config, "id2label", None)
    if labels:
        facts["labels"] = {str(k): v for k, v in labels.items()}
    return facts


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest input the model has positions for; None when its positions have no end (ALiBi, state space)."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        limit = getattr(config, "max_seq_len", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        # Position tables with a padding index (RoBERTa and kin) start counting after it.
        if isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] == "position_embeddings":
            if module.padding_idx is not None:
                return module.num_embeddings - module.padding_idx - 1
            return min(limit, module.num_embeddings)
    return limit


def _finish(
    model: ir.Model,
    ghost: PreTrainedModel,
    weights: WeightMap,
    directory: Path,
    interface: Interface,
    dims: dict[str, tuple[int | str | None, ...]],
) -> Interface:
    fed = {spec.name for spec in interface.parameters}
    rename = graph_name if fed else None
    name_initializers(model, rename)
    name_dimensions(model, dims)
    groups = _names(ghost, rename)
    parameters = {name for names in groups for name in names} - fed
    attach(model, weights, parameters, _aliases(groups, weights))
    for location, file in weight_files(model).items():
        place_file(file, directory / location)
    if fed:  # before anything folds the zeros that stand for them
        LoraAdapters(tuple(spec.name for spec in interface.parameters)).apply(model, directory)
    clean_up(model)
    name_dimensions(model, dims)
    _check_interface(model, interface)
    outputs = _output_specs(model, {s.output for s in interface.states})
    interface = dataclasses.replace(interface, outputs=outputs)
    model.producer_name = "QEfficient"
    save_model(model, directory / ONNX_FILE)
    return interface


def _names(ghost: PreTrainedModel, rename: Callable[[str], str] | None) -> list[list[str]]:
    """The names the graph uses for each parameter; several where modules share it."""
    groups: dict[int, list[str]] = {}
    for name, parameter in ghost.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name if rename is None else rename(name))
    return list(groups.values())


def _aliases(groups: list[list[str]], weights: WeightMap) -> dict[str, str]:
    """For tensors that share storage: a name the checkpoint does not have -> one it has."""
    out = {}
    for names in groups:
        stored = next((name for name in names if name in weights), None)
        if stored is not None:
            out.update({name: stored for name in names if name not in weights})
    return out


def _check_interface(model: ir.Model, interface: Interface) -> None:
    """The graph must have exactly the inputs the interface names: tracing drops what the model ignores."""
    expected = {t.name for t in (*interface.inputs, *interface.parameters)} | {s.input for s in interface.states}
    found = {value.name for value in model.graph.inputs}
    if expected != found:
        raise ExportError(
            f"the exported graph's inputs differ from the plan: missing {sorted(expected - found)}, "
            f"unexpected {sorted(str(f) for f in found - expected)}."
        )


def _state_shape(tensor: StateTensor, rows: str) -> tuple[int | str, ...]:
    return (rows, *("ctx_len" if d is None else d for d in tensor.shape))


def _output_specs(model: ir.Model, states: set[str]) -> tuple[TensorSpec, ...]:
    specs = []
    for value in model.graph.outputs:
        if value.name in states:
            continue
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ())
        dtype = value.dtype.numpy().name if value.dtype is not None else "float32"
        specs.append(TensorSpec(str(value.name), dtype, shape))
    return tuple(specs)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Export of a training step: capture, lower, name, attach the frozen weights, clean up, write ``model.onnx``."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from torch import nn

from QEfficient.errors import ExportError, OptionError
from QEfficient.exporter.adapters import SCALING_INPUT
from QEfficient.exporter.attach import attach
from QEfficient.exporter.interface import ONNX_FILE, Interface
from QEfficient.exporter.quiet import quiet
from QEfficient.exporter.training.fusion import fuse
from QEfficient.exporter.training.joint import joint_program
from QEfficient.exporter.training.lowering import Lowered, lower
from QEfficient.exporter.training.steps import ClassificationStep, StepInput, TokenStep
from QEfficient.onnx_io import save_model, weight_files
from QEfficient.safetensors_io import WeightMap
from QEfficient.store.files import place_file
from QEfficient.suggest import did_you_mean
from QEfficient.targets.manifest import TensorSpec
from QEfficient.transforms.onnx.lora_adapters import LoraAdapters
from QEfficient.transforms.pytorch.training import training_patches

TASK = "training"
#: Sizes used while tracing; above 1, because torch specialises 0 and 1, and pairwise different.
_SIZES = {"batch_size": 3, "seq_len": 7, "rows": 5}
_TORCH = {"int64": torch.int64, "float32": torch.float32}


@dataclass(frozen=True)
class TrainingGraph:
    """A captured step before weights are attached.

    Attributes:
        model: the ONNX model; parameters are initializers without content, named as in ``names``' values.
        trained: file names of the trained tensors, in the order of the gradient outputs ``grad/<name>``.
        inputs: the data inputs, and the scaling of an adapter.
    """

    model: ir.Model
    trained: tuple[str, ...]
    inputs: tuple[StepInput, ...]


def capture_step(step: TokenStep | ClassificationStep, file_name: Callable[[str], str]) -> TrainingGraph:
    """Captures a step whose trained parameters have ``requires_grad``.

    Args:
        file_name: the wrapped model's parameter name -> the name it has in files and in the graph.

    Raises:
        ExportError: the model cannot be captured, or an operator of its backward pass has no ONNX form.
    """
    args = tuple(_example(spec) for spec in step.inputs)
    auto = torch.export.Dim.DYNAMIC
    each = [{i: auto for i, d in enumerate(spec.dims) if isinstance(d, str)} for spec in step.inputs]
    named = sum(p.kind is not p.VAR_POSITIONAL for p in inspect.signature(step.forward).parameters.values())
    # torch.export takes the shapes of *arguments as one entry.
    shapes = (*each[:named], tuple(each[named:])) if len(each) > named else tuple(each)
    with quiet(), training_patches():
        program = joint_program(step, args, shapes)
    symbols = _symbols(program, step.inputs)
    lowered = lower(program, [spec.name for spec in step.inputs], list(step.outputs), symbols)
    trained = _rename(lowered, file_name)
    _tidy(lowered.model)
    fuse(lowered.model)
    lowered.model.graph.sort()
    return TrainingGraph(lowered.model, trained, step.inputs)


def write_training_graph(
    graph: TrainingGraph, weights: WeightMap, aliases: Mapping[str, str], directory: Path, facts: dict[str, Any]
) -> Interface:
    """Makes trained tensors inputs, points frozen weights at their files and writes ``model.onnx`` into ``directory``.

    Args:
        weights: every frozen tensor, by its name in the graph.
        aliases: for tied tensors, a name in the graph -> the name ``weights`` has.

    Raises:
        ExportError: a weight is missing or has another shape.
    """
    model = graph.model
    shapes = {name: model.graph.initializers[name].shape for name in graph.trained}
    held = [TensorSpec(name, "float32", _fixed(shape)) for name, shape in shapes.items()]
    held += [TensorSpec(i.name, i.dtype, i.dims) for i in graph.inputs if i.name == SCALING_INPUT]
    LoraAdapters(graph.trained).apply(model, directory)
    frozen = {name for name, value in model.graph.initializers.items() if value.const_value is None}
    attach(model, weights, frozen, dict(aliases))
    cast_where_used(model)
    for location, file in weight_files(model).items():
        place_file(file, directory / location)
    inputs = tuple(TensorSpec(i.name, i.dtype, i.dims) for i in graph.inputs if i.name != SCALING_INPUT)
    outputs = tuple(_spec(value) for value in model.graph.outputs)
    facts = {**facts, "trained": list(graph.trained)}
    model.producer_name = "QEfficient"
    save_model(model, directory / ONNX_FILE)
    return Interface(TASK, inputs, outputs, (), facts, tuple(held))


def cast_where_used(model: ir.Model) -> int:
    """Gives every reader of a weight stored in another precision a Cast of its own, right before it.

    One Cast for all readers would keep a float32 copy of the whole model from the first layer's forward pass to its
    backward pass. Rows gathered from a table are cast after the gathering. Returns how many weights were changed.
    """
    graph, changed = model.graph, 0
    for cast in [n for n in graph if n.op_type == "Cast" and n.inputs[0] is not None and n.inputs[0].is_initializer()]:
        source, old = cast.inputs[0], cast.outputs[0]
        assert source is not None
        for use in list(old.uses()):
            reader = use.node
            attributes = {"to": cast.attributes["to"].value}
            if reader.op_type == "Gather" and use.idx == 0:
                out = reader.outputs[0]
                users = list(out.uses())
                reader.replace_input_with(0, source)
                late = ir.node("Cast", [out], attributes, name=f"{reader.name}/cast")
                late.outputs[0].shape, late.outputs[0].type = out.shape, out.type
                late.outputs[0].name = f"{out.name}_cast"
                out.type = ir.TensorType(source.dtype) if source.dtype is not None else None
                for user, place in users:
                    user.replace_input_with(place, late.outputs[0])
                graph.insert_after(reader, late)
                continue
            own = ir.node("Cast", [source], attributes, name=f"{cast.name}/{reader.name}")
            own.outputs[0].shape, own.outputs[0].type = old.shape, old.type
            own.outputs[0].name = f"{old.name}_{reader.name}"
            graph.insert_before(reader, own)
            reader.replace_input_with(use.idx, own.outputs[0])
        if not list(old.uses()) and not old.is_graph_output():
            graph.remove(cast, safe=True)
            changed += 1
    return changed


def choose_trained(model: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Sets ``requires_grad`` by name patterns (`fnmatch`), or keeps what is set when ``patterns`` is None.

    Returns:
        The names of the parameters that train.

    Raises:
        OptionError: a pattern matches nothing, or nothing trains.
    """
    named = dict(model.named_parameters())
    if patterns is not None:
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in named):
                raise OptionError(f"no parameter is called {pattern!r}.{did_you_mean(pattern, named)}")
        for name, parameter in named.items():
            parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    if not trained:
        raise OptionError("no parameter requires a gradient: add an adapter or name the parameters that train.")
    for name in trained:
        if not named[name].is_floating_point():
            raise OptionError(f"{name} holds {named[name].dtype} and cannot be trained: leave it out.")
    return trained


def _example(spec: StepInput) -> torch.Tensor:
    shape = [_SIZES[d] if isinstance(d, str) else d for d in spec.dims]
    if spec.name == "position_ids":
        return torch.arange(shape[1])[None].expand(shape[0], -1).contiguous()
    return torch.ones(shape, dtype=_TORCH[spec.dtype]) if spec.name != "rows" else torch.arange(shape[0])


def _symbols(program: torch.export.ExportedProgram, inputs: tuple[StepInput, ...]) -> dict[str, str]:
    """torch's symbols (``s28``) -> names of dimensions, read off the placeholders."""
    user = set(program.graph_signature.user_inputs)
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in user]
    symbols: dict[str, str] = {}
    for node, spec in zip(nodes, inputs, strict=True):
        for found, wanted in zip(node.meta["val"].shape, spec.dims, strict=True):
            if isinstance(wanted, str) and isinstance(found, int):
                raise ExportError(f"the model fixes {wanted} to {found} while it is traced and cannot be trained.")
            if isinstance(wanted, str):
                symbols.setdefault(str(found), wanted)
    return symbols


def _rename(lowered: Lowered, file_name: Callable[[str], str]) -> tuple[str, ...]:
    """Gives parameters and gradients the names files use; the wrapper's prefix goes."""
    graph = lowered.model.graph
    trained = tuple(file_name(name.removeprefix("model.")) for name in lowered.trained)
    for name, value in list(graph.initializers.items()):
        if name.startswith("model."):  # the wrapper's attribute
            graph.initializers.pop(name)
            value.name = file_name(name.removeprefix("model."))
            graph.initializers.add(value)
    gradients = [value for value in graph.outputs if (value.name or "").startswith("grad/")]
    for value, name in zip(gradients, trained, strict=True):
        value.name = f"grad/{name}"
    return trained


def _tidy(model: ir.Model) -> None:
    """Removes what nobody reads and joins what is computed twice."""
    ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(), passes.IdentityEliminationPass(), passes.RemoveUnusedNodesPass()
    )(model)


def _spec(value: ir.Value) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ())
    dtype = value.dtype.numpy().name if value.dtype is not None else "float32"
    return TensorSpec(str(value.name), dtype, shape)


def _fixed(shape: ir.Shape | None) -> tuple[int, ...]:
    return tuple(d for d in shape or () if isinstance(d, int))

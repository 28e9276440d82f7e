"""The graph a Cloud AI toolchain gets: which transforms make it, how it is written, what its inputs are then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from QEfficient.errors import OptionError, UnsupportedModelError
from QEfficient.targets.base import CompileRequest
from QEfficient.targets.cloud_check import data_dependent
from QEfficient.targets.manifest import Dim, Manifest, Specialization, TensorSpec
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.qaic_files import RETAINED

if TYPE_CHECKING:
    import onnx_ir as ir

ONNX_FILE = "model.onnx"
OPSET = 17


def transforms(options: CompileOptions, task: str, *, fp16: bool = True) -> tuple[str, ...]:
    """The queue that turns an exported graph into one the compiler takes; what is exported stays the same file.

    A training step needs operators the compiler has, and constants that fit 16 bits.
    """
    if task == "training":
        return ("FixTrainingOps:profile=qaic", f"LowerOpset:opset={OPSET}", "FP16Clip")
    queue: list[str] = []
    if task == "text-generation":
        queue.append(f"RotaryTables:ctx_len={options.ctx_len}")
        if options.num_speculative_tokens is not None:
            queue.append("KeepLogits")
        windows = options.ccl_enabled or options.comp_ctx_lengths_prefill or options.comp_ctx_lengths_decode
        queue.append(f"CacheFunctions:comp_ctx={str(bool(windows)).lower()}")
    queue += [f"LowerOpset:opset={OPSET}", "FP16Clip"]
    if options.aic_hw_version != "ai200":
        queue.append(f"NoBfloat16:wide={str(not fp16).lower()}")
    return (*queue, "NameLayers")


def write_graph(request: CompileRequest) -> tuple[ir.Model, Manifest]:
    """Writes ``model.onnx``, in which every parameter stays in device memory until it is sent again.

    Returns:
        The graph, and the manifest with the inputs, outputs and specializations that this graph has.

    Raises:
        OptionError: the graph has a dimension that the options do not fix; nothing was written then.
        UnsupportedModelError: the graph has shapes that depend on data; nothing was written then either.
        PackageError: ONNX Runtime does not take the graph.
    """
    import onnx_ir as ir

    from QEfficient.onnx_io import load_model, save_model
    from QEfficient.targets.host_runtime import check_program
    from QEfficient.targets.program_files import place_weights

    model = load_model(request.onnx_path)
    refuse_dependent(model, request.manifest)
    manifest = _described(model, request.manifest)
    place_weights([model], request)
    inputs = {value.name: value for value in model.graph.inputs}
    for spec in manifest.parameters:
        value = inputs[spec.name]
        kept = ir.Value(name=spec.name + RETAINED, type=value.type, shape=value.shape)
        model.graph.append(ir.Node("", "Identity", [value], outputs=[kept], name=f"/retained/{spec.name}"))
        model.graph.outputs.append(kept)
    save_model(model, request.directory / ONNX_FILE)
    check_program(request.directory / ONNX_FILE)
    return model, manifest


def refuse_dependent(model: ir.Model, manifest: Manifest) -> None:
    """UnsupportedModelError when a graph for inference has shapes that depend on data: the card has exact ones only."""
    node = data_dependent(model) if manifest.task != "training" else None
    if node is not None:
        raise UnsupportedModelError(
            f"{manifest.model.get('name')} has shapes that depend on data ({node.op_type}, node {node.name}), "
            "as experts that take the rows routed to them have, and Cloud AI takes exact shapes only: compile it for "
            "the host."
        )


def _described(model: ir.Model, manifest: Manifest) -> Manifest:
    """The manifest of this graph: transforms may have added inputs, or changed the shape of an output."""
    known = {spec.name for spec in (*manifest.inputs, *manifest.parameters)} | {s.input for s in manifest.states}
    added = tuple(_spec(value) for value in model.graph.inputs if value.name not in known)
    held = {state.output for state in manifest.states}
    outputs = tuple(_spec(value) for value in model.graph.outputs if value.name not in held)
    whole = manifest.replace(inputs=(*manifest.inputs, *added), outputs=outputs)
    return whole.replace(specializations=_fitting(whole))


def _spec(value: ir.Value) -> TensorSpec:
    shape: tuple[Dim, ...] = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ())
    return TensorSpec(str(value.name), value.dtype.numpy().name if value.dtype is not None else "float32", shape)


def _fitting(manifest: Manifest) -> tuple[Specialization, ...]:
    """The specializations with the symbols this graph has; a classifier's step has no ``rows``.

    Raises:
        OptionError: the graph has a symbol that nothing gives a size.
    """
    shapes = [spec.shape for spec in (*manifest.inputs, *manifest.parameters)]
    shapes += [state.shape for state in manifest.states]
    symbols = {dim for shape in shapes for dim in shape if isinstance(dim, str)}
    for specialization in manifest.specializations:
        loose = sorted(symbols - set(specialization.symbols))
        if loose:
            raise OptionError(
                f"the graph's dimension {loose[0]!r} has no size, and Cloud AI 100 takes exact sizes only: compile for "
                "the host."
            )
    return tuple(
        Specialization(s.name, {name: size for name, size in s.symbols.items() if name in symbols})
        for s in manifest.specializations
    )

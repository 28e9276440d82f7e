"""The one place that uses PyTorch's private joint forward/backward export (contract: tests/exporter/test_joint.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from QEfficient.errors import ExportError

#: Versions of torch this contract was checked with.
TESTED = ("2.13",)

#: What torch raises for a module that cannot be captured: dynamo, fx, symbolic shapes and the module's own code.
_NOT_CAPTURABLE = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError, ArithmeticError)


def joint_program(module: torch.nn.Module, args: tuple[Any, ...], dynamic_shapes: tuple[Any, ...]) -> ExportedProgram:
    """Forward and backward of ``module(*args) -> (loss, *others)`` as one graph of core ATen operators.

    The first output must be a 0-d loss; the others must be detached. Parameters with ``requires_grad`` get an output
    of kind ``GRADIENT_TO_PARAMETER`` whose target is the parameter's name, in the order of the parameters.

    Raises:
        ExportError: this torch has another private interface, or the module cannot be captured.
    """
    capture = _private_capture()
    try:
        program = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
        _drop_unused_duplicates(program)
        joint: ExportedProgram = capture(program)
    except _NOT_CAPTURABLE as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        name = type(getattr(module, "model", module)).__name__
        raise ExportError(f"the training step of {name} could not be captured: {reason[:300]}") from error
    kinds = [spec.kind for spec in joint.graph_signature.output_specs]
    if not kinds or kinds[0] is not OutputKind.LOSS_OUTPUT or OutputKind.GRADIENT_TO_PARAMETER not in kinds:
        raise ExportError(
            f"torch {torch.__version__} returned a joint graph of another form than {', '.join(TESTED)}: install a "
            "tested version."
        )
    return joint


def _private_capture() -> Any:
    try:
        from torch.export.experimental import _export_forward_backward
    except ImportError:
        raise ExportError(
            f"torch {torch.__version__} has no joint forward/backward export (torch.export.experimental."
            f"_export_forward_backward): training steps need torch {' or '.join(TESTED)}."
        ) from None
    return _export_forward_backward


def _drop_unused_duplicates(program: ExportedProgram) -> None:
    """A tied weight leaves a placeholder nobody reads, and the joint export then misses its gradient."""
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in list(program.graph_signature.input_specs):
        name = getattr(spec.arg, "name", None)
        if spec.kind is InputKind.PARAMETER and name in placeholders and not placeholders[name].users:
            program.graph.erase_node(placeholders[name])
            program.graph_signature.input_specs.remove(spec)
            program.state_dict.pop(str(spec.target), None)
    program.graph_module.recompile()

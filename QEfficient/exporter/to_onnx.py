"""torch.export -> ONNX IR: the only file that touches private APIs of torch.onnx and transformers' exporters."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from transformers.exporters import exporter_dynamo, exporter_onnx
from transformers.exporters import utils as exporter_utils

from QEfficient.errors import ExportError
from QEfficient.exporter.experts import grouped_products
from QEfficient.exporter.quiet import quiet
from QEfficient.exporter.translations import translations

#: Attention exists from 23 on; 24 would keep torch from fusing nothing we use, but has no advantage yet.
OPSET = 23

#: torch raises a wide family here (dynamo, fx, symbolic shapes, onnx), and so does a user's pooling function.
_NOT_EXPORTABLE = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


def to_onnx(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    patches: Callable[[], contextlib.AbstractContextManager[None]],
) -> ir.Model:
    """Traces ``module`` with symbolic dimensions and returns an unoptimised ONNX model.

    Args:
        patches: a context manager factory, entered around the trace (our replacements in transformers).

    Raises:
        ExportError: the module uses something torch or ONNX cannot express; the message names it.
    """
    if exporter_dynamo is None:  # imported for its side effect: it registers the patches applied below
        raise RuntimeError("transformers' dynamo exporter is missing")
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(torch.no_grad())
        stack.enter_context(patches())
        stack.enter_context(exporter_utils.apply_patches("onnx"))
        stack.enter_context(exporter_utils.apply_patches("dynamo"))
        theirs = exporter_onnx._ONNX_TRANSLATION_TABLE
        try:
            exported = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
            exporter_utils.apply_fx_node_fixes("onnx", exported.graph_module)
            program = torch.onnx.export(
                exported,
                args=(),
                input_names=list(input_names),
                output_names=list(output_names),
                custom_translation_table={**theirs, **grouped_products(theirs), **translations()},
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
        except _NOT_EXPORTABLE as error:
            raise ExportError(_explain(module, error)) from error
        if program is None:
            raise ExportError("torch.onnx returned no program.")
        exporter_onnx.apply_onnx_ir_fixes(program)
    return program.model


def _explain(module: torch.nn.Module, error: BaseException) -> str:
    """One sentence: the model, the operator where it is known, and what lay at the bottom of the chain of errors."""
    inner = type(getattr(module, "model", module)).__name__
    where, bottom = "", error
    while bottom.__cause__ is not None:
        bottom = bottom.__cause__
        if (found := re.search(r"target=(torch\.ops\.[\w.]+)", str(bottom))) is not None:
            where = f" at {found[1]}"
    lines = [line.strip() for line in str(bottom).splitlines() if line.strip()]
    reason = lines[0][:300] if lines else type(bottom).__name__
    return f"{inner} could not be exported to ONNX{where}: {reason}"

"""Generic clean-up of a traced graph with library passes that never touch or copy a referenced weight."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants

from QEfficient.errors import ExportError
from QEfficient.onnx_io import FileTensor

#: What torch notes on every node: most of a graph's bytes, and paths of the machine that exported it. The module each
#: node comes from stays (``pkg.torch.onnx.name_scopes``).
_TRACE_NOTES = ("namespace", *(f"pkg.torch.onnx.{name}" for name in ("stack_trace", "class_hierarchy", "fx_node")))


def clean_up(model: ir.Model) -> None:
    """Inlines, folds constants, removes identities, duplicates and dead nodes. The function computed is unchanged.

    Folding never reads a weight that lives in a file, so Transpose or Cast of a weight stay for the target to decide,
    and equal weights stay separate tensors under their own names.
    """
    try:
        _run(model)
    except ir.passes.PassError as error:
        bottom: BaseException = error
        while bottom.__cause__ is not None:
            bottom = bottom.__cause__
        raise ExportError(f"cleaning up the exported graph failed: {bottom}") from error


def _run(model: ir.Model) -> None:
    ir.passes.Sequential(passes.InlinePass())(model)
    fold_constants(model, should_fold=_foldable)
    rewriter.rewrite(model)
    fold_constants(model, should_fold=_foldable)
    result = ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=64),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
    if result.model is not model:
        raise ExportError("a clean-up pass replaced the model object")
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for key in _TRACE_NOTES:
            node.metadata_props.pop(key, None)


def _foldable(node: ir.Node) -> bool | None:
    for value in node.inputs:
        if value is not None and isinstance(value.const_value, FileTensor):
            return False
    return None

"""The torch model a compiled step is compared with: the same base weights, the same adapter."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from QEfficient.exporter.quiet import quiet
from QEfficient.finetune.compiled_step import CompiledStep

if TYPE_CHECKING:
    from QEfficient.finetune.model_manager import QEffModelManager


def reference_model(manager: QEffModelManager, step: CompiledStep) -> Any:
    """Loads the base model in torch, float32, and adds the adapter; with a quantized base, its dequantized weights."""
    model: Any = manager.load_reference()
    if manager.args.base_weights != "fp32":
        from QEfficient.finetune.proof import dequantized
        from QEfficient.transforms.onnx.quantize_base import read_dequantized

        dequantized(model, read_dequantized(step.packages.train / "program.onnx"))
    if step.adapter is None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return model
    from peft import get_peft_model

    with quiet():
        return get_peft_model(model, copy.deepcopy(step.peft_config), adapter_name=step.adapter)

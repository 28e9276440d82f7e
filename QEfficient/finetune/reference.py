"""The torch model a compiled step is compared with: the same base weights, the same adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from QEfficient.exporter.adapters import base_name
from QEfficient.exporter.quiet import quiet
from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.onnx_io import load_model

if TYPE_CHECKING:
    from QEfficient.finetune.model_manager import QEffModelManager

_QUANTIZED = ".quantized"


def reference_model(manager: QEffModelManager, step: CompiledStep) -> Any:
    """Loads the base model in torch, float32, and adds the adapter; with a quantized base, its dequantized weights."""
    model: Any = manager.load_reference()
    if manager.args.base_weights != "fp32":
        weights = dequantized_weights(step.packages.train / "program.onnx")
        with torch.no_grad():
            for name, parameter in model.named_parameters(remove_duplicate=False):
                if name in weights:
                    parameter.copy_(torch.from_numpy(weights[name]))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if step.adapter is None:
        return model
    with quiet():
        return get_adapted(model, step)


def get_adapted(model: Any, step: CompiledStep) -> Any:
    """``model`` with a fresh adapter of the step's configuration."""
    from peft import get_peft_model

    return get_peft_model(model, copy.deepcopy(step.peft_config), adapter_name=str(step.adapter))


def dequantized_weights(program: Path) -> dict[str, np.ndarray]:
    """Checkpoint name -> the float32 weight that a program with quantized weights computes with.

    Written from the operator's definition, ``(x - zero point) * scale``, and independent of how weights were quantized:
    https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
    """
    initializers = load_model(program).graph.initializers
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, value in initializers.items():
        if not name.endswith(_QUANTIZED):
            continue
        weight = name.removesuffix(_QUANTIZED)
        parts = {p: initializers.get(f"{weight}.{p}") for p in ("scale", "zero_point")}
        array = _dequantize(value, parts["scale"], parts["zero_point"])
        stem, _, last = weight.rpartition(".")
        if last.isdigit():
            experts.setdefault(stem, {})[int(last)] = array
        else:
            found[base_name(weight)] = array
    for stem, stack in experts.items():
        found[base_name(stem)] = np.stack([stack[number] for number in sorted(stack)])
    return found


def _dequantize(value: ir.Value, scale: ir.Value | None, zero: ir.Value | None) -> np.ndarray:
    node = next((use.node for use in value.uses() if use.node.op_type == "DequantizeLinear"), None)
    axis = node.attributes.get_int("axis", 1) if node is not None else 0  # gathered tables have a scale per row
    block = node.attributes.get_int("block_size", 0) if node is not None else 0
    numbers = _floats(value)
    scales = _floats(scale)
    zeros = _floats(zero) if zero is not None else np.zeros_like(scales)
    if block:
        length = numbers.shape[axis]
        scales, zeros = (np.repeat(a, block, axis).take(range(length), axis) for a in (scales, zeros))
    else:
        shape = [1] * numbers.ndim
        shape[axis] = -1
        scales, zeros = scales.reshape(shape), zeros.reshape(shape)
    result: np.ndarray = ((numbers - zeros) * scales).astype(np.float32)
    return result


def _floats(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    array: np.ndarray = value.const_value.numpy().astype(np.float32)
    return array

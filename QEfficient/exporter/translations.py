"""ONNX translations of our custom torch operators: one operator each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset23 as op

from QEfficient.transforms.pytorch import ops


def _scatter_nd(data: Any, indices: Any, updates: Any) -> Any:
    return op.ScatterND(data, indices, updates)


def _attention(query: Any, key: Any, value: Any, mask: Any, scale: float, softcap: float) -> Any:
    return op.Attention(query, key, value, mask, scale=float(scale), softcap=float(softcap))[0]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch operator -> function that emits its ONNX form."""
    if ops.scatter_nd is None:  # the import above registers the operators
        raise RuntimeError("custom operators are not registered")
    return {
        torch.ops.qeff.scatter_nd.default: _scatter_nd,
        torch.ops.qeff.attention.default: _attention,
    }

"""How much device memory a Cloud AI package needs for weights and KV state, estimated from its graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from QEfficient.targets.manifest import Manifest

if TYPE_CHECKING:
    import onnx_ir as ir

#: Bytes per element: a block of 32 shares a scale of 8 bits (OCP MX 1.0), MXFP6 has 6 bits, MXINT8 8.
FP16, FP32, MXFP6, MXINT8 = 2.0, 4.0, 6.25 / 8, 8.25 / 8


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes per device; activations, code and the compiler's own buffers come on top and are not estimated."""

    weights: int
    state: int
    devices: int

    def to_json(self) -> dict[str, Any]:
        return {"weights_bytes": self.weights, "kv_bytes": self.state, "devices": self.devices}


def estimate(model: ir.Model, manifest: Manifest, *, fp16: bool) -> DeviceMemory:
    """Weights and retained state, shared out evenly over the devices.

    Weights take 2 bytes an element (4 when computed in float32), constant operands of products 6.25 bits with
    ``mxfp6_matmul``; keys and values take 2 bytes or 8.25 bits with ``mxint8_kv_cache``, in as many rows as are kept.
    """
    from QEfficient.transforms.onnx.product_weights import product_weights

    options = manifest.options
    devices = int(options.get("num_devices") or 1)
    plain = FP16 if fp16 else FP32
    compressed = {w.source for w in product_weights(model.graph)} if options.get("mxfp6_matmul") else set()
    weights = 0.0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point():
            weights += tensor.nbytes if tensor is not None else 0
        else:
            weights += tensor.size * (MXFP6 if value in compressed else plain)
    sizes = {n: r.exact or 0 for s in manifest.specializations for n, r in s.symbols.items()}
    if manifest.specializations:  # rows of the state are the most that any step has
        sizes["batch_size"] = max(s.symbols["batch_size"].exact or 1 for s in manifest.specializations)
    state = 0.0
    for spec in manifest.states:
        elements = math.prod(sizes.get(d, 1) if isinstance(d, str) else d for d in spec.shape)
        state += elements * (MXINT8 if options.get("mxint8_kv_cache") and spec.kind == "kv" else plain)
    for parameter in manifest.parameters:
        state += math.prod(d if isinstance(d, int) else sizes.get(d, 1) for d in parameter.shape) * plain
    return DeviceMemory(math.ceil(weights / devices), math.ceil(state / devices), devices)

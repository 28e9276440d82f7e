"""The ONNX graph a toolchain is given: its inputs, states, symbols, and whether it runs at exact sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from stand_in.errors import Refused, need

RETAINED = "_RetainedState"
NEVER_FOLDED = {"Loop", "Const", "Identity", "If", "DequantizeLinear"}


class Graph:
    """A model file, refused unless it is whole, of a known opset, and its states pair up."""

    def __init__(self, path: Path, most_opset: int = 18, most_ir: int = 8) -> None:
        try:
            model = onnx.load(path, load_external_data=False)
        except (OSError, DecodeError, ValueError):
            raise Refused(f"Unable to load the model {path}") from None
        graph = model.graph
        need(graph.node and graph.output, f"{path.name}: empty network")
        need(model.ir_version <= most_ir, f"{path.name}: IR version {model.ir_version}")
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        need(opsets.get("", 99) <= most_opset, f"{path.name}: opset {opsets.get('')} is not supported")
        for tensor in graph.initializer:
            self._check_external(path, tensor)
        bodies = {(f.domain, f.name): f for f in model.functions}
        for node in graph.node:
            known = node.domain == "" or (node.domain, node.op_type) in bodies
            need(known, f"{path.name}: operator {node.domain}::{node.op_type} is not supported")
        inputs = {v.name: v.type.tensor_type for v in graph.input}
        outputs = {v.name: v.type.tensor_type for v in graph.output}
        self.path, self.model, self.inputs = path, model, inputs
        names = {n: onnx.helper.tensor_dtype_to_np_dtype(t.elem_type).name for n, t in {**inputs, **outputs}.items()}
        self.types: Mapping[str, str] = names
        self.symbols = {d.dim_param for t in inputs.values() for d in t.shape.dim if d.dim_param}
        self.states = {n.removesuffix(RETAINED): n for n in outputs if n.endswith(RETAINED)}
        for source, result in self.states.items():
            need(source in inputs, f"{result} has no input {source}")
            need(inputs[source].elem_type == outputs[result].elem_type, f"{source} and {result} differ in type")
            need(_dims(inputs[source]) == _dims(outputs[result]), f"{source} and {result} differ in shape")
        for name in inputs:
            need(not name.startswith("past_") or name in self.states, f"{name} has no output {name}{RETAINED}")
        self.first_outputs = {node.output[0] for node in graph.node if node.output}
        self._inner = {key: [n.name for n in f.node if n.name] for key, f in bodies.items() if len(f.node) < 100}
        self.node_names = {n for node in graph.node for n in self._names(node)}

    def _names(self, node: onnx.NodeProto) -> list[str]:
        if (inner := self._inner.get((node.domain, node.op_type))) is not None:
            return [f"{node.name}/{name}" for name in inner]
        return [node.name] if node.name else []

    @staticmethod
    def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return
        entry = {e.key: e.value for e in tensor.external_data}
        file = path.parent / entry.get("location", "")
        end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        need(file.is_file() and file.stat().st_size >= end, f"external data of {tensor.name} is missing: {file}")

    def check_pipeline(self, placed: Mapping[str, int]) -> None:
        """Every node that is not folded has a stage, and no stage needs what a later one makes."""
        constant = {t.name for t in self.model.graph.initializer} | {""}
        made: dict[str, int] = {}
        for node in self.model.graph.node:
            folds = node.op_type not in NEVER_FOLDED and all(name in constant for name in node.input)
            if folds:
                constant.update(node.output)
                continue
            names = self._names(node)
            stages = {placed.get(name) for name in names}
            need(None not in stages and len(stages) == 1, f"node {node.name} is in no partition, or in several")
            (stage,) = stages
            assert stage is not None
            need(all(made.get(name, 0) <= stage for name in node.input), f"node {node.name} needs a later partition")
            made.update(dict.fromkeys(node.output, stage))

    def check_types(self) -> None:
        """bfloat16 is not taken by the AI 100 compiler."""
        bfloat = onnx.TensorProto.BFLOAT16
        used = [t.name for t in self.model.graph.initializer if t.data_type == bfloat]
        used += [n.name for n in self.model.graph.node for a in n.attribute if a.name == "to" and a.i == bfloat]
        need(not used, f"bfloat16 is not supported on ai100: {used[:1]}")

    def run(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Runs once at these sizes; the shapes of the outputs."""
        feeds = {}
        for name, kind in self.inputs.items():
            shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in kind.shape.dim]
            feeds[name] = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        names = [v.name for v in self.model.graph.output]
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        try:
            results = ort.InferenceSession(str(self.path), options).run(names, feeds)
        except Exception as error:  # noqa: BLE001  ONNX Runtime's own classes are not public
            raise Refused(f"the network does not compile at {dict(sizes)}: {str(error).splitlines()[0]}") from None
        shapes = {name: result.shape for name, result in zip(names, results, strict=True)}
        for source, result in self.states.items():
            need(shapes[result] == feeds[source].shape, f"{result} is {shapes[result]}, {source} {feeds[source].shape}")
        return shapes


def _dims(kind: onnx.TypeProto.Tensor) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in kind.shape.dim]

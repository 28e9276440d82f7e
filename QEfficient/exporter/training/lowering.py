"""Walks a joint forward/backward graph of core ATen operators and writes it as plain ONNX operators."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from QEfficient.errors import ExportError
from QEfficient.exporter.training.builder import DTYPES, Builder

#: Gelu needs 20; DequantizeLinear in blocks, which the quantized base uses, needs 21.
OPSET = 21
IR_VERSION = 10

#: An operator's rule: (lowering, node, *ATen arguments) -> its output value(s), or None for an operator without one.
Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function for ATen overloads such as ``"sum.dim_IntList"``."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


@dataclass(frozen=True)
class Lowered:
    """A lowered training step.

    Attributes:
        model: inputs as the module's forward; outputs ``loss``, the other outputs, ``grad/<parameter>``. Every
            parameter and buffer is an initializer under its module name; parameters have no content yet.
        trained: names of the parameters with a gradient, in output order.
    """

    model: ir.Model
    trained: tuple[str, ...]


@dataclass
class Lowering:
    """The state of one walk; rules use it to read arguments and emit nodes."""

    program: ExportedProgram
    input_names: list[str]
    output_names: list[str]
    symbols: Mapping[str, str]
    build: Builder = field(default_factory=Builder)
    values: dict[Node, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------ reading arguments

    def value(self, node: Node) -> ir.Value:
        """The ONNX value of a tensor node, or the 1-D int64 value of a size node."""
        found: ir.Value = self.values[node]
        return found

    def number(self, x: Any, dtype: torch.dtype) -> ir.Value:
        """A tensor, a size or a Python number as a tensor of ``dtype``."""
        if not isinstance(x, Node):
            return self.build.scalar(x, dtype)
        if is_tensor(x):
            return self.build.cast(self.value(x), x.meta["val"].dtype, dtype)
        return self.build.cast(self.build.op("Squeeze", self.value(x)), torch.int64, dtype)

    def size(self, x: Any) -> ir.Value:
        """An int or a size node as 1-D int64 of length 1."""
        return self.value(x) if isinstance(x, Node) else self.build.constant([x])

    def sizes(self, dims: Any) -> ir.Value:
        """A list of ints and size nodes as one 1-D int64."""
        return self.build.concat_sizes([self.value(d) if isinstance(d, Node) else int(d) for d in dims])

    # ------------------------------------------------------------------ the walk

    def run(self) -> Lowered:
        signature = self.program.graph_signature
        inputs = {getattr(spec.arg, "name", ""): spec for spec in signature.input_specs}
        graph_inputs: list[ir.Value] = []
        outputs: list[ir.Value] = []
        trained: list[str] = []
        names, others = iter(self.input_names), iter(self.output_names)
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                spec = inputs[node.name]
                if spec.kind is InputKind.USER_INPUT:
                    value = ir.Value(name=next(names))
                    graph_inputs.append(value)
                else:
                    value = self._initializer(str(spec.target), node)
                self.values[node] = self._typed(value, node)
            elif node.op == "call_function":
                self.values[node] = self._typed(self._lower(node), node)
            elif node.op == "output":
                for spec, result in zip(signature.output_specs, node.args[0], strict=True):
                    if spec.kind is OutputKind.LOSS_OUTPUT:
                        name = "loss"
                    elif spec.kind is OutputKind.GRADIENT_TO_PARAMETER:
                        trained.append(str(spec.target))
                        name = f"grad/{spec.target}"
                    else:
                        name = next(others)
                    outputs.append(self._output(name, result))
        graph = ir.Graph(
            graph_inputs,
            outputs,
            nodes=self.build.nodes,
            initializers=list(self.build.initializers.values()),
            opset_imports={"": OPSET},
            name="training_step",
        )
        return Lowered(ir.Model(graph, ir_version=IR_VERSION), tuple(trained))

    def _initializer(self, name: str, node: Node) -> ir.Value:
        if name in self.build.initializers:
            return self.build.initializers[name]
        if name in self.program.constants:
            content = self.program.constants[name].detach().contiguous()
            return self.build.initializer(name, ir.tensor(content.numpy(), name=name))
        if name in self.program.graph_signature.buffers:
            content = self.program.state_dict[name].detach().contiguous()
            return self.build.initializer(name, ir.tensor(content.numpy(), name=name))
        value = self._typed(ir.Value(name=name), node)
        self.build.initializers[name] = value
        return value

    def _output(self, name: str, node: Node) -> ir.Value:
        value = self.build.op("Identity", self.value(node))
        # Two outputs may be one value (a gradient shared by a sum): each needs a node and a name of its own.
        if value.name is not None and not value.name.startswith("t"):
            value = self.build.ops("Identity", [self.value(node)], 1, axis_of_output=name)[0]
        value.name = name
        return self._typed(value, node)

    def _typed(self, value: Any, node: Node) -> Any:
        """Notes dtype and shape: later passes and the memory estimate read them."""
        meta = node.meta.get("val")
        if isinstance(value, ir.Value) and isinstance(meta, torch.Tensor) and meta.dtype in DTYPES:
            if value.shape is None:
                value.shape = ir.Shape([self._dim(d) for d in meta.shape])
            if value.dtype is None:
                value.dtype = DTYPES[meta.dtype]
        return value

    def _dim(self, dim: Any) -> int | str:
        if isinstance(dim, int):
            return dim
        text = str(dim.node.expr)
        for symbol, name in self.symbols.items():
            text = text.replace(symbol, name)
        return text

    def _lower(self, node: Node) -> Any:
        target = node.target
        if target is operator.getitem:
            source, place = node.args
            return self.values[source][place]  # type: ignore[index]
        if target in _SIZE_ARITHMETIC:
            return self.build.op(_SIZE_ARITHMETIC[target], *(self.size(x) for x in node.args))
        if not isinstance(target, torch._ops.OpOverload):
            name = getattr(target, "__name__", str(target))
            raise ExportError(
                f"the training step uses {name}, which has no rule for ONNX yet: report it with the model."
            )
        name = f"{target._schema.name.split('::')[1]}.{target._overloadname}"
        found = RULES.get(name)
        if found is None:
            raise ExportError(
                f"the training step needs the operator {target._schema.name}.{target._overloadname}, which has no rule "
                "for ONNX yet: report it with the model."
            )
        return found(self, node, *node.args, **node.kwargs)


def lower(
    program: ExportedProgram, input_names: list[str], output_names: list[str], symbols: Mapping[str, str]
) -> Lowered:
    """Writes a joint program as ONNX.

    Args:
        input_names: one name per user input.
        output_names: one name per output that is neither the loss nor a gradient.
        symbols: torch's symbol -> the name of the dimension.

    Raises:
        ExportError: an operator has no rule; the message names it.
    """
    # Rules register themselves when their modules are imported.
    from QEfficient.exporter.training import rules_index, rules_math, rules_moe, rules_nn, rules_shape  # noqa: F401

    return Lowering(program, input_names, output_names, symbols).run()


def is_tensor(x: Any) -> bool:
    """Whether an argument is a node that gives a tensor (and not a size or a Python number)."""
    return isinstance(x, Node) and isinstance(x.meta.get("val"), torch.Tensor)


def same_shape(a: Node, b: Node) -> bool:
    return list(a.meta["val"].shape) == list(b.meta["val"].shape)


def dtype_of(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


_SIZE_ARITHMETIC: dict[Any, str] = {
    operator.mul: "Mul",
    operator.add: "Add",
    operator.sub: "Sub",
    operator.floordiv: "Div",
    operator.neg: "Neg",
}

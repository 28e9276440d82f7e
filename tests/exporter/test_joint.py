"""The contract with PyTorch's private joint export, and what a user reads when another version breaks it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.export.experimental
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from QEfficient.errors import ExportError
from QEfficient.exporter.training.joint import TESTED, joint_program

DYNAMIC = ({0: torch.export.Dim.DYNAMIC},)


class Tiny(nn.Module):
    """Two layers that share a weight, a frozen one, a buffer, and a branch without gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.second(torch.tanh(self.frozen(self.first(x)))) + self.offset
        return (out * out).sum(), out.detach()


@pytest.fixture(scope="module")
def joint() -> ExportedProgram:
    return joint_program(Tiny(), (torch.randn(3, 4),), DYNAMIC)


def test_this_torch_is_a_tested_version() -> None:
    assert any(torch.__version__.startswith(f"{version}.") for version in TESTED)


def test_outputs_are_the_loss_the_others_and_the_gradients(joint: ExportedProgram) -> None:
    specs = joint.graph_signature.output_specs
    assert [spec.kind for spec in specs] == [
        OutputKind.LOSS_OUTPUT,
        OutputKind.USER_OUTPUT,
        OutputKind.GRADIENT_TO_PARAMETER,
        OutputKind.GRADIENT_TO_PARAMETER,
    ]
    # A shared weight has one gradient, under one of its names.
    assert {str(spec.target).replace("second", "first") for spec in specs[2:]} == {"first.weight", "first.bias"}


def test_inputs_keep_their_names(joint: ExportedProgram) -> None:
    named = {spec.target: spec.kind for spec in joint.graph_signature.input_specs if spec.target is not None}
    assert named["offset"] is InputKind.BUFFER
    assert {"first.bias", "frozen.weight", "frozen.bias"} <= set(named)
    assert len({"first.weight", "second.weight"} & set(named)) == 1


def test_only_core_operators_are_left(joint: ExportedProgram) -> None:
    """Decomposed: no ``linear`` and no backward operator of one."""
    used = {str(node.target) for node in joint.graph.nodes if node.op == "call_function"}
    assert "aten.addmm.default" in used
    assert not any("backward" in name or "linear" in name for name in used)


def test_the_graph_computes_the_gradients_of_autograd(joint: ExportedProgram) -> None:
    """At another batch size than the traced one; the gradient of the shared weight is the sum of both uses."""
    module, x = Tiny(), torch.randn(6, 4)
    parameters = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    feeds = [parameters.get(str(spec.target), x) for spec in joint.graph_signature.input_specs]
    loss, out, *gradients = joint.graph_module(*feeds)
    reference, reference_out = module(x)
    reference.backward()
    torch.testing.assert_close(loss, reference.detach())
    torch.testing.assert_close(out, reference_out)
    assert len(gradients) == 2
    for spec, gradient in zip(joint.graph_signature.output_specs[2:], gradients, strict=True):
        torch.testing.assert_close(gradient, parameters[str(spec.target)].grad)


def test_a_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.export.experimental, "_export_forward_backward")
    with pytest.raises(ExportError, match=r"no joint forward/backward export .*training steps need torch 2\.13"):
        joint_program(Tiny(), (torch.randn(3, 4),), DYNAMIC)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_torch_that_returns_another_form(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """No outputs, no gradients, or no loss in front."""

    def other(program: ExportedProgram) -> Any:
        specs = program.graph_signature.output_specs
        specs[:] = specs[1:][: kept - 1] if kept else []
        return program

    monkeypatch.setattr(torch.export.experimental, "_export_forward_backward", other)
    with pytest.raises(ExportError, match=r"joint graph of another form than 2\.13: install a tested version"):
        joint_program(Tiny(), (torch.randn(3, 4),), DYNAMIC)


def test_a_torch_with_another_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export.experimental, "_export_forward_backward", lambda: None)
    with pytest.raises(ExportError, match=r"Tiny could not be captured: .*positional argument"):
        joint_program(Tiny(), (torch.randn(3, 4),), DYNAMIC)


def test_a_module_that_cannot_be_captured() -> None:
    class Branches(Tiny):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            loss, out = super().forward(x)
            return (loss if x.sum() > 0 else -loss), out

    with pytest.raises(ExportError, match="training step of Branches could not be captured: ") as error:
        joint_program(Branches(), (torch.randn(3, 4),), DYNAMIC)
    assert "\n" not in str(error.value)

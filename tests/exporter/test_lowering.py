"""Every lowering rule: small modules, forward and backward through ONNX Runtime, against torch autograd."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional

from QEfficient.errors import ExportError
from QEfficient.exporter.training.joint import joint_program
from QEfficient.exporter.training.lowering import RULES, lower

ROWS = 5
#: Rows that a graph traced with `ROWS` is run with.
SIZES = (5, 2, 9)
Function = Callable[..., torch.Tensor]


class Small(nn.Module):
    """``w`` [6, 4], ``v`` [4] train; the loss depends on every element of the result in another way than linearly."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(6, 4, generator=generator))
        self.v = nn.Parameter(torch.rand(4, generator=generator) + 0.5)

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.function(self.w, self.v, x, n).float()
        return (out * out * 0.5 + out).sum() + self.w.sum() + self.v.sum(), out.detach()


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` float [rows, 4] with negative values, ``n`` int64 [rows] in 0 … 5 with duplicates."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 4, generator=generator), torch.randint(0, 6, (rows,), generator=generator)


def lowered(function: Function) -> ir.Model:
    """The step in plain ONNX operators, checked by ONNX itself."""
    module = Small(function)
    dynamic = {0: torch.export.Dim.DYNAMIC}
    program = joint_program(module, inputs(ROWS), (dynamic, dynamic))
    model = lower(program, ["x", "n"], ["out"], {}).model
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(dict(module.named_parameters())[name].detach().numpy(), name=name)
    return model


def check(function: Function, tolerance: float = 1e-5) -> ir.Model:
    """Loss, output and gradients at several sizes."""
    model = lowered(function)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} <= {""}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    used = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    for rows in SIZES:
        x, n = inputs(rows)
        module = Small(function)
        loss, out = module(x, n)
        loss.backward()
        feeds = {name: value.numpy() for name, value in (("x", x), ("n", n)) if name in used}
        found = dict(zip(names, session.run(None, feeds), strict=True))
        wanted = {"loss": loss.detach(), "out": out}
        wanted |= {f"grad/{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            reference = value.numpy()
            assert found[name].shape == reference.shape, name
            np.testing.assert_allclose(found[name], reference, rtol=tolerance, atol=tolerance, err_msg=name)
    return model


def operators(model: ir.Model) -> list[str]:
    """What is left when nodes without readers are gone."""
    passes.RemoveUnusedNodesPass()(model)
    return [node.op_type for node in model.graph]


# ---------------------------------------------------------------------------------- elements

ELEMENTWISE: dict[str, Function] = {
    "negate": lambda w, v, x, n: -(x * v),
    "exp": lambda w, v, x, n: torch.exp(x * v),
    "log": lambda w, v, x, n: torch.log(x * x + v),
    "log1p": lambda w, v, x, n: torch.log1p(x * x * v),
    "sine and cosine": lambda w, v, x, n: torch.sin(x * v) + torch.cos(x - v),
    "sigmoid": lambda w, v, x, n: torch.sigmoid(x * v),
    "tanh": lambda w, v, x, n: torch.tanh(x * v),
    "erf": lambda w, v, x, n: torch.erf(x * v),
    "square root": lambda w, v, x, n: torch.sqrt(x * x + v),
    "reciprocal root": lambda w, v, x, n: torch.rsqrt(x * x + v),
    "absolute": lambda w, v, x, n: (x * v).abs(),
    "reciprocal": lambda w, v, x, n: (x * x + v).reciprocal(),
    "relu": lambda w, v, x, n: torch.relu(x * v),
    "silu": lambda w, v, x, n: functional.silu(x * v),
    "gelu": lambda w, v, x, n: functional.gelu(x * v),
    "gelu, tanh": lambda w, v, x, n: functional.gelu(x * v, approximate="tanh"),
    "softplus": lambda w, v, x, n: functional.softplus(x * v),
    "rounding": lambda w, v, x, n: x.floor() * v + (3 * x).ceil() + x.sign(),
    "not a number": lambda w, v, x, n: torch.where(torch.isnan(x / (x * 0)) | torch.isinf(x), v, x * v),
    "infinite": lambda w, v, x, n: torch.where(torch.isinf(1 / (x * 0)), v, x),
    "square": lambda w, v, x, n: (x * v).pow(2),
    "cube": lambda w, v, x, n: (x * v).pow(3),
    "power one": lambda w, v, x, n: (x * v).pow(1),
    "fractional power": lambda w, v, x, n: (x * x * v).pow(1.7),
    "power of tensors": lambda w, v, x, n: torch.pow(v, x) + torch.pow(2.0, x * v),
    "minus a half": lambda w, v, x, n: (x * x + v).pow(-0.5),
    "divide": lambda w, v, x, n: x / v + v / (x * x + 1),
    "scaled addition": lambda w, v, x, n: torch.add(x, v, alpha=3) - torch.sub(v, x, alpha=-2),
    "reversed subtraction": lambda w, v, x, n: 3 - v * x,
    "clamp": lambda w, v, x, n: (x * v).clamp(-0.5, 0.5),
    "clamp from below": lambda w, v, x, n: (x * v).clamp(min=0.1),
    "clamp from above": lambda w, v, x, n: (x * v).clamp(max=0.1),
    "larger and smaller": lambda w, v, x, n: torch.maximum(x, v) + torch.minimum(x * v, x),
    "choose": lambda w, v, x, n: torch.where(x > 0.3, x * v, v),
    "choose a number": lambda w, v, x, n: torch.where(x <= 0.3, x * v, 0.25),
    "masked fill": lambda w, v, x, n: (x * v).masked_fill(x < 0, -2.0),
    "comparisons": lambda w, v, x, n: ((x >= 0.1) & ~(x > 1) | (x < -1) ^ (x != 0.5)) * v,
    "whole against fraction": lambda w, v, x, n: ((n > 2.5)[:, None] + (n == 3)[:, None] * 2 + (n != 2)[:, None]) * v,
    "logical": lambda w, v, x, n: torch.logical_and(x > 0, torch.logical_not(n[:, None] > 2)) * v,
    "casts": lambda w, v, x, n: n[:, None].float() * v + (x * 3).long() * v + (x > 0).double() * v,
    "floor of a quotient": lambda w, v, x, n: torch.div(x * 7, v.detach(), rounding_mode="floor") * v,
    "truncated quotient": lambda w, v, x, n: torch.div(x * 7, 2.0, rounding_mode="trunc") * v,
    "floor of a whole quotient": lambda w, v, x, n: ((n - 3) // 2)[:, None] * v + ((n - 3) // -2)[:, None] * v,
    "truncated whole quotient": lambda w, v, x, n: torch.div(n - 3, 2, rounding_mode="trunc")[:, None] * v,
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elements(name: str) -> None:
    check(ELEMENTWISE[name])


# ---------------------------------------------------------------------------------- reductions

REDUCTIONS: dict[str, Function] = {
    "sum of all": lambda w, v, x, n: (x * v).sum(),
    "sum": lambda w, v, x, n: (x * v).sum(0) + (x * v).sum(dim=-1, keepdim=True),
    "sum of flags": lambda w, v, x, n: (x > 0).sum(0) * v,
    "mean of all": lambda w, v, x, n: (x * v).mean(),
    "mean": lambda w, v, x, n: (x * v).mean(dim=1, keepdim=True) + (x * v).mean(dim=(0, 1)),
    "norm": lambda w, v, x, n: torch.linalg.norm(x * v, dim=1) + torch.linalg.norm(w * v),
    "norm of columns": lambda w, v, x, n: torch.linalg.norm(x * v, dim=0, keepdim=True).detach() * v,
    "largest": lambda w, v, x, n: (x * v).amax(dim=0) + (x * v).amax(dim=1, keepdim=True),
    "smallest": lambda w, v, x, n: (x * v).amin(dim=-1),
    "any at all": lambda w, v, x, n: (x > 1).any() * v,
    "any": lambda w, v, x, n: (x > 1).any(dim=0) * v + (x > 1).any(dim=1, keepdim=True) * v,
    "running sum": lambda w, v, x, n: (x * v).cumsum(0) + (x * v).cumsum(-1),
    "running count": lambda w, v, x, n: (n > 2).cumsum(0)[:, None] * v,
    "place of the largest": lambda w, v, x, n: x.argmax(dim=1)[:, None] * v + x.argmax(dim=0, keepdim=True) * v,
    "place of the largest of all": lambda w, v, x, n: x.argmax() * v,
    "place of the last sequence end": lambda w, v, x, n: (n == 3).int().argmax(-1) * v,
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str) -> None:
    check(REDUCTIONS[name])


# ---------------------------------------------------------------------------------- products, normalisation

LAYERS: dict[str, Function] = {
    "product": lambda w, v, x, n: x @ w.t(),
    "product with a transposed left side": lambda w, v, x, n: w @ x.t(),
    "product of transposed sides": lambda w, v, x, n: x.t().contiguous().t() @ w.t(),
    "linear with a bias": lambda w, v, x, n: functional.linear(x, w, w.sum(1)),
    "addmm": lambda w, v, x, n: torch.addmm(v, x, w.t() @ w, beta=2.0, alpha=0.5),
    "stacked product": lambda w, v, x, n: torch.bmm((x * v)[None].expand(3, -1, -1), w.t()[None].expand(3, -1, -1)),
    "four dimensions": lambda w, v, x, n: torch.matmul((x * v)[None, None], w.t()[None, None].expand(2, 3, -1, -1)),
    "einsum": lambda w, v, x, n: torch.einsum("rk,ok,k->or", x, w, v),
    "outer product": lambda w, v, x, n: torch.outer(x[:, 0], v),
    "softmax": lambda w, v, x, n: torch.softmax(x @ w.t(), dim=-1),
    "softmax over rows": lambda w, v, x, n: torch.softmax(x @ w.t(), dim=0),
    "log softmax": lambda w, v, x, n: torch.log_softmax(x @ w.t(), dim=-1),
    "logsumexp": lambda w, v, x, n: torch.logsumexp(x @ w.t(), dim=-1),
    "layer norm": lambda w, v, x, n: functional.layer_norm(x * v, (4,), v, v + 1),
    "layer norm without bias": lambda w, v, x, n: functional.layer_norm(x * v, (4,), v),
    "layer norm without weight": lambda w, v, x, n: functional.layer_norm(x * v, (4,)),
    "layer norm of two axes": lambda w, v, x, n: functional.layer_norm((x[:, None] * w), (6, 4), w, w * 2, eps=1e-3),
    "embedding": lambda w, v, x, n: functional.embedding(n, w) * v,
    "embedding with padding": lambda w, v, x, n: functional.embedding(n, w, padding_idx=2) * v,
    "cross entropy": lambda w, v, x, n: functional.cross_entropy(x @ w.t(), n, reduction="none"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    check(LAYERS[name])


# ---------------------------------------------------------------------------------- shapes

SHAPES: dict[str, Function] = {
    "views": lambda w, v, x, n: (x * v).view(-1, 2).reshape(-1, 2, 2).flatten(1) * v,
    "a view of a view": lambda w, v, x, n: (x * v).view(-1).view(2, -1, 2).view(-1, 4),
    "view with two unknown sizes": lambda w, v, x, n: (x[:, None] * w).view(x.shape[0], 6 * 4).view(1, x.shape[0], 24),
    "permutations": lambda w, v, x, n: (x[:, None] * w).permute(2, 0, 1).permute(1, 2, 0) * v,
    "a permutation undone": lambda w, v, x, n: (x * v).t().t() * v,
    "unsqueeze and squeeze": lambda w, v, x, n: (x * v).unsqueeze(1).unsqueeze(-1).squeeze(1).squeeze(-1),
    "squeeze of what is not one": lambda w, v, x, n: torch.squeeze(w * v, 0) + (v[None] * 2).squeeze(0),
    "expand": lambda w, v, x, n: v[None].expand(x.shape[0], -1) * x + v.expand_as(x),
    "expand and sum": lambda w, v, x, n: v[None, None].expand(3, x.shape[0], 4),
    "slice": lambda w, v, x, n: w[1:4] * v,
    "first half": lambda w, v, x, n: (x * v)[:, :2],
    "second half": lambda w, v, x, n: (x * v)[:, 2:],
    "from the end": lambda w, v, x, n: (x * v)[:, -3:-1],
    "all but the last row": lambda w, v, x, n: (x * v)[:-1],
    "all but the first row": lambda w, v, x, n: (x * v)[1:],
    "end beyond the size": lambda w, v, x, n: w[2:99] * v,
    "every other": lambda w, v, x, n: w[::2] * v + w[1::2] * v,
    "every third from the second": lambda w, v, x, n: w[1:6:3] * v,
    "every other of rows": lambda w, v, x, n: (x * v)[::2],
    "rotated halves": lambda w, v, x, n: (lambda y: torch.cat([-y[..., 2:], y[..., :2]], dim=-1) * v)(x * v),
    "rotated halves of all rows": lambda w, v, x, n: (lambda y: torch.cat([-y[:, 2:], y[:, :2]], dim=-1) * v)(x * v),
    "interleaved": lambda w, v, x, n: (lambda y: torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2))(x * v),
    "three parts": lambda w, v, x, n: w[:2] * v + w[2:4] * v * 2 + w[4:] * v * 3,
    "overlapping parts": lambda w, v, x, n: w[:4] * v + w[2:] * v * 2,
    "select": lambda w, v, x, n: w[0] * v + w[3] * 2 - w[-1] * 3,
    "select a column": lambda w, v, x, n: (x * v)[:, 1] + (x * v)[:, -1],
    "select a row": lambda w, v, x, n: (x * v)[0] + (x * v)[-1],
    "joined": lambda w, v, x, n: torch.cat([x * v, w], dim=0),
    "one joined": lambda w, v, x, n: torch.cat([x * v], dim=0),
    "joined kinds": lambda w, v, x, n: torch.cat([n[:, None].float(), x * v], dim=1),
    "stacked": lambda w, v, x, n: torch.stack([x * v, x - v], dim=1),
    "split": lambda w, v, x, n: torch.mul(*(x * v).split(2, dim=-1)),
    "uneven split": lambda w, v, x, n: (lambda a, b: a.sum(-1) * b[:, 0])(*(x * v).split([1, 3], dim=1)),
    "chunks": lambda w, v, x, n: torch.mul(*w.chunk(2)) * v,
    "repeat": lambda w, v, x, n: v.repeat(x.shape[0], 2),
    "repeat interleaved": lambda w, v, x, n: (x * v).repeat_interleave(3, dim=1),
    "constants": lambda w, v, x, n: torch.ones_like(x) * v + torch.full((4,), 2.5) * v + torch.zeros(4, 4) @ v,
    "ranges": lambda w, v, x, n: torch.arange(x.shape[0])[:, None] * v + torch.arange(1, 8, 2) * v,
    "padding": lambda w, v, x, n: functional.pad(w * v, (1, 2)) * functional.pad(v, (3, 0)),
    "padding of rows with a value": lambda w, v, x, n: functional.pad(x, (0, 0, 2, 1), value=3.0) * v,
    "negative padding": lambda w, v, x, n: functional.pad(w * v, (-1, 1, 0, -2)),
    "copy": lambda w, v, x, n: (x * 2).copy_(v) * x + (w * 1).copy_(w * v).sum(),
    "new memory": lambda w, v, x, n: x.new_empty(x.shape).copy_(v) * x,
    "flip": lambda w, v, x, n: torch.flip(x * v, (0, 1)) * v,
    "triangles": lambda w, v, x, n: torch.tril(x @ x.t() * v[0]) + torch.triu(x @ x.t() * v[1], diagonal=1),
    "lower diagonals": lambda w, v, x, n: torch.tril(w * v, diagonal=-1),
    "writing a slice": lambda w, v, x, n: torch.slice_scatter(x * v, (x * v)[:, 1:3] * 2, 1, 0, 2),
    "writing the end": lambda w, v, x, n: torch.slice_scatter(w * v, v[None] * 3, 0, 5),
    "writing a row": lambda w, v, x, n: torch.select_scatter(w * v, v * 3, 0, 2),
    "writing the last row": lambda w, v, x, n: torch.select_scatter(w * v, v * 3, 0, -1),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    check(SHAPES[name])


def test_complementary_slices_become_one_concat() -> None:
    """The gradient of a rotary embedding's halves: joined, not padded twice and added."""
    model = check(SHAPES["rotated halves"])
    assert "Pad" not in operators(model)


def test_a_frozen_weight_serves_both_directions() -> None:
    """Forward and backward read one initializer: Gemm transposes while it multiplies."""
    model = check(lambda w, v, x, n: (x * v) @ w.detach().t())
    assert "Transpose" not in operators(model)


# ---------------------------------------------------------------------------------- indices

INDICES: dict[str, Function] = {
    "rows with duplicates": lambda w, v, x, n: w[n] * v,
    "columns": lambda w, v, x, n: (x * v)[:, torch.tensor([2, 0, 2])],
    "rows by two axes": lambda w, v, x, n: w[n[:, None].expand(-1, 2)] * v,
    "pairs": lambda w, v, x, n: w[n, n.clamp(max=3)],
    "broadcast pairs": lambda w, v, x, n: w[n[:, None], torch.arange(3)[None]],
    "index select": lambda w, v, x, n: torch.index_select(w, 0, n) * v + torch.index_select(w, 1, n.clamp(max=3)).sum(),
    "gather": lambda w, v, x, n: (x @ w.t()).gather(1, n[:, None]),
    "gather of rows": lambda w, v, x, n: w.gather(0, n[:, None].expand(-1, 4)) * v,
    "scatter a value": lambda w, v, x, n: (x @ w.t()).scatter(1, n[:, None], 2.0),
    "scatter": lambda w, v, x, n: (x @ w.t()).scatter(1, n[:, None], x[:, :1] * v[0]),
    "scatter and add": lambda w, v, x, n: (w * v).scatter_add(0, n[:, None].expand(-1, 4), x * v),
    "write rows": lambda w, v, x, n: torch.index_put(w * v, (n[:1],), x[:1] * v),
    "add rows with duplicates": lambda w, v, x, n: torch.index_put(w * v, (n,), x * v, accumulate=True),
    "add one number everywhere": lambda w, v, x, n: torch.index_put(w * v, (n,), v[0] * 2, accumulate=True),
    "add to columns": lambda w, v, x, n: torch.index_add(x * v, 1, torch.tensor([1, 1, 3]), x[:, :3] * 2),
    "add to pairs": lambda w, v, x, n: torch.index_put(w * v, (n, n.clamp(max=3)), x[:, 0] * v[1], accumulate=True),
    "masked write": lambda w, v, x, n: torch.index_put(x * v, (x > 0,), torch.tensor(-1.0)),
    "largest": lambda w, v, x, n: (lambda t: t.values * (t.indices + 1))(torch.topk(x @ w.t(), 3, dim=-1)),
    "smallest": lambda w, v, x, n: torch.topk(w * v, 2, dim=0, largest=False).values,
    "sorted": lambda w, v, x, n: (lambda t: t.values * (t.indices + 1))(torch.sort(x @ w.t(), dim=-1)),
    "sorted downwards over rows": lambda w, v, x, n: torch.sort(x * v, dim=0, descending=True).values,
    "stable order of equals": lambda w, v, x, n: torch.sort(n, stable=True).indices[:, None] * v,
    "argsort": lambda w, v, x, n: (x * v)[torch.argsort(n, stable=True)],
    "one hot": lambda w, v, x, n: functional.one_hot(n, 6).float() @ w,
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_indices(name: str) -> None:
    check(INDICES[name])


# ---------------------------------------------------------------------------------- experts


def sorted_tokens(x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in the order of their expert, and where each expert's tokens end; with 6 rows or fewer some have none."""
    order = torch.argsort(n, stable=True)
    counts = torch.histc(n.float(), bins=6, min=0, max=5)
    return x[order], counts.cumsum(0).to(torch.int32)


def test_counts_of_experts() -> None:
    check(lambda w, v, x, n: torch.histc(n.float(), bins=6, min=0, max=5)[:, None] * w)


def test_grouped_product() -> None:
    """As a mixture of experts routes: experts without tokens, weights that train, weights stored transposed."""
    from transformers.integrations.moe import _grouped_mm

    def experts(w: torch.Tensor, v: torch.Tensor, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        tokens, ends = sorted_tokens(x * v, n)
        weights = w[:, :, None] * torch.arange(1.0, 5.0)  # [6 experts, 4, 4]
        return _grouped_mm(tokens, weights, ends) + _grouped_mm(tokens, weights.transpose(1, 2), ends)

    check(experts)


# ---------------------------------------------------------------------------------- what has no rule


def test_every_rule_belongs_to_an_operator() -> None:
    """A rule under a misspelt overload would never run."""
    import transformers.integrations.moe  # noqa: F401  # registers operators of its own

    for name in RULES:
        operator, overload = name.split(".")
        spaces = [torch.ops.aten, torch.ops.transformers]
        assert any(overload in getattr(space, operator).overloads() for space in spaces if hasattr(space, operator)), (
            name
        )


UNKNOWN: dict[str, tuple[Function, str]] = {
    "lgamma": (lambda w, v, x, n: torch.lgamma(x * x + v), "aten::lgamma"),
    "convolution": (lambda w, v, x, n: functional.conv1d(x[None] * v, w.t()[None, :, :2].expand(1, -1, -1)[:, :1]
                    .expand(1, x.shape[0], 2)), "aten::convolution"),
    "variance": (lambda w, v, x, n: (x * v).var(dim=-1), "aten::var"),
    "mask index": (lambda w, v, x, n: (x * v)[x > 0], "boolean mask"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_operator_without_a_rule_is_named(name: str) -> None:
    function, words = UNKNOWN[name]
    with pytest.raises(ExportError, match=words) as error:
        lowered(function)
    assert "\n" not in str(error.value)


def test_a_forward_only_operator_is_named() -> None:
    """Its backward has a form, it has not: nothing is left out silently."""
    with pytest.raises(ExportError, match="aten::"):
        lowered(lambda w, v, x, n: torch.cdist(x * v, w))

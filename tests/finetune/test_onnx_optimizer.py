"""The AdamW graph against torch.optim.AdamW and clip_grad_norm_."""

import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from QEfficient.errors import InputError, OptionError, TrainingError
from QEfficient.finetune.onnx_optimizer import OnnxAdamW
from QEfficient.finetune.optimizer_graph import adamw_graph

#: One tensor larger than a piece, odd sizes, a scalar.
SHAPES = {"a.weight": (300, 1001), "b.bias": (7,), "c.scale": (), "d.weight": (33, 5)}
NO_DECAY = ("b.bias", "c.scale")


def program(**options) -> bytes:
    proto = ir.to_proto(adamw_graph(**options))
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in SHAPES.items()}


def gradient(step: int) -> dict[str, np.ndarray]:
    """Norms above and below the limit; some elements are always zero."""
    rng = np.random.default_rng(100 + step)
    made = {n: np.asarray(rng.normal(size=s) * 10.0 ** rng.uniform(-6, 0), np.float32) for n, s in SHAPES.items()}
    made["a.weight"][3] = 0
    return made


def rate(step: int) -> float:
    return 1e-2 * (0.5 + 0.5 * np.cos(step / 16))


class Torch:
    def __init__(self, max_norm: float, **options) -> None:
        self.tensors = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in start().items()}
        groups = [
            {"params": [t for n, t in self.tensors.items() if n not in NO_DECAY], "weight_decay": 0.1},
            {"params": [t for n, t in self.tensors.items() if n in NO_DECAY], "weight_decay": 0.0},
        ]
        self.max_norm, self.adamw = max_norm, torch.optim.AdamW(groups, lr=1.0, **options)

    def step(self, gradients: dict[str, np.ndarray], lr: float) -> float:
        for name, tensor in self.tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        norm = torch.nn.utils.clip_grad_norm_(self.tensors.values(), self.max_norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        return float(norm)


@pytest.mark.parametrize("max_norm", [1.0, 0.0])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_fifty_steps_equal_torch(max_norm, betas):
    reference = Torch(max_norm or float("inf"), betas=betas, eps=1e-6)
    optimizer = OnnxAdamW(
        program(beta1=betas[0], beta2=betas[1], eps=1e-6),
        start(),
        weight_decay=0.1,
        no_decay=NO_DECAY,
        max_norm=max_norm,
    )
    held = optimizer.parameters["a.weight"]
    clipped = 0
    for step in range(50):
        gradients = gradient(step)
        wanted = reference.step(gradients, rate(step))
        clipped += wanted > 1
        assert optimizer.step(gradients, rate(step)) == pytest.approx(wanted, rel=1e-5)
    assert 0 < clipped < 50
    assert held is optimizer.parameters["a.weight"], "whoever bound the tensor must see the update"
    for name, tensor in reference.tensors.items():
        wanted = tensor.detach().numpy()
        assert np.abs(optimizer.parameters[name] - wanted).max() <= 1e-6 * max(1, np.abs(wanted).max()), name
        assert np.abs(wanted - start()[name]).max() > 1e-2, "the steps must have moved it"


def test_state_continues_to_the_same_bits():
    options = {"weight_decay": 0.1, "no_decay": NO_DECAY, "max_norm": 1.0}
    whole, first = OnnxAdamW(program(), start(), **options), OnnxAdamW(program(), start(), **options)
    for step in range(4):
        whole.step(gradient(step), rate(step))
    for step in range(2):
        first.step(gradient(step), rate(step))
    second = OnnxAdamW(program(), first.parameters, **options)
    second.load_state_dict(first.state_dict())
    for step in range(2, 4):
        second.step(gradient(step), rate(step))
    for name in SHAPES:
        np.testing.assert_array_equal(second.parameters[name], whole.parameters[name])


def test_accumulates_in_its_own_buffers():
    one, two = OnnxAdamW(program(), start()), OnnxAdamW(program(), start())
    total = {name: gradient(0)[name] + gradient(1)[name] for name in SHAPES}
    one.step(total, 0.01)
    for step in range(2):
        for name, value in gradient(step).items():
            two.gradients[name][...] += value
    two.step(two.gradients, 0.01)
    for name in SHAPES:
        np.testing.assert_array_equal(one.parameters[name], two.parameters[name])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_no_number_changes_nothing(bad):
    optimizer = OnnxAdamW(program(), start(), max_norm=1.0)
    optimizer.step(gradient(0), 0.01)
    before, state = {n: a.copy() for n, a in optimizer.parameters.items()}, optimizer.state_dict()
    gradients = gradient(1)
    gradients["d.weight"][0, 0] = bad
    with pytest.raises(TrainingError, match="step 2"):
        optimizer.step(gradients, 0.01)
    for name in SHAPES:
        np.testing.assert_array_equal(optimizer.parameters[name], before[name])
    assert all(np.array_equal(state[k], v) for k, v in optimizer.state_dict().items())


def test_refuses_gradients_of_another_model():
    optimizer = OnnxAdamW(program(), start())
    with pytest.raises(InputError, match=r"d\.weight has no gradient"):
        optimizer.step({n: g for n, g in gradient(0).items() if n != "d.weight"}, 0.01)
    with pytest.raises(InputError, match="x is not trained"):
        optimizer.step(gradient(0) | {"x": np.zeros(3, np.float32)}, 0.01)
    with pytest.raises(InputError, match=r"b\.bias must have shape"):
        optimizer.step(gradient(0) | {"b.bias": np.zeros(3, np.float32)}, 0.01)
    assert optimizer.steps == 0


def test_refuses_the_state_of_another_model():
    optimizer, state = OnnxAdamW(program(), start()), OnnxAdamW(program(), start()).state_dict()
    with pytest.raises(InputError, match=r"lacks 'exp_avg/b\.bias'"):
        optimizer.load_state_dict({n: v for n, v in state.items() if n != "exp_avg/b.bias"})
    with pytest.raises(InputError, match="shape"):
        optimizer.load_state_dict(state | {"exp_avg_sq/d.weight": np.zeros((5, 33), np.float32)})


def test_refuses_bad_options():
    with pytest.raises(OptionError, match="betas"):
        adamw_graph(beta2=1.0)
    with pytest.raises(OptionError, match=r"Did you mean.*b\.bias"):
        OnnxAdamW(program(), start(), no_decay=["b.bia"])
    with pytest.raises(OptionError, match="weight_decay"):
        OnnxAdamW(program(), start(), weight_decay=float("nan"))
    with pytest.raises(InputError, match="float32"):
        OnnxAdamW(program(), {"a": np.zeros(3)})


def test_runs_without_torch(tmp_path):
    (tmp_path / "adamw.onnx").write_bytes(program())
    code = (
        "import sys, numpy as np; from pathlib import Path; from QEfficient.finetune.onnx_optimizer import OnnxAdamW; "
        f"o = OnnxAdamW(Path({str(tmp_path / 'adamw.onnx')!r}), {{'a': np.ones(3, np.float32)}}); "
        "o.step({'a': np.ones(3, np.float32)}, 0.1); print(o.parameters['a'][0]); "
        "assert not {'torch', 'transformers', 'onnx', 'onnx_ir'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0.9, abs=1e-6)  # a first step moves by the learning rate

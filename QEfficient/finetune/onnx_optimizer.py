"""Runs the AdamW graph over a set of named tensors, with numpy and ONNX Runtime alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from QEfficient.errors import InputError, OptionError, TrainingError
from QEfficient.suggest import did_you_mean

#: Elements per run: the four vectors and the temporaries of a piece stay in the cache.
_PIECE = 1 << 18
#: Tensors begin at multiples of this many elements (64 bytes).
_ALIGNMENT = 16
_MOMENTS = ("exp_avg", "exp_avg_sq")


class OnnxAdamW:
    """AdamW with gradient clipping; parameters, gradients and moments lie in flat buffers and change in place.

    `parameters` are float32 views into one buffer. Hand them to a session once: every step changes them where they
    are. `gradients` are views of the same shapes to accumulate into; `step` takes any others just as well.

    Args:
        program: the graph of `QEfficient.finetune.optimizer_graph.adamw_graph`, as a file or as bytes.
        parameters: name -> float32 start values; they are copied.
        weight_decay: decoupled decay of every tensor not named in ``no_decay``.
        max_norm: largest norm of all gradients together; 0 for no clipping.
        threads: of ONNX Runtime.

    Raises:
        InputError: no parameters, or one that is not float32.
        OptionError: ``no_decay`` names no parameter, or a number is out of range.
    """

    def __init__(
        self,
        program: Path | bytes,
        parameters: Mapping[str, np.ndarray],
        *,
        weight_decay: float = 0.0,
        no_decay: Collection[str] = (),
        max_norm: float = 0.0,
        threads: int = 1,
    ) -> None:
        for name in no_decay:
            if name not in parameters:
                raise OptionError(f"no_decay names {name!r}, which is not trained.{did_you_mean(name, parameters)}")
        for option, value in (("weight_decay", weight_decay), ("max_norm", max_norm)):
            if not value >= 0:
                raise OptionError(f"{option} must be a number of at least 0, got {value!r}.")
        if not parameters:
            raise InputError("an optimizer needs at least one parameter: pass the trained tensors.")
        for name, array in parameters.items():
            if array.dtype != np.float32:
                raise InputError(f"parameter {name} must be float32, got {array.dtype}.")
        self.max_norm, self.steps = float(max_norm), 0
        # Tensors with decay first: each kind is one run of elements.
        order = sorted(parameters, key=lambda name: name in no_decay)
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        end = 0
        ends = {True: 0, False: 0}
        for name in order:
            self._places[name] = (end, parameters[name].shape)
            end += math.ceil(parameters[name].size / _ALIGNMENT) * _ALIGNMENT
            ends[name in no_decay] = end
        self._groups = ((0, ends[False], float(weight_decay)), (ends[False], end, 0.0))
        self._flat = {name: np.zeros(end, np.float32) for name in ("parameter", "gradient", *_MOMENTS)}
        self.parameters = dict(self._views("parameter"))
        self.gradients = dict(self._views("gradient"))
        for name, array in parameters.items():
            self.parameters[name][...] = array
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        source = program if isinstance(program, bytes) else str(program)
        self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._scalars = {n: np.zeros((), np.float32) for n in ("lr", "step", "weight_decay", "grad_norm", "max_norm")}

    def step(self, gradients: Mapping[str, np.ndarray], lr: float) -> float:
        """One update; returns the gradient norm before clipping.

        Args:
            gradients: name -> float32 array, one per parameter; may be `gradients`.

        Raises:
            InputError: a gradient is missing, unknown, or has another shape.
            TrainingError: the norm is not finite; nothing was changed.
        """
        self._take(gradients)
        norm = self.grad_norm()
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient norm of step {self.steps + 1} is {norm} and nothing was updated: lower the learning "
                "rate or look at the batch."
            )
        self.steps += 1
        for name, value in (("lr", lr), ("step", self.steps), ("grad_norm", norm), ("max_norm", self.max_norm)):
            self._scalars[name][...] = value
        for start, end, decay in self._groups:
            self._scalars["weight_decay"][...] = decay
            for first in range(start, end, _PIECE):
                self._update(first, min(first + _PIECE, end))
        return norm

    def grad_norm(self) -> float:
        """The 2-norm of all gradients together; sums in float64."""
        flat = self._flat["gradient"]
        pieces = (flat[first : first + _PIECE] for first in range(0, flat.size, _PIECE))
        return math.sqrt(sum(float(np.dot(piece, piece)) for piece in pieces))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies: ``step`` (int64, 0-d), and ``exp_avg/<name>`` and ``exp_avg_sq/<name>`` of every parameter."""
        state: dict[str, np.ndarray] = {"step": np.asarray(self.steps, np.int64)}
        for moment in _MOMENTS:
            state |= {f"{moment}/{name}": view.copy() for name, view in self._views(moment)}
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from what `state_dict` returned.

        Raises:
            InputError: an entry is missing, unknown or has another shape; nothing was changed.
        """
        views = {f"{moment}/{name}": view for moment in _MOMENTS for name, view in self._views(moment)}
        wanted = {"step", *views}
        if wanted != set(state):
            name = sorted(wanted ^ set(state))[0]
            problem = "lacks" if name in wanted else "has an unknown entry"
            raise InputError(f"the optimizer state {problem} {name!r}: it belongs to another set of trained tensors.")
        for name, view in views.items():
            if state[name].shape != view.shape:
                raise InputError(f"{name} of the optimizer state has shape {state[name].shape}, expected {view.shape}.")
        for name, view in views.items():
            view[...] = state[name]
        self.steps = int(state["step"])

    def _views(self, vector: str) -> Iterator[tuple[str, np.ndarray]]:
        for name, (start, shape) in self._places.items():
            yield name, self._flat[vector][start : start + math.prod(shape)].reshape(shape)

    def _take(self, gradients: Mapping[str, np.ndarray]) -> None:
        if gradients is self.gradients:
            return
        wrong = sorted(self.gradients.keys() ^ gradients.keys())
        if wrong:
            problem = "has no gradient" if wrong[0] in self.gradients else "is not trained"
            raise InputError(
                f"{wrong[0]} {problem}: pass one gradient for each of the {len(self.gradients)} parameters."
            )
        for name, view in self.gradients.items():
            if gradients[name].shape != view.shape:
                raise InputError(f"the gradient of {name} must have shape {view.shape}, got {gradients[name].shape}.")
        for name, view in self.gradients.items():
            if gradients[name] is not view:
                view[...] = gradients[name]

    def _update(self, first: int, last: int) -> None:
        binding = self._session.io_binding()
        for name, scalar in self._scalars.items():
            binding.bind_input(name, "cpu", 0, np.float32, (), scalar.ctypes.data)
        for name, flat in self._flat.items():
            piece = flat[first:last]
            binding.bind_input(name, "cpu", 0, np.float32, piece.shape, piece.ctypes.data)
            if name != "gradient":
                binding.bind_output(f"new_{name}", "cpu", 0, np.float32, piece.shape, piece.ctypes.data)
        self._session.run_with_iobinding(binding)

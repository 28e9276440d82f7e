"""An ONNX Runtime session behind the Session protocol: checked inputs, state that stays in its buffers."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from QEfficient.errors import InputError, OutOfMemoryError, PackageError, QEfficientError, ShapeError
from QEfficient.suggest import did_you_mean
from QEfficient.targets.manifest import Manifest, Specialization, StateSpec, TensorSpec


class HostSession:
    """Runs a host package. Retained state is bound once and never copied between steps.

    A state the program updates in place has one buffer, bound as input and output. Any other has two that swap roles
    after each step.
    """

    def __init__(self, directory: Path, manifest: Manifest, threads: int) -> None:
        self.manifest, self.threads = manifest, threads
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        _set_up(options, manifest.runtime)
        path = directory / manifest.program
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # ONNX Runtime raises its own family of exceptions, all derived from Exception only through pybind.
        except _ORT_ERRORS as error:
            raise PackageError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from None
        self._binding = self._session.io_binding()
        self._inputs = {spec.name: spec for spec in manifest.inputs}
        self._parameters: dict[str, np.ndarray] = {}
        self._sizes: dict[str, int] = {}
        self._buffers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._outputs: dict[str, np.ndarray] = {}
        #: Output names in the order they were first bound, which is the order ONNX Runtime returns them in.
        self._bound: list[str] = []
        self._closed = False

    def begin(self, symbols: Mapping[str, int]) -> None:
        """Allocates retained state for these dimension values; keeps the buffers when the values are the same."""
        self._check_open()
        needed = {d for state in self.manifest.states for d in state.shape if isinstance(d, str)}
        missing = needed - set(symbols)
        if missing:
            raise ShapeError(f"begin() needs values for {sorted(missing)}.")
        sizes = {name: symbols[name] for name in needed}
        if sizes == self._sizes and self._buffers:
            return
        self._sizes, self._buffers = sizes, {}
        for state in self.manifest.states:
            shape = [sizes[d] if isinstance(d, str) else d for d in state.shape]
            first = np.zeros(shape, dtype=state.dtype)
            second = first if state.in_place else np.zeros_like(first)
            self._buffers[state.input] = (first, second)
        self._binding = self._session.io_binding()
        self._outputs, self._bound = {}, []
        for state in self.manifest.states:
            self._bind_state(state)
        for name, array in self._parameters.items():
            self._bind(self._binding.bind_input, name, array)

    def set_parameters(self, values: Mapping[str, np.ndarray]) -> None:
        """See `Session.set_parameters`. Arrays that are contiguous and of the right dtype are not copied."""
        self._check_open()
        known = {spec.name: spec for spec in self.manifest.parameters}
        for name, array in values.items():
            spec = known.get(name)
            if spec is None:
                raise InputError(f"the program has no parameter {name!r}.{did_you_mean(name, known)}")
            if not isinstance(array, np.ndarray) or array.dtype != np.dtype(spec.dtype) or array.shape != spec.shape:
                found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
                raise InputError(f"parameter {name} must be {spec.dtype} {spec.shape}, got {found}.")
        for name, array in values.items():
            self._parameters[name] = np.ascontiguousarray(array)
            self._bind(self._binding.bind_input, name, self._parameters[name])

    def run(self, feeds: Mapping[str, np.ndarray], specialization: str) -> dict[str, np.ndarray]:
        """See `Session.run`. Returned arrays are overwritten by the next call with the same shapes."""
        self._check_open()
        if self.manifest.states and not self._buffers:
            raise QEfficientError("call begin() before run(): this program keeps state between steps.")
        if len(self._parameters) < len(self.manifest.parameters):
            unset = [spec.name for spec in self.manifest.parameters if spec.name not in self._parameters]
            raise QEfficientError(
                f"call set_parameters() before run(): {unset[0]} and {len(unset) - 1} more are unset."
            )
        symbols = self._check(feeds, self.manifest.specialization(specialization))
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        for name, array in arrays.items():
            self._bind(self._binding.bind_input, name, array)
        dynamic = [spec.name for spec in self.manifest.outputs if not self._bind_output(spec, symbols)]
        try:
            self._session.run_with_iobinding(self._binding)
        except (*_ORT_ERRORS, RuntimeError, MemoryError) as error:  # run_with_iobinding raises plain RuntimeErrors
            if isinstance(error, MemoryError) or any(word in str(error) for word in _NO_MEMORY):
                raise OutOfMemoryError(
                    "there is not enough memory for this call: use fewer rows or shorter ones."
                ) from None
            raise QEfficientError(f"ONNX Runtime failed in {specialization}: {_first_line(error)}") from None
        results = dict(self._outputs)
        if dynamic:
            values = dict(zip(self._bound, self._binding.get_outputs(), strict=True))
            results |= {name: values[name].numpy() for name in dynamic}
        for state in self.manifest.states:
            if not state.in_place:
                first, second = self._buffers[state.input]
                self._buffers[state.input] = (second, first)
                self._bind_state(state)
        return results

    def state(self, name: str) -> np.ndarray:
        """The current contents of a retained state, by its input name (for tests and debugging)."""
        return self._buffers[name][0]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._buffers, self._outputs = {}, {}
        del self._binding, self._session
        gc.collect()

    def _check_open(self) -> None:
        if self._closed:
            raise QEfficientError("this session was closed: load the package again.")

    def _check(self, feeds: Mapping[str, np.ndarray], specialization: Specialization) -> dict[str, int]:
        """Names, dtypes, ranks, fixed sizes and symbols; returns the value of every symbol."""
        unknown, missing = set(feeds) - set(self._inputs), set(self._inputs) - set(feeds)
        if unknown or missing:
            problems = {"missing": sorted(missing), "unexpected": sorted(unknown)}
            found = " and ".join(f"{what} {names}" for what, names in problems.items() if names)
            raise InputError(f"the program's inputs are {sorted(self._inputs)}: {found}.")
        symbols = dict(self._sizes)
        for name, array in feeds.items():
            spec = self._inputs[name]
            if not isinstance(array, np.ndarray) or array.dtype != np.dtype(spec.dtype):
                kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                raise InputError(f"{name} must be a numpy array of {spec.dtype}, got {kind}.")
            if array.ndim != len(spec.shape):
                raise InputError(f"{name} must have rank {len(spec.shape)} {spec.shape}, got shape {array.shape}.")
            for size, dim in zip(array.shape, spec.shape, strict=True):
                expected = symbols.setdefault(dim, size) if isinstance(dim, str) else dim
                if size != expected:
                    raise ShapeError(f"{name} has shape {array.shape}, which does not fit {spec.shape} here.")
        for name, value in symbols.items():
            allowed = specialization.symbols.get(name)
            if allowed is not None and not allowed.accepts(value):
                raise ShapeError(f"{name}={value} does not fit the specialization {specialization}.")
        return symbols

    def _bind_output(self, spec: TensorSpec, symbols: Mapping[str, int]) -> bool:
        """Binds an output to a reused buffer; False when its shape is not known before the run."""
        if not all(isinstance(d, int) or d in symbols for d in spec.shape):
            self._note(spec.name)
            self._binding.bind_output(spec.name, "cpu")
            return False
        shape = tuple(symbols[d] if isinstance(d, str) else d for d in spec.shape)
        buffer = self._outputs.get(spec.name)
        if buffer is None or buffer.shape != shape:
            buffer = np.empty(shape, dtype=spec.dtype)
            self._outputs[spec.name] = buffer
        self._note(spec.name)
        self._bind(self._binding.bind_output, spec.name, buffer)
        return True

    def _note(self, output: str) -> None:
        if output not in self._bound:
            self._bound.append(output)

    def _bind_state(self, state: StateSpec) -> None:
        first, second = self._buffers[state.input]
        self._note(state.output)
        self._bind(self._binding.bind_input, state.input, first)
        self._bind(self._binding.bind_output, state.output, second)

    @staticmethod
    def _bind(function: object, name: str, array: np.ndarray) -> None:
        # By address: nothing is copied, and a second bind of the same name replaces the first.
        function(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)  # type: ignore[operator]


def check_program(path: Path) -> None:
    """Opens a graph as it is, without the work that running it would need.

    Raises:
        PackageError: ONNX Runtime does not take the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        raise PackageError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from None


_STATE = ort.capi.onnxruntime_pybind11_state
_ORT_ERRORS = (
    _STATE.Fail,
    _STATE.InvalidArgument,
    _STATE.InvalidGraph,
    _STATE.InvalidProtobuf,
    _STATE.NoSuchFile,
    _STATE.NotImplemented,
    _STATE.RuntimeException,
    _STATE.EPFail,
    _STATE.ModelLoadCanceled,
)


#: What ONNX Runtime's messages say when an allocation failed.
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300]


def _set_up(options: ort.SessionOptions, runtime: Mapping[str, Any]) -> None:
    """Applies what the host target recorded in the manifest when it compiled; an absent entry means ORT's default."""
    if not runtime.get("arena", True):
        # Freed memory goes back at once; with the pattern planner on, ORT would reserve the peak up front again.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
    if not runtime.get("memory_pattern", True):
        options.enable_mem_pattern = False
    if not runtime.get("prepacking", True):
        options.add_session_config_entry("session.disable_prepacking", "1")
    if runtime.get("order") == "priority":
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if runtime.get("optimization") == "none":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Runs at every level otherwise: gives each reader of a dequantized weight a copy, and all copies live at once.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.use_deterministic_compute = bool(runtime.get("deterministic", False))

"""One ONNX Runtime session of a host package and what is bound to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from QEfficient.errors import OutOfMemoryError, PackageError, QEfficientError
from QEfficient.targets.manifest import TensorSpec
from QEfficient.targets.tuning import Tuning

_STATE = ort.capi.onnxruntime_pybind11_state
#: ONNX Runtime raises its own family of exceptions, all derived from Exception only through pybind.
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


class HostProgram:
    """A loaded program. Arrays are bound by address: nothing is copied, and a second bind of a name replaces the first.

    Raises:
        PackageError: ONNX Runtime does not take the file.
    """

    def __init__(self, path: Path, tuning: Tuning, runtime: Mapping[str, Any]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = tuning.threads
        if not tuning.spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        elif not runtime.get("idle_spinning", True):
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if tuning.pinned and tuning.threads > 1:
            options.add_session_config_entry("session.intra_op_thread_affinities", _affinities(tuning.threads))
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        set_up(options, runtime)
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except _ORT_ERRORS as error:
            raise PackageError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from None
        self.inputs = {value.name for value in self._session.get_inputs()}
        self.outputs = {value.name for value in self._session.get_outputs()}
        #: The row of the state that is bound: None for all of them, -1 when none is.
        self.row: int | None = -1
        self.reset()

    def reset(self) -> None:
        """Forgets every binding."""
        self._binding = self._session.io_binding()
        self._results: dict[str, np.ndarray] = {}
        self._feeds: dict[str, np.ndarray] = {}
        #: Output names in the order they were first bound, which is the order ONNX Runtime returns them in.
        self._bound: list[str] = []
        self.row = -1

    def bind_input(self, name: str, array: np.ndarray) -> None:
        """Reads ``array`` in every run until the name is bound anew; ignored when the program has no such input."""
        if name in self.inputs:
            _bind(self._binding.bind_input, name, array)

    def feed(self, name: str, array: np.ndarray) -> None:
        """Reads a copy of ``array`` from now on: for small arrays that change with each run, less work than binding."""
        buffer = self._feeds.get(name)
        if buffer is not None and buffer.shape == array.shape:
            np.copyto(buffer, array)
            return
        self._feeds[name] = np.array(array, order="C")
        self.bind_input(name, self._feeds[name])

    def bind_state(self, source: str, result: str, read: np.ndarray, written: np.ndarray) -> None:
        """Binds a state's input and output."""
        self.bind_input(source, read)
        if result in self.outputs:
            self._note(result)
            _bind(self._binding.bind_output, result, written)

    def run(self, specs: tuple[TensorSpec, ...], symbols: Mapping[str, int], label: str) -> dict[str, np.ndarray]:
        """Runs on what is bound; of ``specs`` the outputs this program has.

        Arrays are reused by the next run with the same shapes.

        Raises:
            OutOfMemoryError, QEfficientError: as their names say; ``label`` says in the message what ran.
        """
        mine = [spec for spec in specs if spec.name in self.outputs]
        dynamic = [spec.name for spec in mine if not self._bind_output(spec, symbols)]
        try:
            self._session.run_with_iobinding(self._binding)
        except (*_ORT_ERRORS, RuntimeError, MemoryError) as error:  # run_with_iobinding raises plain RuntimeErrors
            if isinstance(error, MemoryError) or any(word in str(error) for word in _NO_MEMORY):
                raise OutOfMemoryError(
                    "there is not enough memory for this call: use fewer rows or shorter ones."
                ) from None
            raise QEfficientError(f"ONNX Runtime failed in {label}: {_first_line(error)}") from None
        results = dict(self._results)
        if dynamic:
            values = dict(zip(self._bound, self._binding.get_outputs(), strict=True))
            results |= {name: values[name].numpy() for name in dynamic}
        return results

    def _bind_output(self, spec: TensorSpec, symbols: Mapping[str, int]) -> bool:
        """Binds an output to a reused buffer; False when its shape is not known before the run."""
        self._note(spec.name)
        if not all(isinstance(d, int) or d in symbols for d in spec.shape):
            self._results.pop(spec.name, None)
            self._binding.bind_output(spec.name, "cpu")
            return False
        shape = tuple(symbols[d] if isinstance(d, str) else d for d in spec.shape)
        buffer = self._results.get(spec.name)
        if buffer is None or buffer.shape != shape:
            self._results[spec.name] = np.empty(shape, dtype=spec.dtype)
            _bind(self._binding.bind_output, spec.name, self._results[spec.name])
        return True

    def _note(self, output: str) -> None:
        if output not in self._bound:
            self._bound.append(output)


def _bind(function: object, name: str, array: np.ndarray) -> None:
    function(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)  # type: ignore[operator]


def _affinities(threads: int) -> str:
    """One core for each thread but the caller's own, in ONNX Runtime's numbers, which begin with 1."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = [allowed[number % len(allowed)] + 1 for number in range(1, threads)]
    return ";".join(str(core) for core in cores)


def check_program(path: Path) -> None:
    """Opens a graph as it is, without the work that running it would need.

    Raises:
        PackageError: ONNX Runtime does not take the graph.
    """
    HostProgram(path, Tuning(1), {"optimization": "none", "prepacking": False})


def set_up(options: ort.SessionOptions, runtime: Mapping[str, Any]) -> None:
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300]

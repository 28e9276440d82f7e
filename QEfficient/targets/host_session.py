"""An ONNX Runtime session behind the Session protocol: checked inputs, state that stays in its buffers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from QEfficient.errors import QEfficientError, ShapeError
from QEfficient.targets.feeds import checked_parameters, feed_symbols, misfit, require_parameters
from QEfficient.targets.host_runtime import HostProgram
from QEfficient.targets.manifest import Manifest, Specialization
from QEfficient.targets.tuning import Tuning


class HostSession:
    """Runs a host package. Retained state is bound once and never copied between steps.

    A state the program updates in place has one buffer, bound as input and output. Any other has two that swap roles
    after each step. Specializations with a program of their own share the state; such a program is opened when it is
    first needed.
    """

    def __init__(self, directory: Path, manifest: Manifest, tuning: Tuning) -> None:
        self.manifest, self.tuning, self._directory = manifest, tuning, directory
        self._programs: dict[str, HostProgram] = {}
        self._inputs = {spec.name: spec for spec in manifest.inputs}
        self._parameters: dict[str, np.ndarray] = {}
        self._sizes: dict[str, int] = {}
        self._buffers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._closed = False
        self._program(manifest.program)

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
        for program in self._programs.values():
            program.reset()
            self._bind_parameters(program, self._parameters)

    def set_parameters(self, values: Mapping[str, np.ndarray]) -> None:
        """See `Session.set_parameters`. Arrays that are contiguous and of the right dtype are not copied."""
        self._check_open()
        new = checked_parameters(self.manifest.parameters, values)
        self._parameters |= new
        for program in self._programs.values():
            self._bind_parameters(program, new)

    def run(
        self, feeds: Mapping[str, np.ndarray], specialization: str, row: int | None = None
    ) -> dict[str, np.ndarray]:
        """See `Session.run`. Returned arrays are overwritten by the next call with the same shapes."""
        self._check_open()
        if self.manifest.states and not self._buffers:
            raise QEfficientError("call begin() before run(): this program keeps state between steps.")
        require_parameters(self.manifest.parameters, self._parameters)
        spec = self.manifest.specialization(specialization)
        symbols = self._check(feeds, spec, row)
        program = self._program(spec.program or self.manifest.program)
        if self.manifest.states and program.row != row:
            self._bind_states(program, row)
        for name, array in feeds.items():
            program.feed(name, array)
        results = program.run(self.manifest.outputs, symbols, specialization)
        self._retain(program, row)
        return results

    def state(self, name: str) -> np.ndarray:
        """The current contents of a retained state, by its input name (for tests and debugging)."""
        return self._buffers[name][0]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # Nothing refers back to them, so ONNX Runtime's sessions and the state's memory are free at once.
        self._buffers, self._programs = {}, {}

    def _check_open(self) -> None:
        if self._closed:
            raise QEfficientError("this session was closed: load the package again.")

    def _program(self, file: str) -> HostProgram:
        """The loaded program, opened when first asked for."""
        if file not in self._programs:
            runtime = self.manifest.runtime
            settings = runtime.get("programs", {}).get(file, runtime)
            program = HostProgram(self._directory / file, self.tuning, settings)
            self._bind_parameters(program, self._parameters)
            self._programs[file] = program
        return self._programs[file]

    def _check(
        self, feeds: Mapping[str, np.ndarray], specialization: Specialization, row: int | None
    ) -> dict[str, int]:
        """Names, dtypes, ranks, fixed sizes and symbols; returns the value of every symbol."""
        symbols = dict(self._sizes)
        if row is not None:
            rows = symbols.get("batch_size")
            if rows is None or not 0 <= row < rows:
                raise ShapeError(f"row {row} is not one of the {rows or 0} rows of state that begin() prepared.")
            symbols["batch_size"] = 1
        symbols = feed_symbols(self._inputs, feeds, symbols)
        name = misfit(symbols, specialization)
        if name is not None:
            raise ShapeError(f"{name}={symbols[name]} does not fit the specialization {specialization}.")
        return symbols

    def _bind_parameters(self, program: HostProgram, values: Mapping[str, np.ndarray]) -> None:
        for name, array in values.items():
            program.bind_input(name, array)

    def _bind_states(self, program: HostProgram, row: int | None) -> None:
        """Binds all rows of the state, or one: rows lie one after the other, so a row is a buffer of its own."""
        rows = slice(None) if row is None else slice(row, row + 1)
        for state in self.manifest.states:
            first, second = self._buffers[state.input]
            program.bind_state(state.input, state.output, first[rows], second[rows])
        program.row = row

    def _retain(self, program: HostProgram, row: int | None) -> None:
        """Makes what was written the state to read next, where the program does not write in place."""
        swapped = False
        for state in self.manifest.states:
            if state.in_place:
                continue
            first, second = self._buffers[state.input]
            if row is None:
                self._buffers[state.input] = (second, first)
                program.bind_state(state.input, state.output, second, first)
                swapped = True
            else:  # the other rows are in the first buffer
                first[row] = second[row]
        if swapped:
            for other in self._programs.values():
                if other is not program:
                    other.row = -1

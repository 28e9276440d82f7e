"""A session on a Cloud AI card behind the Session protocol: state and parameters stay in device memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from QEfficient.errors import (
    ContextLengthError,
    InputError,
    OptionError,
    PackageError,
    QEfficientError,
    ShapeError,
    TargetUnavailableError,
)
from QEfficient.targets.base import CardSettings
from QEfficient.targets.cloud_tool import LOG
from QEfficient.targets.feeds import checked_parameters, feed_symbols, misfit, require_parameters
from QEfficient.targets.manifest import WINDOW, Dim, Manifest, Specialization
from QEfficient.targets.qaic_files import RETAINED
from QEfficient.targets.qaic_program import QaicProgram
from QEfficient.targets.qaic_vendor import import_vendor

logger = logging.getLogger("QEfficient")

#: Inputs of which only the length counts: the session fills them in as the specialization says.
LENGTH_ONLY = (WINDOW, "num_logits_to_keep")
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class _Step:
    """A specialization, and which of the program's shape sets it is."""

    specialization: Specialization
    place: int


class QaicSession:
    """Runs a program on a card. Retained state never leaves it, parameters are sent once after they were set.

    A specialization may be named by its kind: of ``Decode_0``, ``Decode_1``, … a step called ``Decode`` takes the one
    whose sizes fit the inputs and, where compute context lengths were compiled, the shortest that covers the largest
    position.
    """

    def __init__(self, program: QaicProgram, manifest: Manifest) -> None:
        self.manifest, self._program = manifest, program
        self._inputs = {spec.name: spec for spec in manifest.inputs}
        self._steps = {spec.name: _Step(spec, _place(program, manifest, spec)) for spec in manifest.specializations}
        _check_bindings(program, manifest)
        self._sizes: dict[str, int] | None = None
        self._parameters: dict[str, np.ndarray] = {}
        #: What the next step sends besides its inputs: parameters, states from another session.
        self._pending: dict[str, np.ndarray] = {}
        self._closed = self._lost = False
        program.activate()

    def begin(self, symbols: Mapping[str, int]) -> None:
        """Checks that the state was compiled with these sizes; after a failed step it starts the program anew.

        Raises:
            ShapeError: other sizes.
        """
        self._check_open()
        needed = {d for state in self.manifest.states for d in state.shape if isinstance(d, str)}
        missing = needed - set(symbols)
        if missing:
            raise ShapeError(f"begin() needs values for {sorted(missing)}.")
        sizes = {name: symbols[name] for name in needed}
        for specialization in self.manifest.specializations:
            name = misfit(sizes, specialization)
            if name is not None:
                raise ShapeError(f"{name}={sizes[name]} does not fit the specialization {specialization}.")
        if self._lost or not self._program.active:
            self.deactivate()
            self.activate()
        self._sizes = sizes

    def activate(self) -> None:
        """Takes the device's cores; a session is active from the start."""
        self._check_open()
        self._program.activate()
        self._lost = False

    def deactivate(self) -> None:
        """Gives the device's cores to others. State is lost, parameters are sent again after `begin`."""
        self._check_open()
        self._program.deactivate()
        self._sizes = None
        self._pending = dict(self._parameters)

    def set_parameters(self, values: Mapping[str, np.ndarray]) -> None:
        """See `Session.set_parameters`. The next step sends what was set; the card keeps the rest."""
        self._check_open()
        new = checked_parameters(self.manifest.parameters, values)
        for name, array in new.items():
            self._fitting(name, array)
        self._parameters |= new
        self._pending |= new

    def write_states(self, states: Mapping[str, np.ndarray]) -> None:
        """Takes over state that `run_and_read` of another session gave; the next step sends it.

        Raises:
            InputError: not all states of this program, or other shapes or dtypes.
        """
        self._check_open()
        place = next(iter(self._steps.values())).place
        wanted = {state.input: self._program.bindings[state.input] for state in self.manifest.states}
        if set(states) != set(wanted):
            odd = sorted(set(states) ^ set(wanted))[0]
            raise InputError(f"the states of this program are {sorted(wanted)}: {odd} is missing or not one of them.")
        for name, array in states.items():
            binding = self._movable(name)
            if array.dtype != binding.dtype or array.shape != binding.shapes[place]:
                raise InputError(
                    f"the state {name} must be {binding.dtype} {binding.shapes[place]}, got {array.dtype} "
                    f"{array.shape}: compile both packages with the same ctx_len and batch sizes."
                )
        self._pending |= states

    def run(
        self, feeds: Mapping[str, np.ndarray], specialization: str, row: int | None = None
    ) -> dict[str, np.ndarray]:
        """See `Session.run`. After a device failed, `begin` has to be called before the next step."""
        if row is not None:
            raise InputError("a program for a card runs whole batches: leave out row.")
        return self._run(feeds, specialization, ())

    def run_and_read(
        self, feeds: Mapping[str, np.ndarray], specialization: str
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """`run`, and the state after the step by input name, in the dtype it has on the card, for `write_states`.

        Raises:
            QEfficientError: the state has a form the host does not have (MXINT8).
        """
        names = [(state.input, state.output) for state in self.manifest.states]
        for source, result in names:
            self._movable(source)
            self._movable(result)
        results = self._run(feeds, specialization, [result for _, result in names])
        states = {source: results.pop(result) for source, result in names}
        return results, states

    def close(self) -> None:
        if self._closed:
            return
        try:
            self._program.deactivate()
        finally:
            self._closed = True
            self._pending, self._parameters = {}, {}

    # ------------------------------------------------------------------ one step

    def _run(self, feeds: Mapping[str, np.ndarray], kind: str, states: Sequence[str]) -> dict[str, np.ndarray]:
        self._check_open()
        if self._lost or not self._program.active:
            said = "the last step failed and left the card's state unknown" if self._lost else "the session is inactive"
            raise QEfficientError(f"{said}: call begin() before run().")
        if self.manifest.states and self._sizes is None:
            raise QEfficientError("call begin() before run(): this program keeps state between steps.")
        require_parameters(self.manifest.parameters, self._parameters)
        step = self._choose(feeds, kind)
        sends = {**self._lengths(feeds, step.specialization), **feeds, **self._pending}
        bindings = self._program.bindings
        # A compiler may drop an input that nothing reads.
        sends = {name: self._fitting(name, array) for name, array in sends.items() if name in bindings}
        outputs = {spec.name: np.dtype(spec.dtype) for spec in self.manifest.outputs}
        asks = {name: bindings[name].shapes[step.place] for name in (*outputs, *states)}
        try:
            results = self._program.run(sends, asks, step.specialization.name)
        except QEfficientError:
            self._lost, self._pending = True, dict(self._parameters)
            raise
        self._pending = {}
        return {n: array.astype(outputs[n], copy=False) if n in outputs else array for n, array in results.items()}

    def _choose(self, feeds: Mapping[str, np.ndarray], kind: str) -> _Step:
        """The specialization for these inputs.

        Raises:
            InputError, ShapeError: as `Session.run`.
            ContextLengthError: a position lies beyond every compiled context.
        """
        candidates = self.manifest.steps(kind)
        given = {name: spec for name, spec in self._inputs.items() if name in feeds or name not in LENGTH_ONLY}
        symbols = feed_symbols(given, feeds, self._sizes or {})
        fitting = [spec for spec in candidates if misfit(symbols, spec) is None]
        if not fitting:
            name = misfit(symbols, candidates[0])
            several = " or any other of its kind" if len(candidates) > 1 else ""
            raise ShapeError(f"{name}={symbols[name or '']} does not fit the specialization {candidates[0]}{several}.")
        if WINDOW in self._inputs and WINDOW not in feeds:
            last = int(feeds["position_ids"].max())
            windows = {spec.symbols[WINDOW].maximum or 0: spec for spec in fitting}
            covering = [length for length in windows if length > last]
            if not covering:
                raise ContextLengthError(f"position {last} is beyond {max(windows)}, the longest context compiled.")
            fitting = [windows[min(covering)]]
        return self._steps[fitting[0].name]

    def _lengths(self, feeds: Mapping[str, np.ndarray], spec: Specialization) -> dict[str, np.ndarray]:
        """Inputs of which only the length counts, where the caller left them out."""
        names = [name for name in LENGTH_ONLY if name in self._inputs and name not in feeds]
        return {n: np.zeros(_exact(self._inputs[n].shape, spec), self._inputs[n].dtype) for n in names}

    def _fitting(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array in the dtype its binding has; InputError when float16 cannot hold it."""
        dtype = self._program.bindings[name].dtype
        if dtype is None or array.dtype == dtype:
            return np.ascontiguousarray(array)
        if dtype == np.float16 and array.size and float(np.abs(array).max()) > _FP16_MAX:
            raise InputError(f"{name} holds values beyond {_FP16_MAX:g}, which the card's float16 cannot hold.")
        return np.ascontiguousarray(array, dtype)

    def _movable(self, name: str) -> Any:
        binding = self._program.bindings[name]
        if binding.dtype is None:
            raise QEfficientError(
                f"{name} cannot leave the card: how it lies in memory is not public; compile without mxint8_kv_cache."
            )
        return binding

    def _check_open(self) -> None:
        if self._closed:
            raise QEfficientError("this session was closed: load the package again.")


def open_session(directory: Path, manifest: Manifest, root: Path, card: CardSettings) -> QaicSession:
    """Loads a compiled package on its devices.

    Args:
        root: of the Platform SDK.

    Raises:
        TargetUnavailableError: the package holds no program, the SDK's runtime or a device is not here, or is busy.
        OptionError: as many devices as were not compiled for.
        PackageError: the program is damaged, or is not the manifest's.
    """
    if manifest.runtime.get("dry_run"):
        raise TargetUnavailableError(
            f"{directory} is a dry run, nothing in it was compiled: install the Cloud AI SDK and compile without "
            "dry_run, or compile for the host."
        )
    devices = _devices(directory, manifest, card)
    if manifest.stand_in:
        vendor = _stand_in(directory, root)
    else:
        vendor = import_vendor(root)
        if vendor.stand_in:
            raise TargetUnavailableError(
                f"{directory} is for a card, and the runtime under {root} is a stand-in that has none: install the "
                "Platform SDK."
            )
    place = (directory / manifest.program).parent
    return QaicSession(QaicProgram(place, vendor, devices, card.timeout, directory / LOG), manifest)


def _stand_in(directory: Path, root: Path) -> Any:
    """The runtime for a package that a stand-in of the compiler made: only a stand-in, never one that has a card."""
    try:
        vendor = import_vendor(root)
    except TargetUnavailableError:
        vendor = None
    if vendor is None or not vendor.stand_in:
        raise TargetUnavailableError(
            f"{directory} was made by a stand-in of the Cloud AI toolchain and holds no program: compile it with the "
            "Apps SDK, or compile for the host."
        )
    logger.warning("%s runs on a stand-in of the Cloud AI runtime: nothing it gives comes from a card.", directory)
    return vendor


def _devices(directory: Path, manifest: Manifest, card: CardSettings) -> tuple[int, ...] | None:
    """The ids to load on; None for the one device the runtime takes by itself."""
    options = manifest.options
    # With a partition dump the compiler makes a program for one device.
    wanted = 1 if options.get("mdp_dump_partition_config") else options.get("num_devices") or 1
    ids = card.device_ids or options.get("device_group")
    if ids is None:
        return None if wanted == 1 else tuple(range(wanted))
    if len(ids) != wanted or len(set(ids)) != len(ids):
        raise OptionError(
            f"{directory} was compiled for {wanted} device{'s' if wanted > 1 else ''}, and device_ids is {list(ids)}: "
            "pass as many different ids, or compile for as many devices."
        )
    return tuple(ids)


def _exact(shape: Sequence[Dim], spec: Specialization) -> tuple[int, ...]:
    """The shape in a specialization."""
    return tuple(d if isinstance(d, int) else spec.symbols[d].exact or 0 for d in shape)


def _place(program: QaicProgram, manifest: Manifest, spec: Specialization) -> int:
    """Which of the program's shape sets a specialization is; PackageError when it is none."""
    shapes = {s.name: s.shape for s in (*manifest.inputs, *manifest.parameters)}
    shapes |= {state.input: state.shape for state in manifest.states}
    wanted = {name: _exact(shape, spec) for name, shape in shapes.items() if name in program.bindings}
    sets = range(len(next(iter(program.bindings.values())).shapes))
    for place in sets:
        if all(program.bindings[name].shapes[place] == shape for name, shape in wanted.items()):
            return place
    raise PackageError(f"the program has no sizes for {spec}, which its manifest lists: compile the package again.")


def _check_bindings(program: QaicProgram, manifest: Manifest) -> None:
    """PackageError unless the program's inputs and outputs are those of the manifest."""
    inputs = {spec.name for spec in (*manifest.inputs, *manifest.parameters)} | {s.input for s in manifest.states}
    outputs = {spec.name for spec in manifest.outputs}
    held = {spec.name + RETAINED for spec in manifest.parameters} | {s.output for s in manifest.states}
    found = {binding.name: binding for binding in program.bindings.values()}
    kept = {spec.name for spec in manifest.parameters} | {s.input for s in manifest.states}
    odd = sorted({n for n, b in found.items() if n not in (outputs | held if b.is_output else inputs)})
    odd += sorted((outputs | held | kept) - set(found))
    if odd:
        raise PackageError(f"the program and its manifest disagree on {odd[0]}: compile the package again.")
    for name in outputs:
        if found[name].dtype is None:
            raise PackageError(f"the program returns {name} in a type the host does not have: compile it again.")

"""One program loaded on one or several Cloud AI devices: its description, its buffers, one step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from QEfficient.errors import PackageError, QEfficientError, TargetUnavailableError
from QEfficient.targets.qaic_status import TIMED_OUT, failure, name_of, timed_out
from QEfficient.targets.qaic_vendor import Vendor

#: Number of a type in the vendor's messages -> what it is in numpy, which has neither bfloat16 nor MXINT8.
DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    8: np.dtype(np.int8),
}
_OUTPUT = 1
#: How the runtime's classes fail where they return no status.
_RAISED = (RuntimeError, ValueError, TypeError, OSError, MemoryError)


@dataclass(frozen=True)
class Binding:
    """One input or output of a program.

    Attributes:
        dtype: None for a type that the host cannot hold, such as MXINT8: such a buffer stays on the device.
        shapes: one for each specialization. Buffers have just these sizes, also where the runtime would take smaller
            ones (``is_partial_buf_allowed``).
    """

    name: str
    index: int
    dtype: np.dtype[Any] | None
    is_output: bool
    shapes: tuple[tuple[int, ...], ...]


class QaicProgram:
    """Loads a program, and runs it on arrays.

    A binding that a step neither sends nor asks for is skipped: the device then reads and writes its own memory.

    Args:
        directory: of ``programqpc.bin``.
        devices: ids; None takes the first device.
        timeout: seconds a step may take.
        log: what the compiler said, to be named when the program is not one.

    Raises:
        PackageError: not a program, or one without a readable description.
        TargetUnavailableError: a device is absent or busy.
        QEfficientError: the runtime failed in another way.
    """

    def __init__(
        self, directory: Path, vendor: Vendor, devices: Sequence[int] | None, timeout: float, log: Path
    ) -> None:
        self._rt, self._timeout = vendor.qaicrt, timeout
        ids = list(devices) if devices else []
        listed = ", ".join(map(str, ids)) or "0"
        self._where = f"device{'s' if len(ids) > 1 else ''} {listed}"
        said = f", its compiler's log is {log}" if log.is_file() else ""
        damaged = f"{directory} holds no program that the runtime can read: compile the package again{said}."
        with self._raising("opening"):
            self._context = self._rt.Context(self._rt.QIDList(ids)) if ids else self._rt.Context()
            self._queue = self._rt.Queue(self._context, ids[0] if ids else 0)
        try:
            qpc = self._rt.Qpc(str(directory))
            status, described = qpc.getIoDescriptor()
        except _RAISED:
            raise PackageError(damaged) from None
        if status != self._rt.QStatus.QS_SUCCESS:
            raise PackageError(damaged)
        self.bindings = _bindings(bytes(described), vendor.messages, damaged)
        with self._raising("loading the program"):
            properties = self._rt.QAicProgramProperties()
            # Releases before 1.20 have no such property: how long a step took tells then.
            with contextlib.suppress(AttributeError):
                properties.dataPathTimeoutMs = math.ceil(timeout * 1000)
            if len(ids) > 1:
                properties.devMapping = ":".join(map(str, ids))
            single = ids[0] if len(ids) == 1 else None
            self._program = self._rt.Program(self._context, single, qpc, properties)
            self._succeed(self._program.load(), "loading the program")
        self._exec: Any = None
        #: Buffers for results, by name and shape; the runtime fills new ones.
        self._rooms: dict[tuple[str, tuple[int, ...]], Any] = {}

    @property
    def active(self) -> bool:
        return self._exec is not None

    def activate(self) -> None:
        """Takes the device's cores; nothing happens when it has them."""
        if self._exec is not None:
            return
        with self._raising("activating the program"):
            self._succeed(self._program.activate(), "activating the program")
            self._exec = self._rt.ExecObj(self._context, self._program)

    def deactivate(self) -> None:
        """Gives the cores back; what the device kept between steps is lost."""
        if self._exec is None:
            return
        self._exec = None
        with self._raising("deactivating the program"):
            self._succeed(self._program.deactivate(), "deactivating the program")

    def run(
        self, sends: Mapping[str, np.ndarray], asks: Mapping[str, tuple[int, ...]], label: str
    ) -> dict[str, np.ndarray]:
        """One step.

        Args:
            sends: input name -> array of the binding's dtype.
            asks: output name -> its shape in this step.
            label: says in messages what ran.

        Returns:
            New arrays of the outputs asked for, in the bindings' dtypes.

        Raises:
            QEfficientError: the device failed or took too long; what it keeps between steps is unknown then.
        """
        buffers, dims = [], []
        for binding in self.bindings.values():
            itemsize = binding.dtype.itemsize if binding.dtype is not None else 1
            if binding.name in sends:
                array = sends[binding.name]
                buffers.append(self._rt.QBuffer(array.tobytes()))
                dims.append((itemsize, list(array.shape)))
            elif binding.name in asks:
                shape = asks[binding.name]
                buffers.append(self._room(binding.name, shape, itemsize))
                dims.append((itemsize, list(shape)))
            else:
                buffers.append(self._rt.QBuffer(b""))
                dims.append((itemsize, [0]))
        began = time.monotonic()
        with self._raising(label):
            self._succeed(self._exec.setData(buffers, self._rt.BufferDimensionsVecRef(dims)), label)
            self._succeed(self._queue.enqueue(self._exec), label)
            status = self._exec.waitForCompletion()
            late = time.monotonic() - began >= self._timeout
            if status != self._rt.QStatus.QS_SUCCESS and (late or name_of(status) == TIMED_OUT):
                raise timed_out(label, self._where, self._timeout)
            self._succeed(status, label)
            status, results = self._exec.getData()
            self._succeed(status, label)
            return {name: self._array(name, shape, bytes(results[self.bindings[name].index]), label)
                    for name, shape in asks.items()}  # fmt: skip

    def _array(self, name: str, shape: tuple[int, ...], content: bytes, label: str) -> np.ndarray:
        dtype = self.bindings[name].dtype
        assert dtype is not None
        if len(content) != math.prod(shape) * dtype.itemsize:
            raise QEfficientError(
                f"{label} on {self._where} returned {len(content)} bytes for {name}, not those of {shape}: compile the "
                "package again."
            )
        return np.frombuffer(content, dtype).reshape(shape)

    def _room(self, name: str, shape: tuple[int, ...], itemsize: int) -> Any:
        key = (name, shape)
        if key not in self._rooms:
            self._rooms[key] = self._rt.QBuffer(bytes(math.prod(shape) * itemsize))
        return self._rooms[key]

    def _succeed(self, status: object, doing: str) -> None:
        if status != self._rt.QStatus.QS_SUCCESS:
            raise failure(status, doing, self._where)

    @contextlib.contextmanager
    def _raising(self, doing: str) -> Iterator[None]:
        """Turns what the runtime's classes raise into an error of ours."""
        try:
            yield
        except QEfficientError:
            raise
        except _RAISED as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise TargetUnavailableError(
                f"{doing} on {self._where} failed ({said}): see whether qaic-util -q lists it as Ready."
            ) from None


def _bindings(described: bytes, messages: Any, damaged: str) -> dict[str, Binding]:
    """The bindings by name, in the order of their indices.

    Raises:
        PackageError: the description is not one, or contradicts itself.
    """
    from google.protobuf.message import DecodeError  # the messages' own module has imported it

    io = messages.IoDesc()
    try:
        io.ParseFromString(described)
    except DecodeError:
        raise PackageError(damaged) from None
    listed = sorted(io.selected_set.bindings, key=lambda binding: binding.index)
    sets = [[tuple(shape.dims) for shape in shapes.shapes] for shapes in io.allowed_shapes]
    sets = sets or [[tuple(binding.dims) for binding in listed]]
    if (
        not listed
        or [binding.index for binding in listed] != list(range(len(listed)))
        or any(len(shapes) != len(listed) for shapes in sets)
    ):
        raise PackageError(damaged)
    return {
        binding.name: Binding(
            binding.name,
            binding.index,
            DTYPES.get(binding.type),
            binding.dir == _OUTPUT,
            tuple(shapes[place] for shapes in sets),
        )
        for place, binding in enumerate(listed)
    }

"""The stand-in of the vendor's ``qaicrt``: runs a stand-in container's graph in ONNX Runtime by the rules of the card.

It refuses what the contract page (e) says the runtime refuses, and more where the page is silent: sizes that fit no
specialization or several, buffers of another length, a skipped input that is no state, calls out of order. Device
memory starts as NaN. State has the precision the IO list asks for; everything else is computed in float32, which no
card does: numbers of the card's 16-bit arithmetic are not simulated.
"""

from __future__ import annotations

import enum
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort

from stand_in import container, messages
from stand_in.errors import Refused
from stand_in.mx import mxint8

STAND_IN = True
_SIZES = {0: 4, 1: 2, 6: 4, 7: 8, 8: 1, 11: 2, container.MXINT8: 1}
_NUMPY = {0: np.float32, 1: np.float16, 6: np.int32, 7: np.int64, 8: np.int8}


class QStatus(enum.Enum):
    """Codes by the names of the vendor's open-source runtime; their numbers are not copied."""

    QS_SUCCESS = 0
    QS_PERM = enum.auto()
    QS_AGAIN = enum.auto()
    QS_NOMEM = enum.auto()
    QS_BUSY = enum.auto()
    QS_NODEV = enum.auto()
    QS_INVAL = enum.auto()
    QS_NOSPC = enum.auto()
    QS_TIMEDOUT = enum.auto()
    QS_UNSUPPORTED = enum.auto()
    QS_DEV_ERROR = enum.auto()
    QS_ERROR = enum.auto()


OK = QStatus.QS_SUCCESS


class Machine:
    """The devices there are, what is to fail next, and what happened."""

    def __init__(self) -> None:
        self.reset()

    def reset(self, devices: int = 1) -> None:
        """So many devices, all ready; nothing fails."""
        self.devices = dict.fromkeys(range(devices), "Ready")
        #: Name of a call -> what it gives the next time.
        self.faults: dict[str, QStatus | Exception] = {}
        #: Seconds every step takes longer.
        self.hang = 0.0
        #: Bytes sent in each step: input name -> bytes.
        self.sent: list[dict[str, int]] = []
        #: The specialization of each step.
        self.chosen: list[int] = []

    def fault(self, call: str) -> QStatus | None:
        """The status ``call`` has to return, once; raises where an exception was asked for."""
        planned = self.faults.pop(call, None)
        if isinstance(planned, Exception):
            raise planned
        return planned


MACHINE = Machine()


class QIDList(list):
    """Device ids."""


class QAicProgramProperties(SimpleNamespace):
    def __init__(self) -> None:
        super().__init__(dataPathTimeoutMs=0, SubmitRetryTimeoutMs=0, SubmitNumRetries=5, devMapping="")


class QBuffer:
    def __init__(self, content: bytes) -> None:
        if not isinstance(content, bytes):
            raise TypeError("QBuffer(): incompatible constructor arguments")
        self.content, self.size = content, len(content)

    def __bytes__(self) -> bytes:
        return self.content


class BufferDimensionsVecRef(list):
    def __init__(self, entries: Sequence[tuple[int, list[int]]]) -> None:
        for size, dims in entries:
            if type(size) is not int or not isinstance(dims, list) or not all(type(d) is int for d in dims):
                raise TypeError("BufferDimensionsVecRef(): incompatible constructor arguments")
        super().__init__(entries)


class Context:
    def __init__(self, ids: QIDList | None = None) -> None:
        if not MACHINE.devices:
            raise RuntimeError("Failed to create context: no devices")
        self.ids = list(ids) if ids is not None else [0]


class Queue:
    def __init__(self, context: Context, device: int) -> None:
        self.context, self.device = context, device

    def enqueue(self, execution: ExecObj) -> QStatus:
        planned = MACHINE.fault("enqueue")
        if planned is not None:
            return planned
        return execution._enqueue()


class Qpc:
    def __init__(self, directory: str) -> None:
        try:
            self.container, self.model = container.read(Path(directory) / "programqpc.bin")
        except Refused as error:
            raise RuntimeError(f"Failed to create Qpc: {error}") from None

    def getIoDescriptor(self) -> tuple[QStatus, bytes]:
        planned = MACHINE.fault("getIoDescriptor")
        if planned is not None:
            return planned, b""
        io = messages.IoDesc(program_name="stand-in")
        described = io.io_sets.add(name="default")
        for index, entry in enumerate(self.container.io):
            biggest = max(math.prod(shape) for shape in entry.shapes) * _SIZES[entry.type]
            described.bindings.add(
                name=entry.name, index=index, type=entry.type, dir=int(entry.output), dims=entry.shapes[0],
                size=biggest, is_valid=True,
            )  # fmt: skip
        io.selected_set.CopyFrom(described)
        count = len(self.container.io[0].shapes)
        for number in range(count if count > 1 else 0):
            shapes = io.allowed_shapes.add()
            for entry in self.container.io:
                shapes.shapes.add(type=entry.type, dims=entry.shapes[number])
        return OK, io.SerializeToString()


class Program:
    def __init__(self, context: Context, device: int | None, qpc: Qpc, properties: QAicProgramProperties) -> None:
        mapping = [int(part) for part in properties.devMapping.split(":")] if properties.devMapping else []
        if mapping and device is not None:
            raise ValueError("a device and devMapping exclude each other")
        self.devices = mapping or ([device] if device is not None else context.ids)
        self.qpc, self.limit = qpc, properties.dataPathTimeoutMs / 1000
        self.loaded = self.active = False
        self.memory: dict[str, np.ndarray] = {}
        self._session: ort.InferenceSession | None = None

    def load(self) -> QStatus:
        planned = MACHINE.fault("load")
        if planned is not None:
            return planned
        if any(device not in MACHINE.devices for device in self.devices):
            return QStatus.QS_NODEV
        if any(MACHINE.devices[device] != "Ready" for device in self.devices):
            return QStatus.QS_BUSY
        if len(self.devices) != self.qpc.container.devices:
            return QStatus.QS_INVAL
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        self._session = ort.InferenceSession(str(self.qpc.model), options)
        self.loaded = True
        return OK

    def activate(self) -> QStatus:
        planned = MACHINE.fault("activate")
        if planned is not None:
            return planned
        if not self.loaded or self.active:
            return QStatus.QS_INVAL
        self.active = True
        for source in self.qpc.container.states:
            entry = next(entry for entry in self.qpc.container.io if entry.name == source)
            # What nobody wrote: NaN, or the largest number.
            kind = np.dtype(entry.dtype)
            junk = np.nan if kind.kind == "f" else True if kind.kind == "b" else np.iinfo(kind).max
            self.memory[source] = np.full(entry.shapes[0], junk, kind)
        return OK

    def deactivate(self) -> QStatus:
        if not self.active:
            return QStatus.QS_INVAL
        self.active, self.memory = False, {}
        return OK

    def step(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One run on what is sent and, for skipped states, on what is kept; keeps the new state."""
        assert self._session is not None
        names = [value.name for value in self._session.get_outputs()]
        results = dict(zip(names, self._session.run(names, {**self.memory, **feeds}), strict=True))
        types = {entry.name: entry.type for entry in self.qpc.container.io}
        for source, result in self.qpc.container.states.items():
            results[result] = self.memory[source] = _kept(results[result], types[source])
        return results


class ExecObj:
    def __init__(self, context: Context, program: Program) -> None:
        if not program.active:
            raise RuntimeError("ExecObj: program is not activated")
        self._program = program
        self._given: list[tuple[container.Io, QBuffer, tuple[int, ...]]] | None = None
        self._state = "new"
        self._results: list[QBuffer] = []

    def setData(self, buffers: list[QBuffer], dims: BufferDimensionsVecRef) -> QStatus:
        planned = MACHINE.fault("setData")
        if planned is not None:
            return planned
        io, states = self._program.qpc.container.io, self._program.qpc.container.states
        if not isinstance(dims, BufferDimensionsVecRef) or not len(io) == len(buffers) == len(dims):
            return QStatus.QS_INVAL
        for entry, buffer, (size, shape) in zip(io, buffers, dims, strict=True):
            if size != _SIZES[entry.type] or not isinstance(buffer, QBuffer):
                return QStatus.QS_INVAL
            if buffer.size == 0:
                if shape != [0] or not (entry.output or entry.name in states):
                    return QStatus.QS_INVAL
            elif entry.type not in _NUMPY:
                return QStatus.QS_UNSUPPORTED
            elif buffer.size != math.prod(shape) * size:
                return QStatus.QS_INVAL
        self._given = [(e, b, tuple(shape)) for e, b, (_, shape) in zip(io, buffers, dims, strict=True)]
        self._state = "set"
        return OK

    def _enqueue(self) -> QStatus:
        if self._state != "set" or not self._program.active:
            return QStatus.QS_INVAL
        self._state = "queued"
        return OK

    def waitForCompletion(self) -> QStatus:
        planned = MACHINE.fault("waitForCompletion")
        if planned is not None:
            return planned
        if self._state != "queued" or self._given is None:
            return QStatus.QS_INVAL
        if MACHINE.hang and self._program.limit:
            time.sleep(min(MACHINE.hang, self._program.limit))
            if MACHINE.hang >= self._program.limit:
                # The vendor's driver cancels the request, and the status does not say why.
                return QStatus.QS_ERROR
        used = [(entry, buffer, shape) for entry, buffer, shape in self._given if buffer.size]
        sets = range(len(self._given[0][0].shapes))
        matching = [n for n in sets if all(tuple(entry.shapes[n]) == shape for entry, _, shape in used)]
        if len(matching) != 1:
            print("No matching dimension found" if not matching else "Several match", file=sys.stderr)
            return QStatus.QS_ERROR
        feeds = {
            entry.name: np.frombuffer(buffer.content, _NUMPY[entry.type]).reshape(shape).astype(entry.dtype)
            for entry, buffer, shape in used
            if not entry.output
        }
        results = self._program.step(feeds)
        asked = {entry.name for entry, _, _ in used if entry.output}
        self._results = [
            QBuffer(results[entry.name].astype(_NUMPY[entry.type]).tobytes() if entry.name in asked else b"")
            for entry, _, _ in self._given
        ]
        MACHINE.chosen.append(matching[0])
        MACHINE.sent.append({entry.name: buffer.size for entry, buffer, _ in used if not entry.output})
        self._state = "done"
        return OK

    def getData(self) -> tuple[QStatus, list[QBuffer]]:
        planned = MACHINE.fault("getData")
        if planned is not None:
            return planned, []
        if self._state != "done":
            return QStatus.QS_AGAIN, []
        return OK, self._results


def _kept(values: np.ndarray, kind: int) -> np.ndarray:
    """The values as device memory of this type holds them."""
    if kind == container.TYPES["float16"]:
        return values.astype(np.float16).astype(values.dtype)
    return mxint8(values).astype(values.dtype) if kind == container.MXINT8 else values

"""What a status of the Cloud AI runtime means, in one sentence and as one of our errors."""

from __future__ import annotations

from QEfficient.errors import OutOfMemoryError, QEfficientError, TargetUnavailableError

#: Status name -> (error class, what it means and what to do).
_MEANINGS: dict[str, tuple[type[QEfficientError], str]] = {
    "QS_PERM": (TargetUnavailableError, "this user may not use the device: join the group qaic"),
    "QS_NODEV": (TargetUnavailableError, "there is no such device: pass device_ids that qaic-util -q lists"),
    "QS_BUSY": (TargetUnavailableError, "the device is busy: close what runs on it, or pass other device_ids"),
    "QS_AGAIN": (TargetUnavailableError, "the device has no free slot now: try again, or pass other device_ids"),
    "QS_NOSPC": (
        TargetUnavailableError,
        "the device has too few free cores: close what runs on it, or compile with fewer num_cores",
    ),
    "QS_NOMEM": (
        OutOfMemoryError,
        "there is not enough memory on the device: lower ctx_len or full_batch_size, or compile for more devices",
    ),
    "QS_INVAL": (QEfficientError, "the runtime takes a call, a program or a buffer for invalid"),
    "QS_BADFD": (QEfficientError, "the device was reset or is gone: load the package again"),
    "QS_UNSUPPORTED": (QEfficientError, "this card or its SDK does not support the program: compile it for this one"),
    "QS_DATA_CRC_ERROR": (QEfficientError, "data was damaged on the way to or from the device: load the package again"),
    "QS_DEV_ERROR": (QEfficientError, "the device failed: see qaic-util -q and its driver's messages (dmesg)"),
    "QS_PROTOCOL": (QEfficientError, "driver and firmware do not understand each other: install one release of both"),
}
TIMED_OUT = "QS_TIMEDOUT"


def name_of(status: object) -> str:
    """``QS_BUSY``, or what the status prints as when it has no name."""
    return str(getattr(status, "name", status))


def failure(status: object, doing: str, devices: str) -> QEfficientError:
    """The error for a status that is not success.

    Args:
        doing: what was tried, such as "loading the program".
        devices: where, such as "device 0".
    """
    name = name_of(status)
    kind, meaning = _MEANINGS.get(name, (QEfficientError, "see qaic-util -q and its driver's messages (dmesg)"))
    return kind(f"{doing} on {devices} failed with {name}: {meaning}.")


def timed_out(doing: str, devices: str, limit: float) -> QEfficientError:
    """The error for a step that the device did not finish in time; what it holds is unknown afterwards."""
    return QEfficientError(
        f"{doing} on {devices} took longer than {limit:g} seconds and was given up: pass a larger timeout, or see "
        "whether the device is Ready in qaic-util -q."
    )

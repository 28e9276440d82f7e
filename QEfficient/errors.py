"""Exceptions a user can meet; every message is one sentence that says what is wrong and what to do."""


class QEfficientError(Exception):
    """Base of every error this library raises on purpose."""


class ModelLoadError(QEfficientError):
    """A checkpoint cannot be found, read or trusted (missing path, no network, pickle-only weights)."""


class UnsupportedModelError(QEfficientError):
    """The model exists but does not fit the class or the export mechanism (e.g. an encoder in the causal class)."""


class OptionError(QEfficientError, ValueError):
    """An option is unknown, out of range or contradicts another one."""


class InputError(QEfficientError, ValueError):
    """Input to ``generate`` or to a session has a wrong name, dtype, rank or is empty."""


class ContextLengthError(InputError):
    """A prompt plus the tokens asked for does not fit the compiled context."""


class ShapeError(InputError):
    """No compiled specialization accepts the shapes passed."""


class ExportError(QEfficientError):
    """The model could not be turned into an ONNX graph."""


class TransformError(QEfficientError):
    """An ONNX transform could not be loaded, failed, or broke the rules of the queue."""


class PackageError(QEfficientError):
    """A package is foreign, corrupt, tampered with, or of a format version this library does not know."""


class ArtifactWriteError(QEfficientError, OSError):
    """An artefact could not be written (for example: no space left); nothing half-written is left behind."""


class TargetUnavailableError(QEfficientError):
    """The target cannot run or compile here; the message says what to install."""


class OutOfMemoryError(QEfficientError, MemoryError):
    """A program needs more memory than there is; the session stays usable with smaller inputs."""


class TrainingError(QEfficientError):
    """Training cannot go on: the loss is not a number, or memory ran out; the last checkpoint is intact."""

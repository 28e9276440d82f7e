"""What a session checks before a step: names, dtypes and shapes of inputs and parameters against the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from QEfficient.errors import InputError, QEfficientError, ShapeError
from QEfficient.suggest import did_you_mean
from QEfficient.targets.manifest import Specialization, TensorSpec


def feed_symbols(
    inputs: Mapping[str, TensorSpec], feeds: Mapping[str, np.ndarray], known: Mapping[str, int]
) -> dict[str, int]:
    """The value of every symbolic dimension; ``known`` are those that are settled before the call.

    Raises:
        InputError: a name, dtype or rank differs from the inputs.
        ShapeError: a fixed size differs, or one symbol would need two values.
    """
    unknown, missing = set(feeds) - set(inputs), set(inputs) - set(feeds)
    if unknown or missing:
        problems = {"missing": sorted(missing), "unexpected": sorted(unknown)}
        found = " and ".join(f"{what} {names}" for what, names in problems.items() if names)
        raise InputError(f"the program's inputs are {sorted(inputs)}: {found}.")
    symbols = dict(known)
    for name, array in feeds.items():
        spec = inputs[name]
        if not isinstance(array, np.ndarray) or array.dtype != np.dtype(spec.dtype):
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise InputError(f"{name} must be a numpy array of {spec.dtype}, got {kind}.")
        if array.ndim != len(spec.shape):
            raise InputError(f"{name} must have rank {len(spec.shape)} {spec.shape}, got shape {array.shape}.")
        for size, dim in zip(array.shape, spec.shape, strict=True):
            expected = symbols.setdefault(dim, size) if isinstance(dim, str) else dim
            if size != expected:
                raise ShapeError(f"{name} has shape {array.shape}, which does not fit {spec.shape} here.")
    return symbols


def misfit(symbols: Mapping[str, int], specialization: Specialization) -> str | None:
    """The first symbol whose value the specialization does not take; None when it takes them all."""
    for name, value in symbols.items():
        allowed = specialization.symbols.get(name)
        if allowed is not None and not allowed.accepts(value):
            return name
    return None


def checked_parameters(parameters: Sequence[TensorSpec], values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values as contiguous arrays; those that are so already are not copied.

    Raises:
        InputError: a name, dtype or shape differs from the parameters.
    """
    known = {spec.name: spec for spec in parameters}
    for name, array in values.items():
        spec = known.get(name)
        if spec is None:
            raise InputError(f"the program has no parameter {name!r}.{did_you_mean(name, known)}")
        if not isinstance(array, np.ndarray) or array.dtype != np.dtype(spec.dtype) or array.shape != spec.shape:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise InputError(f"parameter {name} must be {spec.dtype} {spec.shape}, got {found}.")
    return {name: np.ascontiguousarray(array) for name, array in values.items()}


def require_parameters(parameters: Sequence[TensorSpec], given: Mapping[str, object]) -> None:
    """QEfficientError when some parameter was never set."""
    unset = [spec.name for spec in parameters if spec.name not in given]
    if unset:
        raise QEfficientError(f"call set_parameters() before run(): {unset[0]} and {len(unset) - 1} more are unset.")

"""The Target and Session protocols: what turns ONNX into a package and a package into something that runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

from QEfficient.errors import OptionError
from QEfficient.targets.manifest import Manifest, Specialization
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.tuning import Tuning


@dataclass(frozen=True)
class Availability:
    """Whether a target can compile and run on this machine, and if not, what is missing and how to get it."""

    target: str
    can_compile: bool
    can_run: bool
    detail: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardSettings:
    """Where a package for a card runs.

    Attributes:
        device_ids: None takes those it was compiled with, or the first ones.
        timeout: seconds that one step may take.
    """

    device_ids: tuple[int, ...] | None = None
    timeout: float = 60.0


def card_settings(device_ids: Sequence[int] | None, timeout: float = CardSettings.timeout) -> CardSettings:
    """Settings from what a user passed; OptionError when these are no device ids or no time."""
    if device_ids is not None:
        whole = [isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in device_ids]
        if not whole or not all(whole):
            raise OptionError(f"device_ids must be a non-empty list of device ids, got {device_ids!r}.")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
        raise OptionError(f"timeout must be a number of seconds above 0, got {timeout!r}.")
    return CardSettings(None if device_ids is None else tuple(device_ids), float(timeout))


@runtime_checkable
class Session(Protocol):
    """A loaded package. Owns one set of retained state (KV cache and the like); not safe for concurrent calls."""

    manifest: Manifest

    def begin(self, symbols: Mapping[str, int]) -> None:
        """Prepares retained state for these values of the symbolic dimensions (e.g. ``batch_size``, ``ctx_len``).

        A row's state counts as empty until it is fed a token at position 0; nothing needs clearing between requests.
        """

    def set_parameters(self, values: Mapping[str, np.ndarray]) -> None:
        """Sets inputs the manifest lists as ``parameters``; they hold until set again, those not named keep theirs.

        A target whose memory is the host's reads the arrays in place: change their contents and the next step sees it.

        Raises:
            InputError: a name, dtype or shape differs from the manifest.
        """

    def run(
        self, feeds: Mapping[str, np.ndarray], specialization: str, row: int | None = None
    ) -> dict[str, np.ndarray]:
        """Runs one step and returns the outputs that are not retained state, as far as the specialization has them.

        Returned arrays may be views of buffers that the next call overwrites. ``row`` runs a batch of one on that row
        of the state, where rows of state are rows of the batch; only targets whose specialization asks for it
        (`Specialization.by_row`) take it.

        Raises:
            InputError: a name, dtype or rank differs from the manifest.
            ShapeError: the shapes do not fit the specialization.
        """

    def close(self) -> None:
        """Frees the session's memory; the session cannot be used afterwards."""


@dataclass(frozen=True)
class CompileRequest:
    """What a target needs to write a package into ``directory``."""

    onnx_path: Path
    directory: Path
    manifest: Manifest
    options: CompileOptions
    progress: Callable[[str, int, int], None]
    #: ``variant(program, names)`` loads the graph, runs more ONNX transforms on it, as the queue spells them, and
    #: returns it; the manifest will say that they made ``program``.
    variant: Callable[[str, Sequence[str]], ir.Model]
    #: (device, inode) of files that are not only this package's: they are placed whole, as links where possible.
    originals: frozenset[tuple[int, int]]


class Target(Protocol):
    """One place a package can run. A target is one file and is registered by name in ``targets/registry.py``."""

    name: str

    def check(self) -> Availability:
        """Says what this target can do here; starts nothing expensive."""

    def transforms(self, task: str, options: CompileOptions) -> tuple[str, ...]:
        """ONNX transforms this target wants for a graph of this task, as the queue spells them.

        They run after the user's own. ``options`` are normalised.
        """

    def normalise(self, options: CompileOptions) -> CompileOptions:
        """Fills in this target's defaults so that equal meanings have equal cache keys; raises OptionError."""

    def specializations(self, options: CompileOptions, task: str) -> tuple[Specialization, ...]:
        """The named shape sets a package compiled with these options accepts."""

    def toolchain(self) -> dict[str, str]:
        """Versions of the libraries or SDKs that shape the artefact; part of the cache key."""

    def compile(self, request: CompileRequest) -> Manifest:
        """Writes the program and its weights into ``request.directory`` and returns the completed manifest."""

    def load(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        tuning: Tuning | None = None,
        card: CardSettings | None = None,
    ) -> Session:
        """Opens a verified package.

        Args:
            threads, tuning: how a processor runs it; ``tuning`` is what was measured here, ``threads`` wins over it.
            card: where a card runs it; None takes the defaults.

        Raises:
            TargetUnavailableError: it cannot run here.
            OptionError: ``card`` names devices, and this target has none.
        """

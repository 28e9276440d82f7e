"""Adapters of a loaded package: held by name, one active at a time, swapped without compiling anything."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from QEfficient.engine.adapter_file import AdapterFile, empty, read_adapter, warn_of_another_base
from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean
from QEfficient.targets.base import Session

#: Where a package keeps the adapters it came with: ``adapters/<name>/``.
ADAPTERS_DIR = "adapters"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: object) -> str:
    """OptionError unless the text can name an adapter, which is also the name of a directory."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OptionError(
            f"an adapter's name must be letters, digits, '.', '_' and '-', beginning with a letter or digit: {name!r}."
        )
    return name


def unknown(name: object, known: list[str]) -> OptionError:
    """The error for an adapter that was not loaded."""
    there = f"loaded are {known}" if known else "none is loaded"
    return OptionError(
        f"there is no adapter {name!r}: {there}; call load_adapter() first.{did_you_mean(str(name), known)}"
    )


class AdapterBank:
    """The adapters of one session. Each takes the memory of its tensors at the package's rank, in float32."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._parameters = session.manifest.parameters
        self._values: dict[str, dict[str, np.ndarray]] = {}
        self._base = empty(self._parameters)
        self.active: str | None = None
        if self._base:
            session.set_parameters(self._base)

    @property
    def values(self) -> dict[str, np.ndarray]:
        """What the session computes with now: parameter name -> array; empty for a package without adapters."""
        return self._base if self.active is None else self._values[self.active]

    @property
    def base_model(self) -> str | None:
        """The name of what was compiled; None for a model in memory that had none."""
        model = self._session.manifest.model
        name = model.get("name")
        return str(name) if name and name != model.get("architecture") else None

    @property
    def names(self) -> list[str]:
        return list(self._values)

    def load(self, directory: str | Path, name: str) -> AdapterFile:
        """Reads an adapter and returns it; one of the same name is replaced, and stays active if it was."""
        check_name(name)
        if not self._base:
            raise OptionError(
                "this package was compiled without adapters: compile it with QEFFAutoPeftModelForCausalLM to load some."
            )
        adapter = read_adapter(directory)
        self._values[name] = adapter.arrays(self._parameters)
        if name == self.active:
            self.activate(name)
        return adapter

    def activate(self, name: str | None) -> None:
        """The next step computes with this adapter; None is the base model."""
        if name is not None and name not in self._values:
            raise unknown(name, self.names)
        if self._base:
            self._session.set_parameters(self._base if name is None else self._values[name])
        self.active = name

    def unload(self, name: str) -> None:
        """Forgets an adapter; when it is the active one, the base model is active afterwards."""
        if name not in self._values:
            raise unknown(name, self.names)
        if name == self.active:
            self.activate(None)
        del self._values[name]

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Activates an adapter for the body; None changes nothing."""
        before = self.active
        if name is None or name == before:
            yield
            return
        self.activate(name)
        try:
            yield
        finally:
            self.activate(before)


class Disabled:
    """What `disable_adapter` returns: the base model is active at once; as a context manager, until its end."""

    def __init__(self, owner: Adaptable) -> None:
        self._owner, self._before = owner, owner.active_adapter
        owner.set_adapter(None)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._before in self._owner.adapters:
            self._owner.set_adapter(self._before)


class Adaptable:
    """The adapter methods of a package and of a model, in PEFT's names."""

    def load_adapter(self, directory: str | Path, adapter_name: str) -> None:
        """Loads a PEFT LoRA adapter (``adapter_config.json``, ``adapter_model.safetensors``) under a name.

        It is not made active; loading a name again replaces it. One that names another base model is loaded with a
        warning.

        Raises:
            ModelLoadError: missing, malformed or pickled files. UnsupportedModelError: not plain LoRA on linear layers.
            InputError: it does not fit: another base model, other modules, or a larger rank than compiled.
            OptionError: an unusable name, or the package was compiled without adapters.
        """
        raise NotImplementedError

    def set_adapter(self, adapter_name: str | None) -> None:
        """Makes a loaded adapter active; None is the base model. OptionError when there is none of that name."""
        raise NotImplementedError

    def unload_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; the base model is active afterwards when it was the active one."""
        raise NotImplementedError

    @property
    def active_adapter(self) -> str | None:
        """The adapter the next call computes with; None is the base model."""
        raise NotImplementedError

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters, in the order they were loaded."""
        raise NotImplementedError

    def disable_adapter(self) -> Disabled:
        """Switches to the base model, or does so for the body of a ``with`` statement."""
        return Disabled(self)


class AdaptedPackage(Adaptable):
    """The adapter methods over a session."""

    _bank: AdapterBank
    directory: Path

    def load_adapter(self, directory: str | Path, adapter_name: str) -> None:
        adapter = self._bank.load(directory, adapter_name)
        if adapter.directory.parent != self.directory / ADAPTERS_DIR:  # the package's own were chosen with its base
            warn_of_another_base(adapter, self._bank.base_model)

    def set_adapter(self, adapter_name: str | None) -> None:
        self._bank.activate(adapter_name)

    def unload_adapter(self, adapter_name: str) -> None:
        self._bank.unload(adapter_name)

    @property
    def active_adapter(self) -> str | None:
        return self._bank.active

    @property
    def adapters(self) -> list[str]:
        return self._bank.names

    @property
    def adapter_values(self) -> dict[str, np.ndarray]:
        """The active adapter as the program takes it: parameter name -> float32 array."""
        return self._bank.values

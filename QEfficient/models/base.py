"""The one template behind every model class: load -> transform -> export -> compile -> session."""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, overload

from QEfficient.errors import ModelLoadError, OptionError, PackageError, TargetUnavailableError
from QEfficient.exporter.interface import Interface
from QEfficient.exporter.quiet import quiet
from QEfficient.models import keys
from QEfficient.models.hub import resolve as resolve_checkpoint
from QEfficient.models.packaging import compile_export, refuse_early, write_side_files
from QEfficient.models.source import CheckpointSource, MemorySource, ModelSource
from QEfficient.progress import Progress, bar
from QEfficient.store.copy import copy_tree
from QEfficient.store.digest import file_digest, json_digest
from QEfficient.store.entry import ENTRY_FILE
from QEfficient.store.home import cache_home
from QEfficient.store.store import ArtifactStore
from QEfficient.suggest import did_you_mean
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.registry import compiling_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from QEfficient.engine.package import LoadedPackage
    from QEfficient.evaluate.numerics_report import NumericsReport
    from QEfficient.evaluate.parity import ParityReport
    from QEfficient.transforms.onnx.base import OnnxTransform
    from QEfficient.transforms.onnx.queue import TransformLike
    from QEfficient.transforms.pytorch.eager import TransformedModel

EXPORTS = "exports"
#: Keywords of `from_pretrained` that say where the checkpoint is.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")


class QEFFBaseModel(ABC):
    """Anything that can be exported, compiled and run."""

    @abstractmethod
    def export(self, export_dir: str | Path | None = None) -> Path:
        """Writes the ONNX graph and returns the path of ``model.onnx``."""

    @abstractmethod
    def compile(self, **options: Any) -> Path:
        """Compiles for a target and returns the package directory."""

    @abstractmethod
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the compiled package; compiles with defaults when that has not happened."""


class QEFFTransformersBase(QEFFBaseModel):
    """A Hugging Face model. Subclasses name the task and how its graph is written.

    Construct with `from_pretrained`, or from a transformers model already in memory.
    """

    #: What the package does, in the hub's words.
    task: ClassVar[str]
    #: The transformers class that loads the model.
    factory: ClassVar[str]

    def __init__(self, model: PreTrainedModel | ModelSource, *, cache_home_dir: str | Path | None = None) -> None:
        self._source = model if isinstance(model, ModelSource) else _memory_source(model, type(self))
        self._store: ArtifactStore | None = None
        self._home = Path(cache_home_dir) if cache_home_dir is not None else None
        self._model: PreTrainedModel | None = None
        self._package: Path | None = None
        self._loaded: LoadedPackage | None = None
        #: Path of the exported graph, once there is one.
        self.onnx_path: Path | None = None

    @classmethod
    @abstractmethod
    def from_pretrained(cls, name_or_path: str | Path, **arguments: Any) -> Self:
        """Names a checkpoint directory or hub id; nothing is loaded yet."""

    @classmethod
    def _open(cls, name_or_path: str | Path, trust_remote_code: bool, hub: dict[str, Any]) -> CheckpointSource:
        if not isinstance(name_or_path, str | Path):
            raise ModelLoadError(f"pass a directory or a hub id, got {type(name_or_path).__name__}.")
        cls._check_hub(hub)
        directory = resolve_checkpoint(name_or_path, **hub)
        source = CheckpointSource(directory, str(name_or_path), trust_remote_code)
        cls._check_architecture(source)
        return source

    @classmethod
    def _check_hub(cls, hub: dict[str, Any]) -> None:
        """OptionError for a keyword that does not say where a checkpoint is."""
        for name in hub:
            if name not in HUB_ARGUMENTS:
                own = inspect.signature(cls.from_pretrained).parameters.values()
                known = (*HUB_ARGUMENTS, *(p.name for p in own if p.kind is p.KEYWORD_ONLY))
                raise OptionError(f"{cls.__name__}.from_pretrained has no option {name!r}.{did_you_mean(name, known)}")

    @classmethod
    def _check_architecture(cls, source: CheckpointSource) -> None:
        """Refuses a checkpoint that plainly belongs to another class, before anything expensive."""

    # ------------------------------------------------------------------ what it is

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model, float32, loaded when first asked for.

        For a checkpoint this is a reference copy: exporting reads the files, so changes made to it have no effect.
        Construct the class from the changed model instead.
        """
        if self._model is None:
            require_export_libraries()
            self._model = self._source.load(self.factory)
        return self._model

    @property
    def config(self) -> Any:
        """The model's transformers configuration."""
        return self.model.config

    @property
    def model_name(self) -> str:
        return self._source.name

    @property
    def qpc_path(self) -> Path | None:
        """The compiled package, once there is one."""
        return self._package

    @property
    def store(self) -> ArtifactStore:
        if self._store is None:
            self._store = ArtifactStore(cache_home(self._home))
        return self._store

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_name!r})"

    # ------------------------------------------------------------------ export

    @abstractmethod
    def _variant(self, options: CompileOptions | None) -> dict[str, Any]:
        """The JSON-ready arguments that change the graph."""

    @abstractmethod
    def _write_graph(self, ghost: PreTrainedModel, weights: Any, directory: Path, variant: dict[str, Any]) -> Interface:
        """Exports ``ghost`` into ``directory``."""

    def _facts(self) -> dict[str, Any]:
        """More entries for the interface's facts, and so for the manifest's ``model``."""
        return {}

    def export(self, export_dir: str | Path | None = None, *, progress: bool | None = None) -> Path:
        """Exports the model to ONNX, or finds the export in the cache.

        Args:
            export_dir: also place a copy of the result there (a new or empty directory).
            progress: show a progress bar; None shows one on a terminal.

        Returns:
            The path of ``model.onnx``; its weights lie beside it.

        Raises:
            UnsupportedModelError, ExportError: the model does not fit, or cannot be expressed in ONNX.
            ArtifactWriteError: the disk is full or not writable.
        """
        if export_dir is not None:
            check_destination(Path(export_dir))
        with bar(f"exporting {self.model_name}", progress) as report:
            _, directory = self._export(self._variant(None), report)
        if export_dir is not None:
            directory = copy_entry(directory, Path(export_dir))
        self.onnx_path = directory / "model.onnx"
        return self.onnx_path

    def _export(self, variant: dict[str, Any], report: Progress) -> tuple[str, Path]:
        """Returns (key, directory) of the export, built if needed."""
        report("reading identity", 0, 4)
        identity = {
            **self._source.identity(self.store.memo),
            "generation_config": self._source.generation_config(),
            "tokenizer": {path.name: file_digest(path) for path in self._source.tokenizer_files()},
        }
        key = keys.export_key(identity, self.task, variant)
        found = self.store.get(EXPORTS, key)
        if found is not None:
            return key, found

        def build(directory: Path) -> dict[str, Any]:
            require_export_libraries()
            report("building the model without weights", 1, 4)
            with quiet(), tempfile.TemporaryDirectory(prefix=".scratch-", dir=directory) as scratch:
                ghost = self._source.ghost(self.factory)
                report("locating weights", 2, 4)
                weights = self._source.weights(ghost, Path(scratch))
                report("tracing", 3, 4)
                interface = self._write_graph(ghost, weights, directory, variant)
            facts = {"name": self.model_name, **interface.facts, **self._facts()}
            interface.with_facts(facts).save(directory)
            write_side_files(
                directory,
                self._source.tokenizer_files(),
                self._source.generation_config(),
                self._source.raw_config(),
            )
            known = self._source.weight_digests(self.store.memo)
            digests = {name: digest for name, digest in known.items() if (directory / name).is_file()}
            return {
                "digests": digests,
                "meta": {"libraries": keys.library_versions(), "task": interface.task},
            }

        label = f"{self.model_name} ({self.task}, ONNX)"
        return key, self.store.build(EXPORTS, key, build, label, lambda: report("waiting for another process", 0, 0))

    # ------------------------------------------------------------------ compile

    def compile(
        self,
        onnx_path: str | Path | None = None,
        compile_dir: str | Path | None = None,
        *,
        transforms: Sequence[TransformLike] = (),
        progress: bool | None = None,
        **options: Any,
    ) -> Path:
        """Compiles the model for a target, or finds the package in the cache.

        Args:
            onnx_path: a graph made by `export`; exported first when not given.
            compile_dir: also place a copy of the package there (a new or empty directory).
            transforms: ONNX transforms to run, in order: ``"FP16Clip"``, ``"SplitWeights:max_shard_size=1GB"``,
                ``"file.py:Class"``, a class or an instance.
            progress: show a progress bar; None shows one on a terminal.
            **options: the fields of `QEfficient.targets.options.CompileOptions`; an unknown one is an error.

        Returns:
            The package directory.

        Raises:
            OptionError: an unknown, contradictory or out-of-range option.
            UnsupportedModelError, ExportError, TransformError, ArtifactWriteError: as their names say.
        """
        asked = CompileOptions.from_kwargs(**options)
        compiling_target(asked)
        queue = resolve_queue(transforms)
        if compile_dir is not None:
            check_destination(Path(compile_dir))
        if onnx_path is None:
            refuse_early(asked, self.task, self._variant(asked), self._source.raw_config(), self.model_name)
        with bar(f"compiling {self.model_name}", progress) as report:
            if onnx_path is None:
                export_key, directory = self._export(self._variant(asked), report)
            else:
                export_key, directory = given_export(Path(onnx_path))
            self.onnx_path = directory / "model.onnx"
            package = self._complete(compile_export(self.store, directory, export_key, asked, queue, report))
        if compile_dir is not None:
            package = copy_entry(package, Path(compile_dir))
        self._package = package
        self._loaded = None
        return package

    def _complete(self, package: Path) -> Path:
        """What a subclass adds to a compiled package, which itself is never changed."""
        return package

    # ------------------------------------------------------------------ run

    def _ready(self) -> LoadedPackage:
        """The loaded package; compiles with defaults first when needed."""
        if self._loaded is None:
            from QEfficient.engine.package import open_package

            # The cache has just checked it.
            self._loaded = open_package(self._compiled(), verify=False)
        return self._loaded

    def _compiled(self) -> Path:
        """The package directory; compiles with defaults when there was no compile yet.

        Raises:
            PackageError: the package was removed after it was compiled.
        """
        package = self._package or self.compile()
        if not package.is_dir():
            raise PackageError(f"{package} was removed after compiling (by cache gc?): call compile() again.")
        return package

    @abstractmethod
    def transformed(self) -> TransformedModel:
        """The torch module that is exported, runnable in eager mode; shares its weights with `model`."""

    @overload
    def validate(self, *args: Any, simulate: None = None, **kwargs: Any) -> ParityReport: ...

    @overload
    def validate(self, *args: Any, simulate: str, **kwargs: Any) -> NumericsReport: ...

    def validate(self, *args: Any, simulate: str | None = None, **kwargs: Any) -> ParityReport | NumericsReport:
        """Compares Hugging Face, transformed torch, ONNX and package; see `QEfficient.evaluate.parity.validate`.

        With ``simulate="qaic"`` it measures instead what the card's number formats cost: see
        `QEfficient.evaluate.numerics.preview`.
        """
        if simulate is not None:
            from QEfficient.evaluate.numerics import preview

            return preview(self, *args, simulate=simulate, **kwargs)
        from QEfficient.evaluate.parity import validate

        return validate(self, *args, **kwargs)

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Copies the compiled package to a directory of its own, which `QEfficient.load` runs anywhere."""
        check_destination(Path(save_directory))
        return copy_entry(self._compiled(), Path(save_directory))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads the compiled package to the Hugging Face hub; returns the address of the commit.

        Raises:
            ModelLoadError: the hub cannot be reached or refuses the upload.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            raise ModelLoadError(f"{repo_id!r} is not a valid hub id: pass one such as 'org/name'.") from None

        with tempfile.TemporaryDirectory() as scratch:
            package = self.save_pretrained(Path(scratch) / "package")
            # The hub's client library lets its transport's errors (no route, time-out) through as they are.
            transport: type[BaseException] = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
            try:
                api = HfApi(token=token)
                api.create_repo(repo_id, private=private, exist_ok=True)
                return str(api.upload_folder(repo_id=repo_id, folder_path=package))
            except (HfHubHTTPError, HFValidationError, OSError, transport) as error:
                raise ModelLoadError(
                    f"the package could not be pushed to {repo_id} ({type(error).__name__}): check the connection and "
                    "the token, or copy the package with save_pretrained()."
                ) from error


def _memory_source(model: Any, cls: type) -> MemorySource:
    for name in ("config", "state_dict", "forward"):
        if not hasattr(model, name):
            raise ModelLoadError(
                f"{cls.__name__} takes a transformers model, got {type(model).__name__}: for a path or hub id use "
                f"{cls.__name__}.from_pretrained(...)."
            )
    return MemorySource(model)


def resolve_queue(transforms: Sequence[TransformLike]) -> list[OnnxTransform]:
    """The transforms a user named; an empty list costs no import, so that a warm start stays quick."""
    if not transforms:
        return []
    from QEfficient.transforms.onnx.queue import resolve

    return resolve(transforms)


def require_export_libraries() -> None:
    """TargetUnavailableError with the command to run, when what exporting needs is not installed."""
    missing = [name for name in keys.EXPORT_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise TargetUnavailableError(
            f"loading and exporting a model needs {', '.join(missing)}: pip install 'qefficient[export]' "
            "(a finished package runs without)."
        )


def given_export(onnx_path: Path) -> tuple[str, Path]:
    """An export the caller names: (key made of its content, directory).

    Raises:
        OptionError: the path is not a ``model.onnx`` that `export` made.
    """
    directory = onnx_path.parent
    if not onnx_path.is_file():
        raise OptionError(f"{onnx_path} does not exist: pass the model.onnx that export() returned.")
    if onnx_path.name != "model.onnx" or not (directory / "interface.json").is_file():
        raise OptionError(f"{onnx_path} was not made by export(): pass the model.onnx it returned.")
    digests = {p.name: file_digest(p) for p in sorted(directory.iterdir()) if p.is_file() and p.name != ENTRY_FILE}
    return json_digest({"given": digests}), directory


def copy_entry(entry: Path, destination: Path) -> Path:
    """Copies an artefact out of the cache, whole or not at all.

    Raises:
        OptionError: the destination exists and is not empty.
    """
    check_destination(destination)
    copy_tree(entry, destination)
    return destination


def check_destination(destination: Path) -> None:
    """OptionError when a copy cannot go there, which is worth knowing before the work and not after it."""
    there = next(path for path in (destination, *destination.absolute().parents) if path.exists())
    if not there.is_dir():
        raise OptionError(f"{destination} cannot be made, for {there} is a file: choose a new directory.")
    if there == destination and any(destination.iterdir()):
        raise OptionError(f"{destination} exists and is not empty: choose a new directory.")
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise OptionError(f"{destination} cannot be made ({error.strerror}): choose another directory.") from None

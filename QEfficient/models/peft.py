"""A causal language model with LoRA adapters that are swapped in the compiled package, without compiling again."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from QEfficient.engine.adapter_file import CONFIG_FILE, AdapterFile, read_adapter, warn_of_another_base
from QEfficient.engine.adapters import Adaptable, check_name, unknown
from QEfficient.errors import ModelLoadError, OptionError, TargetUnavailableError
from QEfficient.exporter.interface import Interface
from QEfficient.models.adapter_package import with_adapters
from QEfficient.models.auto import QEFFAutoModelForCausalLM
from QEfficient.models.base import check_destination
from QEfficient.models.hub import resolve
from QEfficient.models.source import MemorySource, ModelSource
from QEfficient.store.files import remove_tree
from QEfficient.targets.manifest import Manifest
from QEfficient.targets.options import CompileOptions

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from QEfficient.engine.package import LoadedPackage
    from QEfficient.exporter.lora import LoraGeometry
    from QEfficient.transforms.onnx.queue import TransformLike
    from QEfficient.transforms.pytorch.eager import TransformedModel


class QEFFAutoPeftModelForCausalLM(Adaptable, QEFFAutoModelForCausalLM):
    """A causal language model with LoRA adapters (PEFT).

    The adapters' tensors are parameters of the package: `load_adapter` and `set_adapter` swap them in a compiled
    package. Which modules can be adapted, and up to which rank, is decided when compiling: by the adapters loaded then,
    and by ``max_rank`` and ``target_modules``.

    Example:
        >>> model = QEFFAutoPeftModelForCausalLM.from_pretrained("path/to/adapter")
        >>> model.compile(ctx_len=512)
        >>> model.load_adapter("path/to/another", "other")
        >>> print(model.generate(prompts=["Question: "], generation_len=64, adapter_name="other").texts[0])
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel | ModelSource,
        *,
        max_rank: int | None = None,
        target_modules: str | Sequence[str] | None = None,
        continuous_batching: bool = False,
        cache_home_dir: str | Path | None = None,
    ) -> None:
        self._adapters: dict[str, AdapterFile] = {}
        self._active: str | None = None
        self._plain_package: Path | None = None
        self._reference: tuple[Any, PreTrainedModel] | None = None
        peft_model: Any = None
        source: Any = model
        if not isinstance(model, ModelSource) and hasattr(model, "peft_config"):
            from QEfficient.models.peft_memory import without_adapters

            peft_model, source = model, MemorySource(without_adapters(model))
        super().__init__(source, continuous_batching=continuous_batching, cache_home_dir=cache_home_dir)
        self.max_rank = _rank(max_rank)
        self.target_modules = _targets(target_modules)
        if peft_model is not None:
            self._take(peft_model)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        adapter_name: str = "default",
        base_model: str | Path | None = None,
        max_rank: int | None = None,
        target_modules: str | Sequence[str] | None = None,
        continuous_batching: bool = False,
        trust_remote_code: bool = False,
        cache_home_dir: str | Path | None = None,
        **hub: Any,
    ) -> Self:
        """Names an adapter and its base model, or a base model alone; nothing is loaded yet.

        Args:
            name_or_path: a directory or hub id with ``adapter_config.json``, or a base model's.
            adapter_name: the adapter's name here; it is the active one.
            base_model: the base model's directory or hub id, instead of the one the adapter's configuration names.
            max_rank: the largest rank to compile for; at least the largest of the adapters loaded then, which is also
                what None means.
            target_modules: modules to compile for besides those of the adapters loaded then: last parts of their names
                as in PEFT ("q_proj"), or "all-linear".
            continuous_batching, trust_remote_code, cache_home_dir, **hub: as for
                `QEFFAutoModelForCausalLM.from_pretrained`; ``revision`` is the adapter's.

        Raises:
            ModelLoadError: nothing there, unreadable, or pickled tensors only.
            UnsupportedModelError: not a causal language model, or not a plain LoRA adapter.
            OptionError: an unknown or unusable option.
        """
        require_peft()
        check_name(adapter_name)
        if not isinstance(name_or_path, str | Path):
            raise ModelLoadError(f"pass a directory or a hub id, got {type(name_or_path).__name__}.")
        cls._check_hub(hub)
        place = resolve(name_or_path, **hub, marker=None)
        adapter: AdapterFile | None = None
        if (place / CONFIG_FILE).is_file():
            adapter = read_adapter(place)
            base = base_model or adapter.base_model
            if not base:
                raise ModelLoadError(f"{place / CONFIG_FILE} does not name its base model: pass base_model=.")
            own = {k: v for k, v in hub.items() if k != "revision"}
            if base_model is None and adapter.base_revision is not None:
                own["revision"] = adapter.base_revision
            source = cls._open_base(base, base_model is not None, place, trust_remote_code, own)
        elif base_model is not None:
            raise ModelLoadError(f"{place} has no {CONFIG_FILE}: base_model= goes with an adapter's directory.")
        else:
            source = cls._open(name_or_path, trust_remote_code, hub)
        model = cls(
            source,
            max_rank=max_rank,
            target_modules=target_modules,
            continuous_batching=continuous_batching,
            cache_home_dir=cache_home_dir,
        )
        if adapter is not None:
            model._adapters[adapter_name] = adapter
            model._active = adapter_name
        return model

    @classmethod
    def _open_base(
        cls, base: str | Path, given: bool, adapter: Path, trust_remote_code: bool, hub: dict[str, Any]
    ) -> ModelSource:
        try:
            return cls._open(base, trust_remote_code, hub)
        except ModelLoadError as error:
            if given:
                raise
            raise ModelLoadError(
                f"the base model that {adapter / CONFIG_FILE} names cannot be opened, pass base_model= with its place: "
                f"{error}"
            ) from None

    def _take(self, peft_model: PeftModel) -> None:
        """Every adapter of a model in memory, through the files PEFT would write."""
        from QEfficient.models.peft_memory import active_adapter, save_adapters

        saved = Path(tempfile.mkdtemp(prefix="qefficient-adapters-"))
        weakref.finalize(self, remove_tree, saved)
        for name, directory in save_adapters(peft_model, saved).items():
            self._adapters[name] = read_adapter(directory)
        self._active = active_adapter(peft_model)

    # ------------------------------------------------------------------ adapters

    def load_adapter(self, directory: str | Path, adapter_name: str, **hub: Any) -> None:
        """Loads an adapter from a directory or hub id under a name; see `Adaptable.load_adapter`.

        Before `compile` it adds to what the package will be able to hold; afterwards it must fit that.
        """
        check_name(adapter_name)
        self._check_hub(hub)
        adapter = read_adapter(resolve(directory, **hub, marker=CONFIG_FILE))
        if self._package is not None:
            adapter.check(Manifest.load(self._package).parameters)
        if self._loaded is not None:
            self._bank.load_adapter(adapter.directory, adapter_name)
        elif not (isinstance(self._source, MemorySource) and self.model_name == type(self._source.model).__name__):
            warn_of_another_base(adapter, self.model_name)
        self._adapters[adapter_name] = adapter

    def set_adapter(self, adapter_name: str | None) -> None:
        if adapter_name is not None and adapter_name not in self._adapters:
            raise unknown(adapter_name, self.adapters)
        if self._loaded is not None:
            self._bank.set_adapter(adapter_name)
        self._active = adapter_name

    def unload_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self._adapters:
            raise unknown(adapter_name, self.adapters)
        if self._loaded is not None:
            self._bank.unload_adapter(adapter_name)
        del self._adapters[adapter_name]
        if self._active == adapter_name:
            self._active = None

    @property
    def active_adapter(self) -> str | None:
        return self._active

    @property
    def adapters(self) -> list[str]:
        return list(self._adapters)

    @property
    def _bank(self) -> Any:
        return self._loaded

    def _geometry(self) -> LoraGeometry:
        """What the next export can hold."""
        from QEfficient.exporter.lora import LoraGeometry

        rank = max((adapter.rank for adapter in self._adapters.values()), default=0)
        if not self._adapters and (self.max_rank is None or not self.target_modules):
            raise OptionError("no adapter is loaded: call load_adapter() first, or pass max_rank and target_modules.")
        if self.max_rank is not None and self.max_rank < rank:
            largest = max(self._adapters, key=lambda name: self._adapters[name].rank)
            raise OptionError(
                f"max_rank={self.max_rank} is less than the rank {rank} of the adapter {largest!r}: raise it, or "
                "unload the adapter."
            )
        modules = sorted({module for adapter in self._adapters.values() for module in adapter.modules})
        return LoraGeometry(self.max_rank or rank, tuple(modules), self.target_modules)

    # ------------------------------------------------------------------ export and compile

    def _variant(self, options: CompileOptions | None) -> dict[str, Any]:
        lora = {**self._geometry().to_json(), "peft": importlib.metadata.version("peft")}
        return {**super()._variant(options), "lora": lora}

    def _write_graph(self, ghost: PreTrainedModel, weights: Any, directory: Path, variant: dict[str, Any]) -> Interface:
        from QEfficient.exporter.lora import inject_lora, lora_specs
        from QEfficient.exporter.program import export_causal

        inject_lora(ghost, self._geometry())
        for adapter in self._adapters.values():
            adapter.check(lora_specs(ghost))  # before the trace, which is the expensive part
        return export_causal(ghost, weights, directory, batch_index=variant["batch_index"], lora=True)

    def _facts(self) -> dict[str, Any]:
        return {**super()._facts(), "lora": {"max_rank": self._geometry().rank, "adapters": [], "active": None}}

    def compile(
        self,
        onnx_path: str | Path | None = None,
        compile_dir: str | Path | None = None,
        *,
        max_rank: int | None = None,
        target_modules: str | Sequence[str] | None = None,
        transforms: Sequence[TransformLike] = (),
        progress: bool | None = None,
        **options: Any,
    ) -> Path:
        """Compiles for every adapter that fits; the package carries those loaded now, the active one active.

        Args:
            max_rank, target_modules: as for `from_pretrained`; they replace what was given there.
            onnx_path, compile_dir, transforms, progress, **options: as for `QEFFTransformersBase.compile`.

        Raises:
            InputError: an adapter does not fit the base model.
            OptionError: no adapter is loaded and nothing says what to compile for, or ``max_rank`` is too small; and
                as `QEFFTransformersBase.compile`.
        """
        before = self.max_rank, self.target_modules
        if max_rank is not None:
            self.max_rank = _rank(max_rank)
        if target_modules is not None:
            self.target_modules = _targets(target_modules)
        try:
            return super().compile(onnx_path, compile_dir, transforms=transforms, progress=progress, **options)
        except BaseException:
            # What was refused here should not decide about the next compile.
            self.max_rank, self.target_modules = before
            raise

    def _complete(self, package: Path) -> Path:
        complete = with_adapters(self.store, package, self._adapters, self._active)
        self._plain_package = package
        return complete

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Copies the compiled package, with the adapters loaded now, to a directory of its own."""
        check_destination(Path(save_directory))
        self._compiled()
        if self._plain_package is not None and self._plain_package.is_dir():
            self._package = self._complete(self._plain_package)
        return super().save_pretrained(save_directory)

    # ------------------------------------------------------------------ run

    def _ready(self) -> LoadedPackage:
        fresh = self._loaded is None
        package: Any = super()._ready()
        if fresh:  # it came with the adapters of compile time; these may have changed since
            for name in package.adapters:
                package.unload_adapter(name)
            for name, adapter in self._adapters.items():
                package._bank.load(adapter.directory, name)  # load_adapter() has warned, if there was need
            package.set_adapter(self._active)
        return package

    def generate(
        self, input_ids: Any = None, attention_mask: Any = None, *, adapter_name: str | None = None, **arguments: Any
    ) -> Any:
        """As `QEFFAutoModelForCausalLM.generate`; ``adapter_name`` is the adapter of this call, None the active one."""
        if adapter_name is not None and adapter_name not in self._adapters:
            raise unknown(adapter_name, self.adapters)
        return self._ready().generate(input_ids, attention_mask, adapter_name=adapter_name, **arguments)

    # ------------------------------------------------------------------ reference

    @property
    def model(self) -> Any:
        """A PEFT model with the adapters loaded now and the active one active; the base model when there are none."""
        from QEfficient.models.peft_memory import reference

        state = (tuple((name, id(adapter)) for name, adapter in self._adapters.items()), self._active)
        if self._reference is None or self._reference[0] != state:
            base = self._source.load(self.factory)
            directories = {name: adapter.directory for name, adapter in self._adapters.items()}
            self._reference = (state, reference(base, directories, self._active))
        return self._reference[1]

    def transformed(self) -> TransformedModel:
        from QEfficient.exporter.twins import ghost_from_model, meta_twin
        from QEfficient.transforms.pytorch.eager import TransformedModel
        from QEfficient.transforms.pytorch.state import probe

        # The decoder itself, with LoRA layers inside, and not PEFT's wrapper around it.
        inner = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        return TransformedModel.causal(inner, probe(meta_twin(ghost_from_model(inner))))


def require_peft() -> None:
    """TargetUnavailableError with the command to run when peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise TargetUnavailableError(
            "adapters need peft to be exported: pip install 'qefficient[finetune]' (a finished package runs without)."
        )


def _rank(value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise OptionError(f"max_rank must be an integer of at least 1, got {value!r}.")
    return value


def _targets(value: str | Sequence[str] | None) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(name, str) and name for name in names):
        raise OptionError(f"target_modules must be module names such as 'q_proj', or 'all-linear', got {value!r}.")
    return tuple(sorted(set(names)))

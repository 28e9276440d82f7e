"""Module functions: `QEfficient.transform`, `QEfficient.export`, `QEfficient.compile`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from QEfficient.errors import UnsupportedModelError
from QEfficient.models.auto import (
    QEFFAutoModel,
    QEFFAutoModelForCausalLM,
    QEFFAutoModelForSequenceClassification,
)
from QEfficient.models.base import QEFFTransformersBase, check_destination, copy_entry, given_export, resolve_queue
from QEfficient.models.packaging import compile_export
from QEfficient.progress import bar
from QEfficient.store.home import cache_home
from QEfficient.store.store import ArtifactStore
from QEfficient.targets.options import CompileOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from QEfficient.transforms.onnx.queue import TransformLike
    from QEfficient.transforms.pytorch.eager import TransformedModel
    from QEfficient.transforms.pytorch.pooling import Pool

_CLASSES: dict[str, type[QEFFTransformersBase]] = {
    "text-generation": QEFFAutoModelForCausalLM,
    "feature-extraction": QEFFAutoModel,
    "text-classification": QEFFAutoModelForSequenceClassification,
}


def task_of(architecture: str | None) -> str:
    """The task an architecture name stands for: ``LlamaForCausalLM`` -> text-generation, ``BertModel`` ->
    feature-extraction."""
    name = architecture or ""
    if "SequenceClassification" in name:
        return "text-classification"
    if "CausalLM" in name or "LMHead" in name:
        return "text-generation"
    return "feature-extraction"


def class_for(task: str) -> type[QEFFTransformersBase]:
    """The model class of a task; UnsupportedModelError for an unknown one."""
    if task not in _CLASSES:
        raise UnsupportedModelError(f"there is no task {task!r}: use one of {sorted(_CLASSES)}.")
    return _CLASSES[task]


def wrap(
    model: PreTrainedModel | QEFFTransformersBase | str | Path,
    *,
    task: str | None = None,
    pooling: str | Pool | None = None,
    continuous_batching: bool = False,
    trust_remote_code: bool = False,
    cache_home_dir: str | Path | None = None,
) -> QEFFTransformersBase:
    """One of our model objects from whatever names a model: an HF model, a directory, a hub id, or one of ours.

    Args:
        task: chosen from the architecture's name when not given.

    Raises:
        ModelLoadError, UnsupportedModelError: as `from_pretrained`.
    """
    if isinstance(model, QEFFTransformersBase):
        return model
    own: dict[str, Any] = {"cache_home_dir": cache_home_dir}
    if isinstance(model, str | Path):
        own["trust_remote_code"] = trust_remote_code
        if task is None:
            from QEfficient.models.hub import resolve
            from QEfficient.models.source import CheckpointSource

            directory = resolve(model)
            task = task_of(CheckpointSource(directory, str(model), trust_remote_code).architecture)
    task = task or task_of(type(model).__name__)
    if task == "feature-extraction":
        own["pooling"] = pooling
    if task == "text-generation":
        own["continuous_batching"] = continuous_batching
    cls = class_for(task)
    return cls.from_pretrained(model, **own) if isinstance(model, str | Path) else cls(model, **own)


def transform(model: PreTrainedModel | QEFFTransformersBase) -> TransformedModel:
    """The model as it is exported, still in torch: our cache, mask, attention and scans in place.

    The result shares its weights with ``model``, which stays as it was. Calling it takes what the exported graph
    takes (see `QEfficient.transforms.pytorch.wrappers`).
    """
    return wrap(model).transformed()


def export(
    model: PreTrainedModel | QEFFTransformersBase | str | Path,
    export_dir: str | Path | None = None,
    *,
    task: str | None = None,
    pooling: str | Pool | None = None,
    continuous_batching: bool = False,
    trust_remote_code: bool = False,
    cache_home_dir: str | Path | None = None,
) -> Path:
    """Exports a model (object, directory or hub id) to ONNX and returns the path of ``model.onnx``."""
    wrapped = wrap(
        model,
        task=task,
        pooling=pooling,
        continuous_batching=continuous_batching,
        trust_remote_code=trust_remote_code,
        cache_home_dir=cache_home_dir,
    )
    return wrapped.export(export_dir)


def compile(
    onnx_path: str | Path,
    compile_dir: str | Path | None = None,
    *,
    transforms: Sequence[TransformLike] = (),
    cache_home_dir: str | Path | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Path:
    """Compiles a graph that `export` wrote; needs neither the model nor torch.

    Args:
        onnx_path: the ``model.onnx`` that `export` returned.
        compile_dir: also place a copy of the package there.
        transforms, **options: as for `QEFFTransformersBase.compile`.

    Returns:
        The package directory.
    """
    asked = CompileOptions.from_kwargs(**options)
    queue = resolve_queue(transforms)
    key, directory = given_export(Path(onnx_path))
    if compile_dir is not None:
        check_destination(Path(compile_dir))
    store = ArtifactStore(cache_home(Path(cache_home_dir) if cache_home_dir is not None else None))
    with bar(f"compiling {Path(onnx_path).parent.name}", progress) as report:
        package = compile_export(store, directory, key, asked, queue, report)
    return copy_entry(package, Path(compile_dir)) if compile_dir is not None else package

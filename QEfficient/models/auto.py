"""One short class per task: what a user names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from QEfficient.errors import OptionError, UnsupportedModelError
from QEfficient.exporter.interface import Interface
from QEfficient.models import keys
from QEfficient.models.base import QEFFTransformersBase
from QEfficient.models.source import CheckpointSource, ModelSource
from QEfficient.targets.options import CompileOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from QEfficient.transforms.pytorch.eager import TransformedModel
    from QEfficient.transforms.pytorch.pooling import Pool


class QEFFAutoModelForCausalLM(QEFFTransformersBase):
    """A causal language model.

    Example:
        >>> model = QEFFAutoModelForCausalLM.from_pretrained("path/or/hub-id")
        >>> model.compile(ctx_len=512)
        >>> print(model.generate(prompts=["Question: "], generation_len=64).texts[0])
    """

    task = "text-generation"
    factory = "AutoModelForCausalLM"

    def __init__(
        self,
        model: PreTrainedModel | ModelSource,
        *,
        continuous_batching: bool = False,
        cache_home_dir: str | Path | None = None,
    ) -> None:
        super().__init__(model, cache_home_dir=cache_home_dir)
        self._check_memory_model(model)
        self.continuous_batching = continuous_batching

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        continuous_batching: bool = False,
        trust_remote_code: bool = False,
        cache_home_dir: str | Path | None = None,
        **hub: Any,
    ) -> Self:
        """Names a checkpoint; nothing is loaded yet.

        Args:
            name_or_path: a directory with ``config.json`` and safetensors weights, or a hub id.
            continuous_batching: export with ``batch_index``; ``compile(full_batch_size=…)`` implies it.
            trust_remote_code: allow the checkpoint's own Python code to run.
            cache_home_dir: cache root, instead of ``QEFF_HOME`` or the user cache directory.
            **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            ModelLoadError: nothing there, unreadable, pickled weights only, or the hub cannot be reached.
            UnsupportedModelError: the checkpoint is not a causal language model.
        """
        source = cls._open(name_or_path, trust_remote_code, hub)
        return cls(source, continuous_batching=continuous_batching, cache_home_dir=cache_home_dir)

    @classmethod
    def _check_architecture(cls, source: CheckpointSource) -> None:
        architecture = source.architecture
        if source.raw_config().get("is_encoder_decoder"):
            raise UnsupportedModelError(
                f"{source.name} is an encoder-decoder ({architecture}): this class takes decoder-only models."
            )
        if architecture is None or any(part in architecture for part in ("CausalLM", "LMHead")):
            return
        # Only an unusual name is worth the seconds that asking transformers costs.
        from transformers import AutoConfig

        from QEfficient.models.factories import auto_class, translate_load_errors

        with translate_load_errors(source.name):
            config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
        auto_class(cls.factory, config, source.name)

    def _check_memory_model(self, model: Any) -> None:
        if isinstance(model, ModelSource):
            return
        if getattr(model.config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} is not a decoder with a language-model head: for embeddings use QEFFAutoModel."
            )

    def _variant(self, options: CompileOptions | None) -> dict[str, Any]:
        indexed = self.continuous_batching or (options is not None and options.full_batch_size is not None)
        return {"batch_index": indexed}

    def _write_graph(self, ghost: PreTrainedModel, weights: Any, directory: Path, variant: dict[str, Any]) -> Interface:
        from QEfficient.exporter.program import export_causal

        return export_causal(ghost, weights, directory, batch_index=variant["batch_index"])

    def transformed(self) -> TransformedModel:
        from QEfficient.exporter.twins import ghost_from_model, meta_twin
        from QEfficient.transforms.pytorch.eager import TransformedModel
        from QEfficient.transforms.pytorch.state import probe

        return TransformedModel.causal(self.model, probe(meta_twin(ghost_from_model(self.model))))

    def generate(self, input_ids: Any = None, attention_mask: Any = None, **arguments: Any) -> Any:
        """Generates text; see `QEfficient.engine.text.CompiledCausalLM.generate` for both forms and all arguments.

        ``generate(tokenizer=tok, prompts=[…], generation_len=…)`` returns a result with texts, ids and metrics;
        ``generate(input_ids=…, attention_mask=…, max_new_tokens=…)`` returns ids like Hugging Face.
        """
        return self._ready().generate(input_ids, attention_mask, **arguments)


class _Encoder(QEFFTransformersBase):
    """What embedding and classification models share."""

    @classmethod
    def _check_architecture(cls, source: CheckpointSource) -> None:
        if source.raw_config().get("is_encoder_decoder"):
            raise UnsupportedModelError(
                f"{source.name} is an encoder-decoder ({source.architecture}), which this version cannot run: use an "
                "encoder or a decoder-only model."
            )

    def generate(self, inputs: Any = None, **arrays: Any) -> dict[str, Any]:
        """Runs tokenizer output; see `QEfficient.engine.encoder.CompiledEncoder.generate`."""
        return self._ready().generate(inputs, **arrays)


class QEFFAutoModel(_Encoder):
    """A text encoder (or a decoder used as one) that gives embeddings.

    Example:
        >>> model = QEFFAutoModel.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", pooling="mean")
        >>> vectors = model.generate(tokenizer(["a sentence"], return_tensors="np"))["output"]
    """

    task = "feature-extraction"
    factory = "AutoModel"

    def __init__(
        self,
        model: PreTrainedModel | ModelSource,
        *,
        pooling: str | Pool | None = None,
        cache_home_dir: str | Path | None = None,
    ) -> None:
        super().__init__(model, cache_home_dir=cache_home_dir)
        self.pooling = pooling
        self._pooling_identity = _pooling_identity(pooling)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        pooling: str | Pool | None = None,
        trust_remote_code: bool = False,
        cache_home_dir: str | Path | None = None,
        **hub: Any,
    ) -> Self:
        """Names a checkpoint; nothing is loaded yet.

        Args:
            name_or_path: a directory with ``config.json`` and safetensors weights, or a hub id.
            pooling: "mean", "cls", "max", "last", a plain function ``f(last_hidden_state [batch, seq, hidden],
                attention_mask [batch, seq]) -> [batch, …]`` of torch operations, or None for all token vectors.
            trust_remote_code, cache_home_dir, **hub: as for `QEFFAutoModelForCausalLM.from_pretrained`.

        Raises:
            OptionError: an unknown pooling. ModelLoadError, UnsupportedModelError: as their names say.
        """
        _pooling_identity(pooling)
        source = cls._open(name_or_path, trust_remote_code, hub)
        return cls(source, pooling=pooling, cache_home_dir=cache_home_dir)

    def transformed(self) -> TransformedModel:
        from QEfficient.transforms.pytorch.eager import TransformedModel
        from QEfficient.transforms.pytorch.pooling import resolve

        return TransformedModel.encoder(self.model, resolve(self.pooling), "last_hidden_state")

    def _variant(self, options: CompileOptions | None) -> dict[str, Any]:
        return {"pooling": self._pooling_identity}

    def _facts(self) -> dict[str, Any]:
        return {"pooling": self._pooling_identity}

    def _write_graph(self, ghost: PreTrainedModel, weights: Any, directory: Path, variant: dict[str, Any]) -> Interface:
        from QEfficient.exporter.program import export_encoder
        from QEfficient.transforms.pytorch.pooling import resolve

        return export_encoder(ghost, weights, directory, task=self.task, pool=resolve(self.pooling))


class QEFFAutoModelForSequenceClassification(_Encoder):
    """A sequence classifier; `generate` returns ``{"logits": [batch, labels]}``."""

    task = "text-classification"
    factory = "AutoModelForSequenceClassification"

    def __init__(self, model: PreTrainedModel | ModelSource, *, cache_home_dir: str | Path | None = None) -> None:
        super().__init__(model, cache_home_dir=cache_home_dir)
        if isinstance(model, ModelSource):
            return
        if getattr(model, "base_model", None) is model or model.get_output_embeddings() is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no classification head: fine-tune one first, or use QEFFAutoModel for "
                "embeddings."
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        trust_remote_code: bool = False,
        cache_home_dir: str | Path | None = None,
        **hub: Any,
    ) -> Self:
        """Names a checkpoint; arguments and errors as for `QEFFAutoModelForCausalLM.from_pretrained`."""
        return cls(cls._open(name_or_path, trust_remote_code, hub), cache_home_dir=cache_home_dir)

    @classmethod
    def _check_architecture(cls, source: CheckpointSource) -> None:
        super()._check_architecture(source)
        architecture = source.architecture
        if architecture is not None and "SequenceClassification" not in architecture:
            raise UnsupportedModelError(
                f"{source.name} holds {architecture}, which has no classification head: fine-tune one first, or use "
                "QEFFAutoModel for embeddings."
            )

    def transformed(self) -> TransformedModel:
        from QEfficient.transforms.pytorch.eager import TransformedModel

        return TransformedModel.encoder(self.model, None, "logits")

    def _variant(self, options: CompileOptions | None) -> dict[str, Any]:
        return {}

    def _write_graph(self, ghost: PreTrainedModel, weights: Any, directory: Path, variant: dict[str, Any]) -> Interface:
        from QEfficient.exporter.program import export_encoder

        return export_encoder(ghost, weights, directory, task=self.task, pool=None)


def _pooling_identity(pooling: object) -> str | None:
    """What the cache key says about a pooling; OptionError for an unknown name."""
    from QEfficient.suggest import did_you_mean

    names = ("mean", "cls", "max", "last")
    if pooling is None or pooling in names:
        return pooling
    if callable(pooling):
        return keys.callable_identity(pooling)
    raise OptionError(
        f"pooling={pooling!r} is not known: use one of {list(names)}, a function, or None."
        f"{did_you_mean(str(pooling), names)}"
    )

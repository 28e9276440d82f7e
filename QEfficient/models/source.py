"""Where a model comes from: a checkpoint on disk (known without loading it) or an HF model in memory."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from QEfficient.errors import ModelLoadError
from QEfficient.safetensors_io import WeightMap, checkpoint_files, checkpoint_weights
from QEfficient.store.digest import DigestMemo, json_digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Configuration entries that say who wrote the file, not what the model computes.
VOLATILE = {
    "transformers_version",
    "_name_or_path",
    "_commit_hash",
    "torch_dtype",
    "dtype",
    "attn_implementation",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class ModelSource(ABC):
    """What the rest of the library asks of a model before, and often instead of, loading it."""

    name: str

    @abstractmethod
    def identity(self, memo: DigestMemo) -> dict[str, Any]:
        """Content that decides what an export of this source computes: configuration, code and weight digests."""

    @abstractmethod
    def weight_digests(self, memo: DigestMemo) -> dict[str, str]:
        """BLAKE3 digest of every weight file, by file name; empty for a model in memory."""

    @abstractmethod
    def raw_config(self) -> dict[str, Any]:
        """config.json as a dict; values equal to a class's defaults may be absent."""

    @abstractmethod
    def generation_config(self) -> dict[str, Any]:
        """Generation defaults in HF names."""

    @abstractmethod
    def ghost(self, factory: str) -> PreTrainedModel:
        """A weightless model that may be changed; ``factory`` names an Auto class of transformers."""

    @abstractmethod
    def weights(self, ghost: PreTrainedModel, workspace: Path) -> WeightMap:
        """The weights under the names ``ghost`` uses; may write converted ones into ``workspace``."""

    @abstractmethod
    def load(self, factory: str) -> PreTrainedModel:
        """The real model, float32, evaluation mode."""

    def tokenizer_files(self) -> list[Path]:
        """Tokenizer files to put into a package."""
        return []

    @property
    def architecture(self) -> str | None:
        names = self.raw_config().get("architectures") or []
        return names[0] if names else None


class CheckpointSource(ModelSource):
    """A checkpoint directory. Nothing is loaded until asked for."""

    #: Whether `config` says something else than the directory's own: it then belongs beside what is trained.
    changes_config = False

    def __init__(self, directory: Path, name: str, trust_remote_code: bool = False) -> None:
        self.directory, self.name, self.trust_remote_code = directory, name, trust_remote_code
        self._config = _read_json(directory / "config.json")
        quantization = self._config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise ModelLoadError(
                f"{name} is quantized ({method or 'unknown method'}), which this version cannot export: use "
                "the 16- or 32-bit checkpoint."
            )
        if "auto_map" in self._config and not trust_remote_code and not self._config.get("model_type"):
            raise ModelLoadError(f"{name} needs its own Python code: pass trust_remote_code=True if you trust it.")
        # Only headers: a file that is cut off should not cost the time to hash it first.
        checkpoint_weights(directory)

    def raw_config(self) -> dict[str, Any]:
        return self._config

    def weight_digests(self, memo: DigestMemo) -> dict[str, str]:
        return {path.name: memo.digest(path) for path in checkpoint_files(self.directory)}

    def identity(self, memo: DigestMemo) -> dict[str, Any]:
        code = {}
        if self.trust_remote_code:
            code = {p.name: blake3(p.read_bytes()).hexdigest() for p in sorted(self.directory.glob("*.py"))}
        return {
            "kind": "checkpoint",
            "config": {k: v for k, v in self._config.items() if k not in VOLATILE},
            "weights": self.weight_digests(memo),
            "code": code,
        }

    def generation_config(self) -> dict[str, Any]:
        path = self.directory / "generation_config.json"
        if path.is_file():
            return _read_json(path)
        text = self._config.get("text_config") or {}
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        return {k: self._config.get(k, text.get(k)) for k in keys if self._config.get(k, text.get(k)) is not None}

    def tokenizer_files(self) -> list[Path]:
        return [self.directory / name for name in TOKENIZER_FILES if (self.directory / name).is_file()]

    def config(self) -> PreTrainedConfig:
        """The configuration as transformers reads it, a new object at every call; a subclass may adjust it."""
        from transformers import AutoConfig

        config: PreTrainedConfig = AutoConfig.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
        return config

    def loading_options(self) -> dict[str, Any]:
        """What else ``from_pretrained`` is told."""
        return {}

    def ghost(self, factory: str) -> PreTrainedModel:
        from QEfficient.exporter.twins import ghost_from_config
        from QEfficient.models.factories import auto_class, translate_load_errors

        with translate_load_errors(self.name):
            config = self.config()
            return ghost_from_config(auto_class(factory, config, self.name), config, self.trust_remote_code)

    def weights(self, ghost: PreTrainedModel, workspace: Path) -> WeightMap:
        from QEfficient.exporter.conversion import module_weights

        return module_weights(ghost, checkpoint_weights(self.directory), workspace)

    def load(self, factory: str) -> PreTrainedModel:
        import torch

        from QEfficient.exporter.quiet import quiet
        from QEfficient.models.factories import auto_class, no_loading_bars, translate_load_errors

        with quiet(), no_loading_bars(), translate_load_errors(self.name):
            config = self.config()
            model = auto_class(factory, config, self.name).from_pretrained(
                self.directory,
                config=config,
                dtype=torch.float32,
                trust_remote_code=self.trust_remote_code,
                **self.loading_options(),
            )
        return model.eval()


class MemorySource(ModelSource):
    """An HF model object. Its weights are read when exporting and must not change while that runs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.name = getattr(model, "name_or_path", "") or type(model).__name__

    def raw_config(self) -> dict[str, Any]:
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        config["architectures"] = [type(self.model).__name__]
        return dict(config)

    def weight_digests(self, memo: DigestMemo) -> dict[str, str]:
        return {}

    def identity(self, memo: DigestMemo) -> dict[str, Any]:
        import torch

        digests = {}
        for name, tensor in self.model.state_dict().items():
            data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            hasher = blake3(max_threads=blake3.AUTO)
            hasher.update(memoryview(data.numpy()))
            digests[name] = [str(tensor.dtype), list(tensor.shape), hasher.hexdigest()]
        return {
            "kind": "memory",
            "class": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            "config": {k: v for k, v in self.raw_config().items() if k not in VOLATILE},
            "weights": json_digest(digests),
        }

    def generation_config(self) -> dict[str, Any]:
        config = getattr(self.model, "generation_config", None)
        if config is None:
            return {}
        return dict(json.loads(json.dumps(config.to_diff_dict())))

    def ghost(self, factory: str) -> PreTrainedModel:
        from QEfficient.exporter.twins import ghost_from_model

        return ghost_from_model(self.model)

    def weights(self, ghost: PreTrainedModel, workspace: Path) -> WeightMap:
        from QEfficient.exporter.conversion import save_module_weights

        return save_module_weights(self.model, workspace / "weights.safetensors")

    def load(self, factory: str) -> PreTrainedModel:
        return self.model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise ModelLoadError(f"{path} is not valid JSON: download or save the checkpoint again.") from None
    if not isinstance(body, dict):
        raise ModelLoadError(f"{path} does not hold a JSON object: download or save the checkpoint again.")
    return body

"""Adapters that a compiled package has no inputs for: merged into their base model once, in the cache."""

from __future__ import annotations

from pathlib import Path

from QEfficient.engine.adapter_file import FILES, read_adapter
from QEfficient.errors import UnsupportedModelError
from QEfficient.finetune.merge import merge_adapter
from QEfficient.models.keys import library_versions
from QEfficient.models.source import TOKENIZER_FILES, CheckpointSource
from QEfficient.progress import bar
from QEfficient.store.digest import json_digest
from QEfficient.store.store import ArtifactStore

KIND = "merged"


def is_swappable(adapter: Path) -> bool:
    """Whether a compiled package can take an adapter as inputs: plain LoRA on linear layers can be."""
    try:
        read_adapter(adapter)
    except UnsupportedModelError:
        return False
    return True


def merged_checkpoint(adapter: Path, source: CheckpointSource, store: ArtifactStore) -> Path:
    """The checkpoint that base model and adapter make, from the cache or merged now.

    Raises:
        TrainingError, ModelLoadError: as `merge_adapter`.
    """
    files = [adapter / name for name in (*FILES, *TOKENIZER_FILES) if (adapter / name).is_file()]
    key = json_digest(
        {
            "base": source.identity(store.memo),
            "adapter": {path.name: store.memo.digest(path) for path in files},
            "libraries": library_versions(("peft", "transformers")),
        }
    )

    def build(directory: Path) -> None:
        with bar(f"merging {adapter}") as report:
            merge_adapter(
                adapter,
                directory / "model",
                source.directory,
                trust_remote_code=source.trust_remote_code,
                report=report,
            )

    return store.build(KIND, key, build, f"{source.name} (merged with {adapter.name})") / "model"

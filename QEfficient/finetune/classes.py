"""The classes of a sequence classifier: from the labels of the data into the model's configuration and head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from QEfficient.models.source import CheckpointSource
from QEfficient.store.digest import DigestMemo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Classes:
    """What a classifier tells apart.

    Attributes:
        names: by class id.
        new_head: the checkpoint's head, if it has one, is for other classes.
    """

    names: tuple[str, ...]
    new_head: bool


def choose_classes(config: PreTrainedConfig, label_names: Mapping[str, int]) -> Classes:
    """The classes to train: those of a checkpoint that already classifies so, else those of the data.

    Labels that are numbers fit any checkpoint with as many classes; names must have the same ids there.

    Args:
        config: the checkpoint's.
        label_names: name -> id, as `QEffDataManager.label_names`.
    """
    names = tuple(sorted(label_names, key=lambda name: label_names[name]))
    architectures = getattr(config, "architectures", None) or []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        known = tuple(name for _, name in sorted((config.id2label or {}).items()))
        numbers = names == tuple(map(str, range(len(names))))
        if len(names) <= len(known) and (numbers or names == known[: len(names)]):
            return Classes(known, new_head=False)
    return Classes(names, new_head=True)


def reward_output(config: PreTrainedConfig) -> Classes:
    """The one output of a reward model: the checkpoint's own where it has one output, else a new one."""
    own = any(name.endswith("ForSequenceClassification") for name in getattr(config, "architectures", None) or [])
    names = tuple((config.id2label or {}).values())
    return Classes(names, new_head=False) if own and len(names) == 1 else Classes(("score",), new_head=True)


class ClassifierSource(CheckpointSource):
    """A checkpoint seen as a classifier of given classes.

    Args:
        checkpoint: as it is on disk.
        classes: what its head tells apart.
        pad_token_id: for a model without one; the head of a decoder finds a row's last token by it.
    """

    changes_config = True

    def __init__(self, checkpoint: CheckpointSource, classes: Classes, pad_token_id: int) -> None:
        super().__init__(checkpoint.directory, checkpoint.name, checkpoint.trust_remote_code)
        self.checkpoint, self.classes, self.pad_token_id = checkpoint, classes, pad_token_id

    def config(self) -> PreTrainedConfig:
        config = super().config()
        config.id2label = dict(enumerate(self.classes.names))
        config.label2id = {name: i for i, name in enumerate(self.classes.names)}
        one = len(self.classes.names) == 1
        config.problem_type = "regression" if one else "single_label_classification"
        for part in (config, config.get_text_config()):
            if getattr(part, "pad_token_id", None) is None:
                part.pad_token_id = self.pad_token_id
        return config

    def loading_options(self) -> dict[str, Any]:
        return {"ignore_mismatched_sizes": True}  # a head for other classes gives way

    def identity(self, memo: DigestMemo) -> dict[str, Any]:
        own = {"names": list(self.classes.names), "new_head": self.classes.new_head, "pad": self.pad_token_id}
        return {**super().identity(memo), "classes": own}

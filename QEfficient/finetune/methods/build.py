"""From a configuration to its method, and to the rows that method needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.methods.base import Method
from QEfficient.finetune.methods.cross_entropy import ClassCrossEntropy, TokenCrossEntropy
from QEfficient.finetune.methods.distill import Distill
from QEfficient.finetune.methods.kto import Kto
from QEfficient.finetune.methods.pairs import Dpo, Orpo
from QEfficient.finetune.methods.reference import with_reference
from QEfficient.finetune.methods.reward import Reward
from QEfficient.finetune.methods.teacher import Teacher
from QEfficient.progress import Progress
from QEfficient.store.digest import json_digest
from QEfficient.store.home import cache_home
from QEfficient.store.store import ArtifactStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from QEfficient.finetune.compiled_step import CompiledStep
    from QEfficient.finetune.data.loader import Rows
    from QEfficient.finetune.model_manager import QEffModelManager


def method_of(config: QEffConfig) -> Method:
    """The method a configuration asks for."""
    if config.method == "dpo":
        return Dpo(config.beta, config.reference_free)
    if config.method == "orpo":
        return Orpo(config.beta)
    if config.method == "kto":
        return Kto(config.beta, config.desirable_weight, config.undesirable_weight)
    if config.method == "reward":
        return Reward()
    if config.learns_probabilities:
        return Distill(config.distillation_weight)
    return ClassCrossEntropy() if config.task == "seq_classification" else TokenCrossEntropy()


def teacher_of(config: QEffConfig, home: Path | None) -> Teacher:
    """The teacher that ``teacher_model`` names."""
    assert config.teacher_model is not None
    return Teacher(config.teacher_model, ArtifactStore(cache_home(home)), trust_remote_code=config.trust_remote_code)


def check_teacher(config: QEffConfig, tokenizer: PreTrainedTokenizerBase, home: Path | None) -> None:
    """Refuses a teacher whose probabilities cannot be learned; before anything is compiled.

    Raises:
        ModelLoadError: there is no such model. OptionError: it numbers its tokens in another way, or has too few.
    """
    if config.learns_probabilities:
        teacher = teacher_of(config, home)
        teacher.require_vocabulary(tokenizer)
        teacher.require_tokens(config.teacher_top)


def completed(
    rows: Rows,
    split: str,
    manager: QEffModelManager,
    step: CompiledStep,
    data: str,
    pad_token_id: int,
    report: Progress,
) -> Rows:
    """The rows with what the method needs besides tokens: log-probabilities of a reference, or a teacher's.

    Args:
        split: "train" or "eval".
        data: identifies the prepared data.
    """
    config, args = manager.config, manager.args
    if config.learns_probabilities:
        teacher = teacher_of(config, manager.home)
        return teacher.taught(rows, f"{data}/{split}", config.teacher_top, report)
    if not config.needs_reference:
        return rows
    identity: dict[str, Any] = {
        "data": data,
        "split": split,
        "kind": config.kind_of_rows,
        "model": json_digest(manager.init_model().identity),
        "base_weights": args.base_weights,
    }
    sizes = {"batch_size": args.per_device_train_batch_size, "pad_token_id": pad_token_id}
    return with_reference(rows, step, manager.store, identity, progress=report, **sizes)

"""``QEffTrainingArgs``: how to run. Hugging Face's training arguments plus what a compiled step needs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from QEfficient.errors import OptionError
from QEfficient.finetune.keywords import boolean, canonical, choice, fill, integer, is_number, mapping, short, text
from QEfficient.finetune.settings_file import read_settings, write_settings
from QEfficient.suggest import did_you_mean
from QEfficient.targets.registry import ALIASES as TARGET_ALIASES
from QEfficient.targets.registry import TARGETS

BASE_WEIGHTS = ("fp32", "int8", "int4")
SAMPLING = ("random", "sequential", "group_by_length")
HF_NAMES = tuple(f.name for f in dataclasses.fields(TrainingArguments) if f.init)

#: Spelling of a document, an older transformers or another tool -> name in transformers 5.
ALIASES = {
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "val_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "recompute": "activation_checkpointing",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "sampling_strategy": "train_sampling_strategy",
    "max_length": "max_ctx_len",
    "max_seq_length": "max_ctx_len",
    "validate_first_step": "validate",
}

_RENAMED = ("warmup_ratio", "group_by_length")

_NOT_IN_A_COMPILED_STEP = "it changes a torch forward pass, which a compiled step does not run"

#: Options of transformers that cannot be honoured -> why; any value but "off" is an error.
_REFUSED = {
    "deepspeed": "it shards a torch model, and the model here is a compiled package",
    "fsdp": "it shards a torch model, and the model here is a compiled package",
    "parallelism_config": "it shards a torch model, and the model here is a compiled package",
    "torch_compile": "the step is compiled to ONNX already",
    "torch_compile_backend": "the step is compiled to ONNX already",
    "torch_compile_mode": "the step is compiled to ONNX already",
    "auto_find_batch_size": "memory is estimated before the run, so set batch_size yourself",
    "neftune_noise_alpha": _NOT_IN_A_COMPILED_STEP,
    "use_liger_kernel": _NOT_IN_A_COMPILED_STEP,
    "label_smoothing_factor": "the step returns the log-probability of the labels only",
}

#: Reduced precision that the host's runtime has no backward kernels for.
_HALF = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval")


@dataclass(init=False, repr=False)
class QEffTrainingArgs(TrainingArguments):
    """How to run: every name of ``transformers.TrainingArguments``, and the fields below.

    ``batch_size`` sets the training batch size, and the evaluation batch size unless that is given too. Names of
    older transformers versions (``warmup_ratio``, ``group_by_length``, ``evaluation_strategy``, ``no_cuda``) are
    translated.

    Attributes:
        output_dir: where everything is written.
        logging_steps: optimizer steps between log lines; every step in a run of ``max_steps`` up to 100, else 10.
        adapter_name: peft's name of the adapter.
        validate: compare the first step with torch autograd and stop when they differ.
        target: which compiler runs the step (``"host"``).
        target_options: options of that target, by name.
        optimizer_in_graph: clipping and AdamW in the step's own package.
        dry_run: stop after data, label audit and memory estimate.
        qpc_path: where the train and eval packages go; None means ``<output_dir>/qpc``.
        num_cores, device_ids: passed to the target; None means its default.
        qeff_fp16, mxfp6_matmul: precision asked of the target; None means its default.
        base_weights: how frozen weights are stored: ``"fp32"``, ``"int8"`` or ``"int4"``.
        max_ctx_len: as in ``QEffConfig``; give it in one place.
        plot: write a picture of the loss.
        logging_dir: where ``metrics.jsonl`` goes; None means ``<output_dir>/logs``.
        overwrite_output_dir: train from the start where ``output_dir`` holds an earlier run.

    Raises:
        OptionError: an unknown name, a value out of range, a contradiction, or an option a compiled step cannot
            honour.
    """

    output_dir: str | None = "./output"
    logging_steps: float = 10
    use_cpu: bool = True
    dataloader_pin_memory: bool = False
    remove_unused_columns: bool = False
    adapter_name: str = "default"
    validate: bool = True
    target: str = "host"
    target_options: dict[str, Any] | None = None
    optimizer_in_graph: bool = False
    dry_run: bool = False
    qpc_path: str | None = None
    num_cores: int | None = None
    device_ids: list[int] | None = None
    qeff_fp16: bool | None = None
    mxfp6_matmul: bool | None = None
    base_weights: str = "fp32"
    max_ctx_len: int | None = None
    plot: bool = True
    logging_dir: str | None = None
    overwrite_output_dir: bool = False

    def __init__(self, output_dir: str | os.PathLike[str] | None = None, **options: Any) -> None:
        given = dict(options)
        if output_dir is not None:
            given["output_dir"] = os.fspath(output_dir)
        values = _translate(given)
        if "per_device_train_batch_size" in values and "batch_size" in given:
            values.setdefault("per_device_eval_batch_size", values["per_device_train_batch_size"])
        if "logging_steps" not in values and 0 < values.get("max_steps", -1) <= 100:
            values["logging_steps"] = 1
        fill(self, values)
        self._check()
        _in_one_sentence(self.__post_init__)

    def _check(self) -> None:
        for name in self.__class__.__annotations__:
            default = getattr(QEffTrainingArgs, name)
            if isinstance(default, bool):
                boolean(name, getattr(self, name))
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            setattr(self, name, integer(name, getattr(self, name)))
        for name in ("num_cores", "max_ctx_len"):
            if getattr(self, name) is not None:
                setattr(self, name, integer(name, getattr(self, name), minimum=2 if name == "max_ctx_len" else 1))
        for name in ("num_train_epochs", "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise OptionError(f"{name} must be a number of at least 0, got {short(value)}.")
        if not is_number(self.max_steps) or int(self.max_steps) != self.max_steps:
            raise OptionError(f"max_steps must be an integer (-1 for no limit), got {short(self.max_steps)}.")
        for name in ("adapter_name", "output_dir"):
            text(name, getattr(self, name))
        for name in ("qpc_path", "logging_dir"):
            if getattr(self, name) is not None:
                setattr(self, name, text(name, os.fspath(getattr(self, name))))
        choice("base_weights", self.base_weights, BASE_WEIGHTS)
        choice("train_sampling_strategy", self.train_sampling_strategy, SAMPLING)
        self._check_target()
        for name, reason in _REFUSED.items():
            if getattr(self, name) not in (None, False, 0, "", [], {}):
                raise OptionError(f"{name} is not supported, because {reason}: leave it out.")

    def _check_target(self) -> None:
        self.target = TARGET_ALIASES.get(text("target", self.target), self.target)
        if self.target not in TARGETS:
            raise OptionError(
                f"target must be one of {', '.join(map(repr, sorted(TARGETS)))}, got {self.target!r}."
                f"{did_you_mean(self.target, TARGETS)}"
            )
        if self.target_options is not None:
            self.target_options = mapping("target_options", self.target_options)
        if self.device_ids is not None:
            ids = [self.device_ids] if isinstance(self.device_ids, int) else self.device_ids
            if not isinstance(ids, list | tuple) or not ids:
                raise OptionError(f"device_ids must be a list of device numbers, got {short(self.device_ids)}.")
            self.device_ids = [integer("device_ids", value, minimum=0) for value in ids]
        for name in ("qeff_fp16", "mxfp6_matmul"):
            if getattr(self, name) is not None:
                boolean(name, getattr(self, name))
        if self.target != "host":
            return
        for name in _HALF:
            if getattr(self, name):
                raise OptionError(
                    f"{name} is not supported on the host, whose runtime lacks kernels that training needs in that "
                    "precision: leave it out, and use base_weights='int8' or 'int4' to save memory."
                )
        for name in ("qeff_fp16", "mxfp6_matmul"):
            if getattr(self, name):
                raise OptionError(
                    f"{name} is a precision of Cloud AI 100, and the host computes in fp32: leave it out."
                )

    @property
    def recompute(self) -> bool:
        """Whether layers are computed again before their backward pass, to save memory."""
        return bool(self.activation_checkpointing)

    @property
    def packages_dir(self) -> Path:
        """Where the train and eval packages go."""
        return Path(self.qpc_path or Path(str(self.output_dir), "qpc"))

    @property
    def logs_dir(self) -> Path:
        """Where ``metrics.jsonl`` and the log go."""
        return Path(self.logging_dir or Path(str(self.output_dir), "logs"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QEffTrainingArgs:
        """Arguments from a mapping of names or aliases to values, such as ``to_dict()`` gives."""
        return cls(**mapping("the training arguments", values))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QEffTrainingArgs:
        """Arguments from a YAML or JSON file; OptionError when it or its values are malformed."""
        return cls.from_dict(read_settings(os.fspath(path), "training arguments"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes every argument as YAML or JSON, by suffix, atomically; returns the path. Tokens are left out."""
        values = {name: value for name, value in self.to_dict().items() if not name.endswith("_token")}
        return write_settings(os.fspath(path), values, "the training arguments")


def _translate(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` under the names of transformers 5 and ours."""
    names = [f.name for f in dataclasses.fields(QEffTrainingArgs) if f.init]
    kept = {name: value for name, value in given.items() if name not in _RENAMED}
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        # As in transformers: the old name mirrors the new one in a copy, so the new one decides.
        if old in kept and (value := kept.pop(old)) is not None and kept.get(ALIASES[old]) is None:
            kept[ALIASES[old]] = value
    if given.get("warmup_ratio") is not None:
        ratio = given["warmup_ratio"]
        if not (is_number(ratio) and 0 <= ratio < 1):
            raise OptionError(f"warmup_ratio must be a number of at least 0 and below 1, got {short(ratio)}.")
        # A float below 1 is a share of the run in transformers 5; 0 there means no warm-up, so both agree.
        if kept.setdefault("warmup_steps", ratio) not in (0, ratio):
            raise OptionError(
                f"warmup_ratio={ratio} contradicts warmup_steps={kept['warmup_steps']}: give one of them."
            )
        kept["warmup_steps"] = ratio or kept["warmup_steps"]
    if given.get("group_by_length"):
        strategy = kept.setdefault("train_sampling_strategy", "group_by_length")
        if strategy != "group_by_length":
            raise OptionError(f"group_by_length contradicts train_sampling_strategy={strategy!r}: give one of them.")
    known = [*names, *_RENAMED]
    for name in kept:
        if name not in names and name not in ALIASES:
            raise OptionError(f"QEffTrainingArgs has no option {name!r}.{did_you_mean(name, [*known, *ALIASES])}")
    return canonical(kept, names, ALIASES, "QEffTrainingArgs")


def _in_one_sentence(check: Callable[[], None]) -> None:
    # transformers' own checks raise ValueError; a user of ours meets one kind of error.
    try:
        check()
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(" ".join(str(error).split())) from error

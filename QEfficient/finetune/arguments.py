"""``QEffTrainingArgs``: how to run. Hugging Face's training arguments plus what a compiled step needs."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from QEfficient.engine.settings import GenerationSettings
from QEfficient.errors import OptionError
from QEfficient.finetune import precision
from QEfficient.finetune.keywords import (
    boolean,
    canonical,
    choice,
    fill,
    integer,
    is_number,
    mapping,
    number,
    plain_types,
    short,
    text,
)
from QEfficient.finetune.methods.facts import GREATER_IS_BETTER
from QEfficient.finetune.settings_file import read_settings, write_settings
from QEfficient.lines import read_lines
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
    "gamma": "epoch_decay",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "sampling_strategy": "train_sampling_strategy",
    "max_length": "max_ctx_len",
    "max_seq_length": "max_ctx_len",
    "validate_first_step": "validate",
    "device": "target",
    "target_device": "target",
}

#: Names of older transformers versions and other tools whose values change along with the name.
RENAMED = ("warmup_ratio", "group_by_length", *precision.WORDS)

#: What `QEffTrainer.evaluate` measures, of one method or another.
METRICS = ("loss", "perplexity", *GREATER_IS_BETTER)

#: Most tokens of an answer to ``eval_prompts``.
EVAL_TOKENS = 64

#: Integer options -> their least value, where that is not 1.
_LEAST = {"max_ctx_len": 2, "seed": 0, "data_seed": 0, "dataloader_num_workers": 0, "local_rank": -1, "max_steps": -1}

#: Where a service of ``report_to`` is in a package of another name.
_REPORT_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}

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
    "push_to_hub": "training runs offline, and `qefficient push OUTPUT_DIR REPO_ID` publishes what it wrote",
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
        recompute: compute layers again before their backward pass, to save memory; ``activation_checkpointing`` and
            ``gradient_checkpointing`` switch it on too.
        base_weights: how frozen weights are stored: ``"fp32"``, ``"int8"`` or ``"int4"``.
        max_ctx_len: as in ``QEffConfig``; give it in one place.
        early_stopping_patience: evaluations in a row that are no better than the best one, after which the run ends;
            by ``metric_for_best_model``, the loss if that is not given.
        early_stopping_threshold: what counts as better is better by more than this.
        epoch_decay: the learning rate is multiplied by this after every epoch, instead of following
            ``lr_scheduler_type``.
        plot: write a picture of loss, learning rate, gradient norm and throughput.
        eval_prompts: texts, or a file with one per line, that the adapter answers at every evaluation.
        eval_generation: generation settings of these answers, by name; greedy and at most 64 tokens by default.
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
    recompute: bool = False
    base_weights: str = "fp32"
    max_ctx_len: int | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    epoch_decay: float | None = None
    plot: bool = True
    eval_prompts: list[str] | str | None = None
    eval_generation: dict[str, Any] | None = None
    logging_dir: str | None = None
    overwrite_output_dir: bool = False

    def __init__(self, output_dir: str | os.PathLike[str] | None = None, **options: Any) -> None:
        given = dict(options)
        if output_dir is not None:
            given["output_dir"] = os.fspath(output_dir) if isinstance(output_dir, os.PathLike) else output_dir
        values = _translate(given)
        if "per_device_train_batch_size" in values and "batch_size" in given:
            values.setdefault("per_device_eval_batch_size", values["per_device_train_batch_size"])
        limit = values.get("max_steps", -1)
        if "logging_steps" not in values and is_number(limit) and 0 < limit <= 100:
            values["logging_steps"] = 1
        fill(self, values)
        self._check()
        _in_one_sentence(self.__post_init__)
        self._check_schedule()
        self._check_reports()

    def _check(self) -> None:
        self._check_numbers()
        for name in ("adapter_name", "output_dir"):
            text(name, getattr(self, name))
        for name in ("qpc_path", "logging_dir"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, text(name, os.fspath(value) if isinstance(value, os.PathLike) else value))
        if self.early_stopping_patience is not None:
            if getattr(self.eval_strategy, "value", self.eval_strategy) == "no":
                raise OptionError("early_stopping_patience needs evaluations: set eval_strategy to 'epoch' or 'steps'.")
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if self.metric_for_best_model is not None:
            choice("metric_for_best_model", self.metric_for_best_model, [*METRICS, *(f"eval_{m}" for m in METRICS)])
            if self.greater_is_better is None:
                # transformers goes by the name: to it, everything but a loss is better when greater.
                self.greater_is_better = self.metric_for_best_model.removeprefix("eval_") in GREATER_IS_BETTER
        choice("base_weights", self.base_weights, BASE_WEIGHTS)
        choice("train_sampling_strategy", self.train_sampling_strategy, SAMPLING)
        self._check_samples()
        self._check_target()
        for name, reason in _REFUSED.items():
            if getattr(self, name) not in (None, False, 0, "", [], {}):
                raise OptionError(f"{name} is not supported, because {reason}: leave it out.")

    def _check_samples(self) -> None:
        if self.eval_prompts is None:
            if self.eval_generation is not None:
                raise OptionError("eval_generation says how eval_prompts are answered: give these, or leave it out.")
            return
        asked = self.eval_prompts
        prompts = read_lines(Path(asked)) if isinstance(asked, str | os.PathLike) else asked
        if not isinstance(prompts, list | tuple) or not prompts:
            raise OptionError(f"eval_prompts must be a list of texts, or a file of them, got {short(asked)}.")
        self.eval_prompts = [text("a prompt of eval_prompts", prompt) for prompt in prompts]
        given = {} if self.eval_generation is None else mapping("eval_generation", self.eval_generation)
        self.eval_generation = {"max_new_tokens": EVAL_TOKENS, **given}
        integer("max_new_tokens in eval_generation", self.eval_generation["max_new_tokens"])
        GenerationSettings.resolve({}, overrides=self.eval_generation)

    def _check_numbers(self) -> None:
        if type(self.max_steps) is not int or self.max_steps == 0 or self.max_steps < -1:
            raise OptionError(
                f"max_steps must be an integer of at least 1, or -1 for no limit, got {short(self.max_steps)}."
            )
        for name, (kind, may_be_none) in plain_types(type(self)).items():
            value = getattr(self, name)
            if value is None and may_be_none:
                continue
            if kind is bool:
                boolean(name, value)
            elif kind is int:
                integer(name, value, minimum=_LEAST.get(name, 1))
            elif kind is float:
                number(name, value)
        for name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and value > 1 and value != int(value):
                raise OptionError(f"{name} must be a whole number, or a share of the run below 1, got {value}.")
        if self.epoch_decay is not None and not 0 < self.epoch_decay <= 1:
            raise OptionError(f"epoch_decay must be above 0 and at most 1, got {self.epoch_decay}.")
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1:
                raise OptionError(f"{name} must be below 1, got {getattr(self, name)}.")
        if self.adam_epsilon == 0:
            raise OptionError("adam_epsilon must be above 0, for a gradient of zero would be divided by it.")

    def _check_schedule(self) -> None:
        """Makes the schedule once, on an optimizer of nothing: only that tells whether its keywords fit."""
        import torch
        from transformers import get_scheduler

        options = None if self.lr_scheduler_kwargs is None else mapping("lr_scheduler_kwargs", self.lr_scheduler_kwargs)
        nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.learning_rate)
        steps = self.max_steps if self.max_steps > 0 else 1000
        kind = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                get_scheduler(kind, nothing, self.get_warmup_steps(steps), steps, scheduler_specific_kwargs=options)
        except (ArithmeticError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise OptionError(
                f"lr_scheduler_type={kind!r} does not work with lr_scheduler_kwargs={short(options)} ({reason}): "
                "change one of them."
            ) from None

    def _check_reports(self) -> None:
        from transformers.integrations import integration_utils as known

        if not self.report_to:
            return
        installed = {*known.get_available_reporting_integrations()}
        # transformers lists these two only in some cases, and takes them in all.
        installed |= {"azure_ml"} if known.is_azureml_available() else set()
        installed |= {"flyte"} if known.is_flytekit_available() else set()
        for name in self.report_to:
            choice("report_to", name, ["none", "all", *known.INTEGRATION_TO_CALLBACK])
            if name not in installed:
                if name == "kubeflow":
                    raise OptionError("report_to='kubeflow' works inside a Kubeflow TrainJob only: leave it out.")
                package = _REPORT_PACKAGES.get(name, name)
                raise OptionError(
                    f"report_to={name!r} needs a package that is not installed: pip install {package}, or leave it out "
                    "(metrics.jsonl is written in any case)."
                )

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
    kept = {name: value for name, value in given.items() if name not in RENAMED}
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        # transformers' Trainer would switch either on in a torch model, so ours has a name of its own. False is
        # what a copy of the arguments says, whatever recompute is.
        if (value := kept.pop(name, None)) is not None and boolean(name, value):
            kept["recompute"] = True
    # As in transformers: the old name mirrors the new one in a copy, so the new one decides.
    old, new = "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"
    if old in kept and (value := kept.pop(old)) is not None and kept.get(new) is None:
        kept[new] = value
    for name in ("eval_strategy", "evaluation_strategy", "save_strategy", "logging_strategy"):
        if kept.get(name) is False:  # how YAML reads the word no
            kept[name] = "no"
    if "report_to" in kept and kept["report_to"] is None:
        kept["report_to"] = "none"
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
    if (stored := precision.base_weights_of(given)) is not None:
        kept["base_weights"] = stored
    return canonical(kept, names, ALIASES, "QEffTrainingArgs")


def _in_one_sentence(check: Callable[[], None]) -> None:
    # transformers' own checks raise ValueError; a user of ours meets one kind of error.
    try:
        check()
    except OptionError:
        raise
    except (TypeError, ValueError) as error:
        raise OptionError(" ".join(str(error).split())) from error

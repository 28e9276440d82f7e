"""``QEffConfig``: what is tuned, on which data, and how rows become labels; needs no torch."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from QEfficient.errors import OptionError
from QEfficient.finetune.data.augment import read_augmentations
from QEfficient.finetune.data.database import is_database, without_password
from QEfficient.finetune.data.filters import read_filters
from QEfficient.finetune.data.mixture import check_mixture, read_sources
from QEfficient.finetune.data.row_functions import read_functions
from QEfficient.finetune.data.steps import as_specs
from QEfficient.finetune.data.stream_options import check_stream, check_stream_run
from QEfficient.finetune.keywords import boolean, canonical, choice, fill, integer, is_number, mapping, short, text
from QEfficient.finetune.lora import DEFAULT_LORA, read_lora
from QEfficient.finetune.methods.facts import DISTILLATION, METHODS, TASK_METRICS
from QEfficient.finetune.settings_file import read_mapping, read_settings, write_settings

if TYPE_CHECKING:
    from QEfficient.finetune.arguments import QEffTrainingArgs

TASKS = ("generation", "seq_classification")
TRAIN_ON = ("completion", "assistant", "last", "all")
ON_BAD_ROW = ("error", "skip")
TRUNCATION = ("truncate", "cut_answer", "drop", "error")

#: Spelling of a document or another tool -> canonical name.
ALIASES = {
    **dict.fromkeys(("model_name", "model_name_or_path", "base_model", "model"), "model_id"),
    **dict.fromkeys(("dataset_path", "dataset", "data"), "dataset_name"),
    **dict.fromkeys(("max_length", "max_seq_length", "max_seq_len", "cutoff_len", "sequence_len"), "max_ctx_len"),
    **dict.fromkeys(("context_length", "ctx_len"), "max_ctx_len"),
    **dict.fromkeys(("peft_config", "peft_config_file"), "lora_config"),
    **dict.fromkeys(("subset", "config_name"), "dataset_config"),
    **dict.fromkeys(("max_samples", "dataset_num_samples"), "sample_size"),
    **dict.fromkeys(("column_map", "columns_map"), "columns"),
    **dict.fromkeys(("dpo_beta", "pref_beta", "rl_beta"), "beta"),
    **dict.fromkeys(("teacher", "teacher_model_name_or_path", "teacher_model_id"), "teacher_model"),
    **dict.fromkeys(("preprocessing_num_workers", "dataset_processes"), "dataset_num_proc"),
    "mix_strategy": "mixing",
    "buffer_size": "shuffle_buffer_size",
    **dict.fromkeys(("freeze_trainable_layers", "train_last_layers"), "unfreeze_last_n"),
}

#: Options that are a text or None.
_TEXTS = (
    *("tokenizer_name", "dataset_config", "dataset_query", "dataset_table"),
    *("train_split", "eval_split", "system_prompt", "chat_template", "teacher_model"),
)

#: Options that are lists of steps over rows -> what reads, and so checks, them.
_STEPS: dict[str, Callable[[Any], Any]] = {
    "filters": read_filters,
    "preprocess": read_functions,
    "augment": read_augmentations,
}

_Self = TypeVar("_Self", bound="QEffConfig")


@dataclass(frozen=True, init=False)
class QEffConfig:
    """What to tune. Keywords only; aliases of other tools (``model_name``, ``max_length``, …) are accepted.

    Attributes:
        model_id: hub id or directory of the base model.
        dataset_name: ``"sample"`` (bundled), ``gsm8k``, ``alpaca``, ``imdb``, ``grammar``, ``custom_dataset``, a name
            given to `register_dataset`, a file (json, jsonl, csv, tsv, parquet, arrow, txt), a directory, a hub
            id, a list of dicts or a ``datasets`` object; None only with a custom dataset class or with ``datasets``.
        datasets: several sources instead of one: a list of names, files, … or of mappings with ``dataset_name`` (or
            ``path``), ``weight`` and options that this source has of its own (``dataset_config``, ``train_split``,
            ``columns``, ``dataset_format``, ``filters``, ``preprocess``, ``system_prompt``, ``sample_size``, …).
        mixing: how many rows a mixture has: ``"exhaust"`` (the default) the most that repeat no row, ``"upsample"`` the
            least that leave none out.
        mixing_temperature: without weights, shares are in proportion to ``size ** (1 / mixing_temperature)``; None
            means 1, which is all rows of all sources.
        mixing_rows: training rows of the mixture, instead of what ``mixing`` makes of the weights.
        streaming: read, tokenize and shuffle rows while training, for data larger than memory; needs ``max_steps``.
        shuffle_buffer_size: rows of a stream that are shuffled together; None means 10,000.
        eval_rows: evaluation rows of a stream: so many of its evaluation split, or the first ones of the training
            rows, which are then not trained; None takes the whole evaluation split, if there is one.
        train_frac: share of the rows that is trained on when the source has no evaluation split; 1.0 = no
            evaluation rows.
        lora_config: dict with peft's keys, ``peft.LoraConfig``, path of a YAML or JSON file, or None for full
            fine-tuning.
        max_ctx_len: most tokens of a row.
        task: ``"generation"`` or ``"seq_classification"``.
        method: what is minimised: ``"sft"`` (cross entropy), ``"dpo"`` or ``"orpo"`` (rows with chosen and rejected
            answers), ``"kto"`` (answers marked good or bad), ``"reward"`` (a model that scores answers, from chosen and
            rejected ones), ``"distill"`` (a teacher's probabilities or answers).
        beta: DPO and KTO: how strongly the model is held to what it was; ORPO: weight of the odds ratio.
        reference_free: DPO without the reference: its log-probabilities count as 0.
        desirable_weight, undesirable_weight: KTO: of good and of bad answers.
        teacher_model: distillation: hub id or directory of the model to learn from.
        distillation: ``"logits"`` (the probabilities of its likeliest tokens beside the data's answers; one
            vocabulary for both models) or ``"response"`` (cross entropy of answers that it generates first).
        teacher_top: how many of the teacher's likeliest tokens are compared.
        distillation_weight: of the divergence from the teacher, from 0 to 1; the rest is cross entropy.
        tokenizer_name: None means ``model_id``.
        dataset_config: subset of a hub dataset.
        dataset_query, dataset_table: what to read from a database, when ``dataset_name`` is its SQLAlchemy URL
            (``sqlite:///rows.db``); ``${NAME}`` in the URL is taken from the environment.
        train_split, eval_split: splits of the source; None means found by their usual names.
        dataset_format: ``"auto"`` or a name of ``QEfficient.finetune.data.formats.FORMATS``.
        columns: our column name -> the column of the data that holds it.
        system_prompt: system message of rows that have none.
        chat_template: None uses the tokenizer's; ``"none"`` joins prompt and answer as they are; ``"plain"`` and
            ``"chatml"`` are built in; anything else is the path of a Jinja file.
        train_on: which tokens are trained: ``"completion"`` or ``"assistant"`` (answers), ``"last"`` (the last answer
            of a conversation), ``"all"``.
        truncation: rows above ``max_ctx_len``: ``"truncate"`` shortens the prompt and refuses data whose answers do
            not fit, ``"cut_answer"`` then cuts answers too, ``"drop"`` leaves such rows out, ``"error"`` refuses them.
        on_bad_row: rows that are malformed or do not fit the others: ``"error"`` stops at the first, ``"skip"`` leaves
            them out and reports each.
        filters: which rows are left out, in this order, before the split: ``"dedupe"``, ``"near_duplicates:0.8"``,
            ``"quality"``, ``"min_words:3"``, ``"max_words:400"``, ``"file.py:function"`` or a callable.
        preprocess: functions over the rows before everything else, ``"file.py:function"`` or a callable: of one row
            when its first parameter is called ``row`` or ``example`` (None drops it), otherwise of all rows.
        augment: what training rows become, in this order: ``"system_dropout:0.5"``, ``"turn_prefixes"``,
            ``"file.py:function"`` or a callable of (row, rng).
        packing: several short rows in one, kept apart by their segment numbers.
        sample_size: most training rows, drawn with ``seed``.
        dataset_num_proc: processes that tokenize; None means one for every core where there are 2,000 rows or more.
        seed: of the split, the sample and the order of rows.
        trainable: name patterns (``fnmatch``) of the parameters to train, instead of LoRA.
        unfreeze_last_n: train this many of the last layers, and a classifier's head, instead of LoRA; below 0 of the
            first.
        freeze_layers: train everything but the embeddings and this many of the first layers, instead of LoRA.
        resize_embeddings: give the model rows for tokens of the tokenizer that it has none for, and train these rows.
        new_tokens: texts that become tokens of their own.
        custom_dataset_config: values a data set's class or function can ask for by parameter name; or a YAML or JSON
            file of them.
        trust_remote_code: run Python code that the model repository brings.

    Raises:
        OptionError: an unknown keyword, a value out of range, or two that contradict each other.
    """

    model_id: str = ""
    dataset_name: Any = None
    datasets: tuple[dict[str, Any], ...] | None = None
    mixing: str | None = None
    mixing_temperature: float | None = None
    mixing_rows: int | None = None
    streaming: bool = False
    shuffle_buffer_size: int | None = None
    eval_rows: int | None = None
    train_frac: float = 0.85
    lora_config: dict[str, Any] | None = field(default_factory=lambda: dict(DEFAULT_LORA))
    max_ctx_len: int = 512
    task: str = "generation"
    method: str = "sft"
    beta: float = 0.1
    reference_free: bool = False
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    teacher_model: str | None = None
    distillation: str = "logits"
    teacher_top: int = 32
    distillation_weight: float = 0.5
    tokenizer_name: str | None = None
    dataset_config: str | None = None
    dataset_query: str | None = None
    dataset_table: str | None = None
    train_split: str | None = None
    eval_split: str | None = None
    dataset_format: str = "auto"
    columns: dict[str, str] | None = None
    system_prompt: str | None = None
    chat_template: str | None = None
    train_on: str = "completion"
    truncation: str = "truncate"
    on_bad_row: str = "error"
    filters: tuple[Any, ...] | None = None
    preprocess: tuple[Any, ...] | None = None
    augment: tuple[Any, ...] | None = None
    packing: bool = False
    sample_size: int | None = None
    dataset_num_proc: int | None = None
    seed: int = 42
    trainable: tuple[str, ...] | None = None
    unfreeze_last_n: int | None = None
    freeze_layers: int | None = None
    resize_embeddings: bool = False
    new_tokens: tuple[str, ...] | None = None
    custom_dataset_config: dict[str, Any] | None = None
    trust_remote_code: bool = False

    def __init__(
        self, model_id: str | os.PathLike[str] | None = None, dataset_name: Any = None, **options: Any
    ) -> None:
        named = {"model_id": model_id, "dataset_name": dataset_name}
        given = {**{name: value for name, value in named.items() if value is not None}, **options}
        fill(self, canonical(given, [f.name for f in dataclasses.fields(self)], ALIASES, "QEffConfig"))
        self._check()

    def _check(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        if not self.model_id:
            raise OptionError("QEffConfig needs model_id, the hub id or the directory of the model to tune.")
        put("model_id", text("model_id", _path_text(self.model_id)))
        if isinstance(self.dataset_name, str | os.PathLike):
            put("dataset_name", text("dataset_name", _path_text(self.dataset_name)))
        if not (is_number(self.train_frac) and 0 < self.train_frac <= 1):
            raise OptionError(f"train_frac must be a number above 0 and at most 1, got {short(self.train_frac)}.")
        put("max_ctx_len", integer("max_ctx_len", self.max_ctx_len, minimum=2))
        put("seed", integer("seed", self.seed, minimum=0))
        for name in ("sample_size", "dataset_num_proc"):
            if getattr(self, name) is not None:
                put(name, integer(name, getattr(self, name)))
        for name in _TEXTS:
            if getattr(self, name) is not None:
                text(name, _path_text(getattr(self, name)))
                put(name, _path_text(getattr(self, name)))
        choices = {"task": TASKS, "train_on": TRAIN_ON, "truncation": TRUNCATION, "on_bad_row": ON_BAD_ROW}
        for name, allowed in choices.items():
            choice(name, getattr(self, name), allowed)
        self._check_format()
        self._check_method()
        for name, read in _STEPS.items():
            if getattr(self, name) is not None:
                put(name, tuple(as_specs(getattr(self, name), name)))
                read(getattr(self, name))
        for name in ("packing", "trust_remote_code", "resize_embeddings"):
            boolean(name, getattr(self, name))
        for name, mapped in (("columns", mapping), ("custom_dataset_config", read_mapping)):
            if getattr(self, name) is not None:
                put(name, mapped(name, getattr(self, name)))
        if self.eval_split is not None and self.train_frac != 0.85:
            raise OptionError(
                f"eval_split={self.eval_split!r} and train_frac={self.train_frac} both say what to evaluate on: give "
                "one of them."
            )
        self._check_tokens()
        self._check_trainable()
        if self.datasets is not None:
            put("datasets", read_sources(self.datasets, ALIASES))
        put("mixing", check_mixture(self))
        check_stream(self)

    def _check_tokens(self) -> None:
        if self.new_tokens is not None:
            given = self.new_tokens if isinstance(self.new_tokens, list | tuple) else [self.new_tokens]
            object.__setattr__(self, "new_tokens", tuple(dict.fromkeys(text("new_tokens", item) for item in given)))
        if self.resize_embeddings and self.task != "generation":
            raise OptionError(f"resize_embeddings is for task='generation' and not for {self.task!r}: leave it out.")

    def _check_format(self) -> None:
        from QEfficient.finetune.data.formats import FORMATS

        choice("dataset_format", self.dataset_format, ["auto", *FORMATS])

    def _check_method(self) -> None:
        choice("method", self.method, METHODS)
        facts = METHODS[self.method]
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        for name in dict.fromkeys(name for other in METHODS.values() for name in other.options):
            if name not in facts.options and getattr(self, name) != usual[name]:
                owners = [repr(method) for method, other in METHODS.items() if name in other.options]
                raise OptionError(f"{name} is an option of method={' and '.join(owners)}, not of {self.method!r}.")
        if facts.scores:
            object.__setattr__(self, "task", "seq_classification")
        elif self.method != "sft" and self.task != "generation":
            raise OptionError(f"method={self.method!r} is for task='generation' and not for {self.task!r}.")
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not (is_number(getattr(self, name)) and 0 < getattr(self, name) < math.inf):
                raise OptionError(f"{name} must be a number above 0, got {short(getattr(self, name))}.")
        weight = self.distillation_weight
        if not (is_number(weight) and 0 <= weight <= 1):
            raise OptionError(f"distillation_weight must be a number from 0 to 1, got {short(weight)}.")
        boolean("reference_free", self.reference_free)
        choice("distillation", self.distillation, DISTILLATION)
        object.__setattr__(self, "teacher_top", integer("teacher_top", self.teacher_top))
        if self.method == "distill" and self.teacher_model is None:
            raise OptionError(
                "method='distill' needs teacher_model, the hub id or directory of the model to learn from."
            )
        if self.asks_teacher and self.augment:
            raise OptionError("augment and distillation='response' both make the answers: give one of them.")
        if facts.rows and self.train_on == "all":
            raise OptionError(
                f"method={self.method!r} compares answers, so train_on='all' has no meaning: leave it out."
            )
        if self.packing and (self.task != "generation" or not (facts.packs or self.asks_teacher)):
            what = f"method={self.method!r}" if self.task == "generation" or facts.scores else f"task={self.task!r}"
            raise OptionError(f"packing is not for {what}: leave it out.")

    @property
    def kind_of_rows(self) -> str:
        """Which rows are read, as `QEfficient.finetune.data.formats.Format.kind`."""
        return METHODS[self.method].rows or self.task

    @property
    def needs_reference(self) -> bool:
        """Whether the method compares with the model as it was."""
        return self.method == "kto" or (self.method == "dpo" and not self.reference_free)

    @property
    def learns_probabilities(self) -> bool:
        """Whether a teacher's probabilities are learned."""
        return self.method == "distill" and self.distillation == "logits"

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher's answers are learned."""
        return self.method == "distill" and self.distillation == "response"

    def method_options(self) -> dict[str, Any]:
        """The method and its options, as JSON values; what a resumed run must share."""
        return {"method": self.method, **{name: getattr(self, name) for name in METHODS[self.method].options}}

    def _check_trainable(self) -> None:
        lora = self.lora_config
        if self.trainable is not None:
            patterns = (self.trainable,) if isinstance(self.trainable, str) else self.trainable
            if not isinstance(patterns, list | tuple) or not patterns or not all(isinstance(p, str) for p in patterns):
                raise OptionError(f"trainable must be a list of name patterns, got {short(self.trainable)}.")
            object.__setattr__(self, "trainable", tuple(patterns))
        if self.unfreeze_last_n == 0:
            raise OptionError("unfreeze_last_n is 0, so nothing would train: give a number of layers.")
        if self.unfreeze_last_n is not None:
            integer("unfreeze_last_n", self.unfreeze_last_n, minimum=-sys.maxsize)
        if self.freeze_layers is not None:
            integer("freeze_layers", self.freeze_layers, minimum=0)
        said = [n for n in ("trainable", "unfreeze_last_n", "freeze_layers") if getattr(self, n) is not None]
        if said:
            if lora is not None and lora != DEFAULT_LORA:
                said.append("lora_config")
            if len(said) > 1:
                raise OptionError(f"{' and '.join(said)} both say which parameters train: give one of them.")
            lora = None
        object.__setattr__(self, "lora_config", read_lora(lora))
        for notice in self.notices():
            warnings.warn(notice, stacklevel=5)

    def notices(self) -> tuple[str, ...]:
        """What was asked for and is handled differently, one sentence each; for reports."""
        dropout = (self.lora_config or {}).get("lora_dropout", 0)
        if not dropout:
            return ()
        return (
            f"lora_dropout={dropout} is recorded, and training uses 0: the compiled step computes the same numbers on "
            "every run, which an in-graph random generator would not.",
        )

    def peft_options(self) -> dict[str, Any] | None:
        """Keywords for peft's configuration as trained, with ``lora_dropout`` 0; None without an adapter."""
        if self.lora_config is None or self.lora_config.get("peft_type") == "IA3":
            return self.lora_config
        # Dropout would be a random number generator inside the step, which nobody could reproduce.
        return {**self.lora_config, "lora_dropout": 0.0}

    @property
    def uses_dora(self) -> bool:
        """Whether the adapter is weight-decomposed."""
        return bool((self.lora_config or {}).get("use_dora"))

    def replace(self: _Self, **changes: Any) -> _Self:
        """A copy with some values changed; checked like a new one."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = canonical(changes, list(values), ALIASES, "QEffConfig")
        with warnings.catch_warnings():
            if "lora_config" not in changed:
                # Already said when this configuration was made.
                warnings.simplefilter("ignore")
            return type(self)(**{**values, **changed})

    def with_arguments(self: _Self, args: QEffTrainingArgs | None) -> _Self:
        """This configuration with the ``max_ctx_len`` of the training arguments, where that is given.

        Raises:
            OptionError: both give a length, and not the same one, or the arguments name a metric that this task lacks,
                something that a stream cannot have, or a way to store weights that the adapter cannot be computed with.
        """
        metric = str(getattr(args, "metric_for_best_model", None) or "loss").removeprefix("eval_")
        measured = ("loss", *(METHODS[self.method].metrics or TASK_METRICS[self.task]))
        if metric not in measured:
            what = f"task={self.task!r}" if self.method == "sft" else f"method={self.method!r}"
            raise OptionError(
                f"metric_for_best_model={metric!r} is not measured for {what}: use {' or '.join(map(repr, measured))}."
            )
        if args is not None:
            check_stream_run(self, args)
        stored = getattr(args, "base_weights", "fp32")
        if self.uses_dora and stored != "fp32":
            raise OptionError(
                f"base_weights={stored!r} and use_dora contradict each other: DoRA computes norms of the weights it "
                "adapts, which would therefore stay as they are; leave one of them out."
            )
        asked = getattr(args, "max_ctx_len", None)
        if asked is None or asked == self.max_ctx_len:
            return self
        if self.max_ctx_len != type(self).max_ctx_len:
            raise OptionError(
                f"QEffConfig has max_ctx_len={self.max_ctx_len} and the training arguments have {asked}: give it once."
            )
        return self.replace(max_ctx_len=asked)

    @classmethod
    def from_dict(cls: type[_Self], values: Mapping[str, Any]) -> _Self:
        """A configuration from a mapping of names or aliases to values."""
        return cls(**mapping("the configuration", values))

    def to_dict(self) -> dict[str, Any]:
        """Every option under its canonical name, as plain JSON values; data in memory becomes a description, and a
        password in a database URL ``***``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["dataset_name"] = _shown(self.dataset_name)
        if self.datasets is not None:
            values["datasets"] = [{**item, "dataset_name": _shown(item["dataset_name"])} for item in self.datasets]
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def load(cls: type[_Self], path: str | os.PathLike[str]) -> _Self:
        """A configuration from a YAML or JSON file.

        Raises:
            OptionError: the file is missing or malformed, or its values are.
        """
        values = read_settings(os.fspath(path), "a configuration")
        several: Any = values.get("datasets")
        listed = [s.get("dataset_name") for s in several if isinstance(s, Mapping)] if isinstance(several, list) else []
        for source in [values.get("dataset_name"), *listed]:
            if isinstance(source, str) and source.startswith(_IN_MEMORY):
                raise OptionError(
                    f"{os.fspath(path)} was saved from data in memory ({source}): set dataset_name to a file."
                )
        return cls.from_dict(values)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the resolved configuration as YAML or JSON, by suffix, atomically; returns the path."""
        return write_settings(os.fspath(path), self.to_dict(), "the configuration")


_IN_MEMORY = "<in memory: "


def describe_memory(data: Any) -> str:
    """What stands for a dataset object in a saved configuration."""
    rows = f", {len(data)} rows" if hasattr(data, "__len__") and not isinstance(data, Mapping) else ""
    return f"{_IN_MEMORY}{type(data).__name__}{rows}>"


def _shown(data: Any) -> Any:
    """``dataset_name`` as a saved configuration has it."""
    if data is not None and not isinstance(data, str):
        return describe_memory(data)
    return without_password(data) if data is not None and is_database(data) else data


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)

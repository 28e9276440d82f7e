"""QEffModelManager: from a configuration to a compiled training step, one public method per stage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from QEfficient.errors import OptionError, QEfficientError, UnsupportedModelError
from QEfficient.finetune.arguments import QEffTrainingArgs
from QEfficient.finetune.classes import Classes, ClassifierSource, choose_classes, reward_output
from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.freezing import all_but_first_blocks, last_blocks
from QEfficient.finetune.merged_adapter import is_swappable, merged_checkpoint
from QEfficient.finetune.methods.facts import METHODS
from QEfficient.finetune.model_files import BaseFiles
from QEfficient.finetune.new_tokens import fitting_source, new_rows, require_trained, training_rows, with_new_tokens
from QEfficient.finetune.step_checkpoint import from_checkpoint
from QEfficient.finetune.step_model import StepModel
from QEfficient.finetune.step_package import StepOptions, StepPackages, build_step, export_step, transform_log
from QEfficient.finetune.tokenizer_files import load_tokenizer
from QEfficient.models.hub import resolve
from QEfficient.models.source import CheckpointSource
from QEfficient.progress import Progress, silent
from QEfficient.store.home import cache_home
from QEfficient.store.store import ArtifactStore
from QEfficient.transforms.onnx.queue import TransformLike

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from QEfficient.finetune.onnx_utils import ONNXModel

FACTORIES = {"generation": "AutoModelForCausalLM", "seq_classification": "AutoModelForSequenceClassification"}


class QEffModelManager:
    """The model side of a run.

    Args:
        config: what is tuned.
        args: how to run.
        transforms: the user's own ONNX transforms, run after the built-in ones.
        cache_home_dir: the cache; None means ``$QEFF_HOME`` or the user's cache directory.

    Attributes:
        model: after `init_model`, what will be captured.
        graph: after `export_to_onnx`, the directory of the joint graph.
        packages: after `compile`, where the compiled step is.
        step: after `load`, the step itself.

    Raises:
        ModelLoadError, OptionError: the checkpoint cannot be found or read.
    """

    def __init__(
        self,
        config: QEffConfig,
        args: QEffTrainingArgs,
        *,
        transforms: tuple[TransformLike, ...] = (),
        cache_home_dir: str | Path | None = None,
    ) -> None:
        self.config, self.args, self.transforms = config.with_arguments(args), args, tuple(transforms)
        self.home = None if cache_home_dir is None else Path(cache_home_dir)
        self.store = ArtifactStore(cache_home(self.home))
        if not self.config.model_id:
            raise OptionError("model_id is missing: name a model directory or hub id.")
        directory = resolve(self.config.model_id)
        self.source: CheckpointSource = CheckpointSource(directory, self.config.model_id, self.config.trust_remote_code)
        self._check_length()
        self._new_head = False
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._new_rows: list[int] = []
        if self.config.resize_embeddings or self.config.new_tokens:
            self.source = fitting_source(self.source, self.tokenizer, self.config)
            self._new_rows = new_rows(self.source, self.tokenizer, self.config)
        self.model: StepModel | None = None
        self.graph: Path | None = None
        self.packages: StepPackages | None = None
        self.step: CompiledStep | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, or the one ``tokenizer_name`` names."""
        if self._tokenizer is None:
            place = self.config.tokenizer_name or self.source.directory
            found = load_tokenizer(place, trust_remote_code=self.config.trust_remote_code)
            self._tokenizer = with_new_tokens(found, self.config)
            fitting_source(self.source, self._tokenizer, self.config)
        return self._tokenizer

    @property
    def options(self) -> StepOptions:
        """The step's options as the arguments give them."""
        rows = 2 if METHODS[self.config.method].rows else 1  # of a batch's unit: pairs have two
        return StepOptions(
            target=self.args.target,
            seq_len=self.config.max_ctx_len,
            batch_size=rows * max(self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size),
            recompute="layers" if self.args.recompute else "products",
            base_weights=self.args.base_weights,
            teacher_top=self.config.teacher_top if self.config.learns_probabilities else 0,
            transforms=self.transforms,
        )

    def set_classes(self, label_names: Mapping[str, int] | None, pad_token_id: int) -> Classes:
        """Tells a classifier what it tells apart; before `init_model`.

        Args:
            label_names: name -> class id, as the data has them; None for a reward model, which has one output.
            pad_token_id: for a model without one.
        """
        checkpoint = self.source.checkpoint if isinstance(self.source, ClassifierSource) else self.source
        own = checkpoint.config()
        classes = reward_output(own) if label_names is None else choose_classes(own, label_names)
        self.source = ClassifierSource(checkpoint, classes, pad_token_id)
        self._new_head = classes.new_head
        return classes

    # ------------------------------------------------------------------ stages

    def init_model(self) -> StepModel:
        """Describes the model: adapter added, dropout off, trained tensors in memory, frozen ones left on disk.

        Raises:
            UnsupportedModelError, OptionError: the model cannot be trained so, or LoRA's targets match nothing.
        """
        if self.model is None:
            torch.manual_seed(self.args.seed)  # LoRA's A is drawn at random
            self.model = from_checkpoint(
                self.source,
                FACTORIES[self.config.task],
                self.store.memo,
                peft_config=self.peft_config(),
                adapter_name=self.args.adapter_name,
                trainable=self._trainable(),
                new_head=self._new_head,
            )
            require_trained(self.model, self._new_rows)
        return self.model

    initialize_model = init_model

    def peft_config(self) -> Any:
        """peft's configuration of the adapter (``LoraConfig`` or ``IA3Config``), None for full fine-tuning."""
        given = self.config.peft_options()
        if given is None:
            return None
        if self._new_rows:
            given = training_rows(given, self._new_rows, self.source.ghost(FACTORIES[self.config.task]))
        from peft import IA3Config, LoraConfig

        kept = {k: v for k, v in given.items() if k not in ("peft_type", "task_type")}
        task = {"generation": "CAUSAL_LM", "seq_classification": "SEQ_CLS"}[self.config.task]
        return (IA3Config if given.get("peft_type") == "IA3" else LoraConfig)(**kept, task_type=task)

    def export_to_onnx(self, report: Progress = silent) -> Path:
        """Captures forward and backward; returns ``model.onnx`` of the joint graph."""
        _, self.graph = export_step(self.init_model(), self.store, report)
        return self.graph / "model.onnx"

    def apply_onnx_transforms(self) -> ONNXModel:
        """The joint graph after the transform queue, to look at; `compile` runs the same queue."""
        from QEfficient.finetune.onnx_utils import ONNXModel

        if self.graph is None:
            self.export_to_onnx()
        assert self.graph is not None
        model = ONNXModel(self.graph / "model.onnx")
        model.modify(self.options.queue(self.init_model().vocabulary))
        return model

    def compile(self, report: Progress = silent) -> StepPackages:
        """Compiles the train and eval packages and links them under ``qpc_path``."""
        self.packages = build_step(self.init_model(), self.options, self.store, report)
        self.graph = self.packages.graph
        if self.args.should_save:
            _link(self.packages.train, self.args.packages_dir / "train")
            _link(self.packages.evaluate, self.args.packages_dir / "eval")
        return self.packages

    def transform_log(self) -> list[dict[str, Any]]:
        """What each ONNX transform of the train package did."""
        return [] if self.packages is None else transform_log([self.packages.train])

    def load(self) -> CompiledStep:
        """Opens the compiled step with the trained tensors' initial values."""
        if self.packages is None:
            self.compile()
        assert self.packages is not None
        self.step = CompiledStep(self.init_model(), self.packages, threads=self._threads())
        return self.step

    def prepare_for_training(self, report: Progress = silent) -> CompiledStep:
        """All stages: export, transforms, compile, load."""
        self.init_model()
        self.export_to_onnx(report)
        self.compile(report)
        return self.load()

    # ------------------------------------------------------------------ afterwards

    def base_files(self) -> BaseFiles | None:
        """What completes the trained tensors to a checkpoint that loads by itself; None for an adapter."""
        model = self.init_model()
        if model.adapter is not None:
            return None
        extra = self.source.directory / "generation_config.json"
        return BaseFiles(
            model.find_weights if model.is_partial else None, model.aliases(), (extra,) if extra.is_file() else ()
        )

    def load_reference(self) -> PreTrainedModel:
        """The base model in torch, float32: what parity is measured against and adapters are merged into."""
        return self.source.load(FACTORIES[self.config.task])

    def inference(self, tuned: Path | None = None, ctx_len: int | None = None) -> Any:
        """The compiled inference model, with what ``tuned`` (an output directory) holds; None is the base model.

        A plain LoRA adapter becomes inputs of the package; any other is merged into the base model first.

        Raises:
            UnsupportedModelError: the task does not generate text.
        """
        from QEfficient.models.auto import QEFFAutoModelForCausalLM
        from QEfficient.models.peft import QEFFAutoPeftModelForCausalLM

        if self.config.task != "generation":
            raise UnsupportedModelError(
                "a classifier generates no text: load it with QEFFAutoModelForSequenceClassification."
            )
        adapted = tuned is not None and (tuned / "adapter_config.json").is_file()
        if adapted and tuned is not None and is_swappable(tuned):
            model: Any = QEFFAutoPeftModelForCausalLM.from_pretrained(
                tuned, base_model=str(self.source.directory), cache_home_dir=self.home
            )
        else:
            place = self.source.directory if tuned is None else tuned
            if adapted:
                place = merged_checkpoint(place, self.source, self.store)
            model = QEFFAutoModelForCausalLM.from_pretrained(str(place), cache_home_dir=self.home)
        model.compile(ctx_len=ctx_len)
        return model

    def generate(self, *args: Any, tuned: Path | None = None, ctx_len: int | None = None, **kwargs: Any) -> Any:
        """Generates with the compiled inference model; see `QEFFAutoModelForCausalLM.generate`."""
        return self.inference(tuned, ctx_len).generate(*args, **kwargs)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with this one, as JSON."""
        from QEfficient.store.digest import json_digest

        args = self.args
        return {
            "model": json_digest(self.init_model().identity),
            "batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "world_size": args.world_size,
            "seed": args.seed,
            "base_weights": args.base_weights,
            "optim": str(getattr(args.optim, "value", args.optim)),
            **({} if self.config.method == "sft" else self.config.method_options()),
        }

    def _trainable(self) -> Sequence[str] | Callable[[Any], Sequence[str]] | None:
        """What trains where there is no adapter."""
        config = self.config
        if config.unfreeze_last_n is not None:
            return partial(last_blocks, count=config.unfreeze_last_n)
        if config.freeze_layers is not None:
            return partial(all_but_first_blocks, count=config.freeze_layers)
        return config.trainable

    def _threads(self) -> int | None:
        if self.args.num_cores is not None:
            return self.args.num_cores
        # Ranks on one machine share its cores.
        return max(1, len(os.sched_getaffinity(0)) // self.args.world_size) if self.args.world_size > 1 else None

    @property
    def positions(self) -> int | None:
        """How many positions the model was made for; None where its configuration does not say."""
        own = self.source.raw_config()
        limit = next((own[k] for k in ("max_position_embeddings", "n_positions", "max_seq_len") if k in own), None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def _check_length(self) -> None:
        limit = self.positions
        if limit is not None and limit < self.config.max_ctx_len:
            raise OptionError(
                f"max_ctx_len={self.config.max_ctx_len} is more than the {limit} positions {self.config.model_id} was "
                "made for: lower it."
            )


def _link(package: Path, place: Path) -> None:
    """Shows a package of the cache under another path; replaces what an earlier run linked there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink():
        place.unlink()
    elif place.is_dir():
        if not (place / "manifest.json").is_file():
            raise QEfficientError(f"{place} exists and is not a package: choose another qpc_path.")
        shutil.rmtree(place)
    place.symlink_to(package, target_is_directory=True)

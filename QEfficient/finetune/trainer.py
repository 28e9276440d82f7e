"""QEffTrainer: the transformers Trainer over a compiled step, with exact losses, checkpoints and resume."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from QEfficient.errors import ArtifactWriteError, InputError, PackageError, TrainingError
from QEfficient.finetune.arguments import QEffTrainingArgs
from QEfficient.finetune.callbacks import METRICS_FILE, MetricsFile, ProgressLine
from QEfficient.finetune.checkpoint import (
    ADAPTER_WEIGHTS,
    MODEL_WEIGHTS,
    OPTIMIZER,
    SCHEDULER,
    STATE,
    checkpoints,
    load_tensors,
    publish,
    read_position,
    remove_unfinished,
    resume_point,
    save_tensors,
    staging,
    write_position,
    write_run,
)
from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.finetune.data.batching import BatchOrder
from QEfficient.finetune.data.collate import without_labels
from QEfficient.finetune.data.loader import BatchLoader, Rows
from QEfficient.finetune.data.stream import StreamRows
from QEfficient.finetune.data.stream_loader import NumberedBatches, StreamLoader
from QEfficient.finetune.data_manager import QEffDataManager
from QEfficient.finetune.meter import Meter
from QEfficient.finetune.methods.base import Measured, Method
from QEfficient.finetune.methods.cross_entropy import ClassCrossEntropy, TokenCrossEntropy
from QEfficient.finetune.model_files import BaseFiles, write_model
from QEfficient.finetune.plots import RunPlot
from QEfficient.store.files import write_errors

PICTURE = "loss.png"


class QEffTrainer(Trainer):
    """Trains a `CompiledStep`: `train`, `evaluate`, `save_model` as in transformers.

    What differs from transformers' Trainer: losses and evaluation are sums over trained tokens divided by their number,
    however batches are cut; checkpoints appear whole or not at all; a run resumes to the same bits; a loss that is not
    a number stops the run.

    Args:
        step: the compiled step.
        args: how to run.
        data: the data manager that made the rows; its collator and order are used.
        train_dataset, eval_dataset: rows of ``data.prepare_dataset()``.
        method: what is minimised; None is the cross entropy of tokens, or of a classifier's classes.
        run_identity: JSON-ready values a resumed run must share.
        callbacks: transformers callbacks besides the built-in ones.
        tokenizer: saved beside the weights.
        base_files: what completes trained tensors to a checkpoint that loads by itself; not for adapters.
    """

    def __init__(
        self,
        step: CompiledStep,
        args: QEffTrainingArgs,
        data: QEffDataManager,
        train_dataset: Rows | StreamRows | None,
        eval_dataset: Rows | None = None,
        *,
        method: Method | None = None,
        run_identity: Mapping[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        tokenizer: Any = None,
        base_files: BaseFiles | None = None,
    ) -> None:
        self.data, self.run_identity, self.base_files = data, dict(run_identity or {}), base_files
        self.meter, self._epoch_decay = Meter(), args.epoch_decay
        self.method = method or (ClassCrossEntropy() if step.is_classifier else TokenCrossEntropy())
        #: How long writing each checkpoint of this run took.
        self.checkpoint_seconds: list[float] = []
        self._batches: NumberedBatches | None = None
        self._saved_position: dict[str, Any] | None = None
        args.logging_nan_inf_filter = False
        if args.ddp_find_unused_parameters is None:  # every trained tensor gets a gradient in every step
            args.ddp_find_unused_parameters = False
        own: list[TrainerCallback] = [_StepCounter(self.meter), MetricsFile(args.logs_dir)]
        if args.plot:
            own.append(RunPlot(args.logs_dir / METRICS_FILE, Path(str(args.output_dir)) / PICTURE))
        if args.early_stopping_patience is not None:
            own.append(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
        super().__init__(
            model=step,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=self._collate,
            callbacks=[*own, *callbacks],
        )
        self.tokenizer = tokenizer
        self._said_zero = False
        self.model_accepts_loss_kwargs = True
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)
        if not args.disable_tqdm:
            self.add_callback(ProgressLine())

    # ------------------------------------------------------------------ batches

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.data.collate(rows, pad_token_id=self.data.pad_token_id)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}

    def get_train_dataloader(self) -> DataLoader:
        """Batches whose order is a function of (seed, epoch); every rank takes its share of each global batch."""
        if self.train_dataset is None:
            raise InputError("this trainer has no training rows: pass train_dataset.")
        if isinstance(self.train_dataset, StreamRows):
            return self._stream_loader(self.train_dataset)
        return self._loader(self.train_dataset, self.args.per_device_train_batch_size, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches of the evaluation rows in their order."""
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        if rows is None:
            raise InputError("there are no evaluation rows: lower train_frac or pass an evaluation split.")
        return self._loader(rows, self.args.per_device_eval_batch_size, shuffle=False)

    def _loader(self, rows: Any, batch_size: int, shuffle: bool) -> DataLoader:
        loader = self.data.get_dataloader(
            rows, batch_size, shuffle, rank=self.args.process_index, world_size=self.args.world_size
        )
        assert isinstance(loader, BatchLoader)
        return DataLoader(_Fillable(rows), batch_sampler=_Epochs(loader.batch_sampler), collate_fn=self._collate)

    def _stream_loader(self, rows: StreamRows) -> DataLoader:
        """As many batches of a stream as the run has, in one epoch; a resumed run goes on where its checkpoint was."""
        count = self.args.max_steps * self.args.gradient_accumulation_steps
        loader = self.data.get_dataloader(
            rows,
            self.args.per_device_train_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        assert isinstance(loader, StreamLoader)
        self._batches = NumberedBatches(loader, count, self._saved_position)
        # torch asks for the batches by number, which transformers' loop can skip without reading them.
        return DataLoader(self._batches, batch_sampler=_Numbers(count), collate_fn=self._collate)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ the step

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the loss of the whole window, of all micro-batches and ranks."""
        step: CompiledStep = self.accelerator.unwrap_model(model)
        items = float(num_items_in_batch if num_items_in_batch is not None else self.method.count(inputs))
        if items == 0:
            raise InputError("every label of this optimizer step is masked (-100): there is nothing to train on.")
        weighed = self.method.weigh(step, inputs, items)
        loss = model(**weighed.inputs, normaliser=weighed.normaliser)
        result = step.last
        assert result is not None
        measured = weighed.measured
        if measured is None:
            measured = Measured(self.method.count(inputs), result.loss * items)
        else:  # the gradient is the step's, the value is not
            loss = loss + (measured.loss / items - loss.detach())
        if not math.isfinite(measured.loss):
            raise self._diverged(f"the loss became {measured.loss}")
        mask = inputs["attention_mask"]
        self.meter.add(
            measured.loss,
            measured.count,
            trained=result.trained_tokens,
            tokens=int((mask != 0).sum()),
            padded=mask.numel(),
            sums=measured.sums,
        )
        if self.args.world_size > 1 and num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.args.world_size  # DistributedDataParallel takes the mean of the ranks' gradients
        return (loss, {"loss": loss}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """What the loss of a window is a mean over, on all ranks."""
        count = torch.tensor(sum(self.method.count(batch) for batch in batch_samples), device=device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            dist.all_reduce(count)
        return count

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of ``lr_scheduler_type``, or with ``epoch_decay`` steps from epoch to epoch."""
        decay, owner = self._epoch_decay, optimizer or self.optimizer
        if decay is None or owner is None:
            return super().create_scheduler(num_training_steps, optimizer)
        of_epoch = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(owner, lambda step: decay ** (step // of_epoch))
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds rates and memory to training logs; the loss is a mean over the window's trained tokens."""
        if "loss" in logs:
            rates = self.meter.read()
            if self.args.world_size > 1:
                rates.pop("loss", None)  # the other ranks' tokens are in transformers' figure only
            if logs.get("grad_norm") == 0 and not self._said_zero:
                self._said_zero = True
                warnings.warn(
                    f"the gradient of optimizer step {self.state.global_step} is zero, so nothing is learned: the "
                    "weights are saturated; lower learning_rate and start anew.",
                    stacklevel=2,
                )
            logs = {**logs, **rates}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The method's loss over all rows, and what else it measures. Runs no backward pass."""
        began = time.perf_counter()
        step: CompiledStep = self.accelerator.unwrap_model(self.model)
        measured, tokens = Measured(0, 0.0), 0
        for batch in self.get_eval_dataloader(eval_dataset):
            measured += self.method.measure(step, batch)
            tokens += int((batch["attention_mask"] != 0).sum())
        if self.args.world_size > 1:
            measured, tokens = _of_all_ranks(measured, tokens)
        seconds = time.perf_counter() - began
        if measured.count == 0:
            raise InputError("every label of the evaluation rows is masked: there is nothing to measure.")
        mean = measured.loss / measured.count
        if not math.isfinite(mean):
            raise self._diverged(f"the evaluation loss is {mean}")
        rates = {"runtime": round(seconds, 3), "tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}
        found = {"loss": mean, **self.method.summary(measured), **rates}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.meter.pause(time.perf_counter() - began)
        return metrics

    # ------------------------------------------------------------------ checkpoints

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Trains; see transformers. ``resume_from_checkpoint=True`` continues from the latest complete checkpoint.

        Raises:
            OptionError: the checkpoint is of another model or run, or there is none.
            PackageError: the checkpoint is damaged.
            TrainingError: the loss is not a number any more.
        """
        output = Path(str(self.args.output_dir))
        if self.is_world_process_zero():
            remove_unfinished(output)
        chosen = resume_point(output, resume_from_checkpoint, self.run_identity)
        self._said_zero = False
        self._saved_position = None if chosen is None else read_position(chosen)
        return super().train(str(chosen) if chosen is not None else None, trial, ignore_keys_for_eval)

    def _run_epoch(self, *positional: Any, **more: Any) -> None:
        """transformers looks at ``max_steps`` after a step only: a finished run that resumes would do one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*positional, **more)

    def _diverged(self, what: str) -> TrainingError:
        """What to say when a number stopped being one."""
        if self.state.global_step == 0:
            return TrainingError(
                f"{what} before the first optimizer step: the base weights or their precision give no numbers, so "
                "check the checkpoint, for example with qefficient validate."
            )
        kept = checkpoints(Path(str(self.args.output_dir)))
        left = f"{kept[-1]} is intact" if kept else "no checkpoint was written"
        return TrainingError(
            f"{what} after optimizer step {self.state.global_step}: lower learning_rate or raise warmup_steps; {left}."
        )

    def _require_numbers(self) -> None:
        """Raises TrainingError when a trained tensor is not finite: such weights never replace good ones."""
        for name, parameter in self._step.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise self._diverged(f"{name} holds values that are no numbers")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes ``checkpoint-N`` beside its place and moves it there: it is complete or absent."""
        began = time.perf_counter()
        self._require_numbers()
        output = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        place = staging(output, name)
        if self.is_world_process_zero():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        self._barrier()
        if self.state.best_global_step:
            best = output / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir() or best.name == name:
                self.state.best_model_checkpoint = str(best)
        try:
            with write_errors("the checkpoint", output / name):
                self._write_checkpoint(place)
        except ArtifactWriteError:
            shutil.rmtree(place, ignore_errors=True)
            raise
        self._barrier()
        if self.is_world_process_zero():
            publish(place, output / name)
            rotate_checkpoints(
                output_dir=str(output),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        self._barrier()
        self.checkpoint_seconds.append(time.perf_counter() - began)
        self.meter.pause(self.checkpoint_seconds[-1])

    def _write_checkpoint(self, place: Path) -> None:
        self.save_model(str(place), _internal_call=True)
        if not self.args.save_only_model:
            try:
                self._save_optimizer_and_scheduler(str(place))
                self._save_rng_state(str(place))
            except RuntimeError as error:  # torch's writer has no error of its own
                raise OSError(str(error).splitlines()[0]) from error
        if self.is_world_process_zero():
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState) and isinstance(self.state.stateful_callbacks, dict):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            write_run(place, self.run_identity)
            if self._batches is not None:
                write_position(place, self._batches.state())
            self.state.save_to_json(str(place / STATE))

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trained tensors under the names everyone reads, the adapter's configuration, and the tokenizer."""
        place = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        if not self.args.should_save:
            return
        self._require_numbers()
        place.mkdir(parents=True, exist_ok=True)
        save_trained(self._step, place, self.base_files)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(place))

    @property
    def _step(self) -> CompiledStep:
        step: CompiledStep = self.accelerator.unwrap_model(self.model)
        return step

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self._step, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0][:100]
            raise PackageError(
                f"{OPTIMIZER} or {SCHEDULER} in {checkpoint} cannot be read ({reason}): resume from an earlier one."
            ) from None

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            load_trained(self._step, Path(self.state.best_model_checkpoint))


def _of_all_ranks(measured: Measured, tokens: int) -> tuple[Measured, int]:
    """The totals of every rank together."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (measured, tokens))
    return sum((part for part, _ in found), Measured(0, 0.0)), sum(number for _, number in found)


def save_trained(step: CompiledStep, directory: Path, base: BaseFiles | None = None) -> None:
    """Writes a step's trained tensors: a PEFT adapter, or a model that transformers loads."""
    if step.adapter is None:
        write_model(step.file_tensors(), directory / MODEL_WEIGHTS, base)
        step.config.save_pretrained(str(directory))
        for path in base.extra if base is not None else ():
            shutil.copyfile(path, directory / path.name)
        return
    save_tensors(step.file_tensors(), directory / ADAPTER_WEIGHTS)
    if step.own_config:  # names and number of the classes, or of the tokens, are nowhere else
        step.config.save_pretrained(str(directory))
    text = json.dumps(adapter_settings(step), indent=2, sort_keys=True, default=str) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")


def adapter_settings(step: CompiledStep) -> dict[str, Any]:
    """What ``adapter_config.json`` says; sets in sorted order, so that equal adapters have equal files."""
    config = step.peft_config.to_dict()
    config = {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in config.items()}
    return {k: getattr(v, "value", v) for k, v in config.items()} | {"inference_mode": True}


def load_trained(step: CompiledStep, directory: Path) -> None:
    """Reads trained tensors back into a step.

    Raises:
        OptionError, PackageError: of another model, or damaged.
    """
    named = dict(step.named_parameters())
    expected = {step.file_names[name]: tuple(parameter.shape) for name, parameter in named.items()}
    found = load_tensors(directory, expected)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(found[step.file_names[name]]))


class _StepCounter(TrainerCallback):
    """Tells a meter when an optimizer step is done."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_begin(self, *event: Any, **more: Any) -> None:
        self.meter.begin()

    def on_step_end(self, *event: Any, **more: Any) -> None:
        self.meter.step()


class _Fillable(Dataset):
    """Rows, and at index -1 one that fills a place and trains nothing."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return without_labels(self.rows[0]) if index < 0 else self.rows[index]


class _Epochs:
    """A batch sampler that transformers' loop can tell the epoch: it looks for a ``batch_sampler`` inside."""

    def __init__(self, order: BatchOrder) -> None:
        self.order, self.batch_size, self.drop_last = order, order.batch_size, False

    @property
    def batch_sampler(self) -> _Epochs:
        return self

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class _Numbers:
    """A batch sampler of batches that are asked for by number: ``[0]``, ``[1]``, …"""

    batch_size, drop_last = None, False

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[list[int]]:
        return ([number] for number in range(self.count))

    def __len__(self) -> int:
        return self.count

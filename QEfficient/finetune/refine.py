"""QEfficient: the facade. Data, model, proof, training and saving in the order the documents draw."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from QEfficient.errors import OptionError
from QEfficient.exporter.quiet import quiet
from QEfficient.finetune.answers import Answers
from QEfficient.finetune.arguments import QEffTrainingArgs
from QEfficient.finetune.card import CARD, is_ours, write_card
from QEfficient.finetune.checkpoint import checkpoints, complete, resume_point, staging
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.stream import StreamRows
from QEfficient.finetune.data_manager import QEffDataManager
from QEfficient.finetune.eval_samples import EvalSamples, check_room, check_samples
from QEfficient.finetune.methods.build import check_teacher, completed, method_of
from QEfficient.finetune.model_manager import QEffModelManager
from QEfficient.finetune.options import resolved
from QEfficient.finetune.proof import ProofReport, compare_first_step, require
from QEfficient.finetune.ranks import LOCK, shared_checkpoints
from QEfficient.finetune.reference import reference_model
from QEfficient.finetune.run_record import (
    ARGUMENTS_FILE,
    CONFIG_FILE,
    PROOF_FILE,
    RUN_FILE,
    forget_record,
    write_record,
)
from QEfficient.finetune.settings_file import write_settings
from QEfficient.finetune.trainer import QEffTrainer
from QEfficient.progress import bar
from QEfficient.store.files import write_errors
from QEfficient.transforms.onnx.queue import TransformLike, resolve


class QEfficient:
    """Fine-tunes a model through a compiled ONNX training step.

    Args:
        config: what is tuned, and on which data.
        args: how to run; may also be given to `refine`.
        custom_dataset_class: a class with ``load_data`` and optionally ``preprocess`` and ``split``.
        transforms: ONNX transforms of your own, run on the training graph after the built-in ones.
        callbacks: transformers callbacks.
        cache_home_dir: the cache; None means ``$QEFF_HOME`` or the user's cache directory.

    Attributes:
        data_manager, model_manager, trainer: the parts, to inspect once `refine` has begun.
        proof: the comparison of the first step with torch, when ``validate`` is on.

    Example:
        >>> qe = QEfficient(QEffConfig(model_id="path", dataset_name="sample"), QEffTrainingArgs("out", max_steps=50))
        >>> model, tokenizer = qe.refine()
        >>> print(qe.generate("Question: Tom has 3 apples and buys 4 more. How many apples does he have?"))
    """

    def __init__(
        self,
        config: QEffConfig,
        args: QEffTrainingArgs | None = None,
        custom_dataset_class: Any = None,
        *,
        transforms: Sequence[TransformLike] = (),
        callbacks: Sequence[Any] = (),
        cache_home_dir: str | Path | None = None,
    ) -> None:
        if not isinstance(config, QEffConfig):
            raise OptionError(f"QEfficient takes a QEffConfig first, got {type(config).__name__}.")
        if args is not None and not isinstance(args, QEffTrainingArgs):
            raise OptionError(f"args must be QEffTrainingArgs, got {type(args).__name__}.")
        self.config, self.args = config, args
        self.custom_dataset_class, self.transforms = custom_dataset_class, tuple(transforms)
        self.callbacks, self.cache_home_dir = list(callbacks), cache_home_dir
        self.data_manager: QEffDataManager | None = None
        self.model_manager: QEffModelManager | None = None
        self.trainer: QEffTrainer | None = None
        self.proof: ProofReport | None = None
        self._tuned: Path | None = None
        self._answers: Answers | None = None

    def refine(
        self,
        args: QEffTrainingArgs | None = None,
        *,
        validate: bool | None = None,
        say: Callable[[Any], None] | None = None,
        load: bool = True,
    ) -> tuple[Any, Any]:
        """Runs the whole workflow.

        Continues from the latest complete checkpoint in ``output_dir``, unless ``overwrite_output_dir`` is set.

        Args:
            args: how to run, when not given to the constructor.
            validate: compare the first step with torch autograd; None takes ``args.validate``.
            say: receives what a person should see (text or a rich object); None prints it to stderr.
            load: return the tuned model in torch; False saves the memory and returns None in its place.

        Returns:
            (the PEFT or full torch model with the tuned weights, the tokenizer).

        Raises:
            OptionError, InputError, ModelLoadError, UnsupportedModelError, ExportError: before any training.
            TrainingError: the loss is not a number, or the first step differs from torch.
        """
        chosen = args or self.args
        if chosen is None:
            raise OptionError("refine needs QEffTrainingArgs: pass them here or to QEfficient.")
        self.args = chosen
        # Earlier parts, as generate() makes them, may be for other arguments, and their tensors may be trained already.
        self.model_manager, self.data_manager = None, None
        # Not should_log: that is one process of every host.
        tell = (say or _print) if chosen.process_index == 0 else _quiet
        output = Path(str(chosen.output_dir))
        resolve(self.transforms)  # what cannot be loaded is said before the data is read
        made = chosen.should_save and not output.exists()
        self._prepare_output(output, chosen)
        with (
            _gone_if_empty(output) if made else nullcontext(),
            _only_writer(output) if chosen.should_save else nullcontext(),
        ):
            return self._refine(chosen, output, chosen.validate if validate is None else validate, tell, load)

    def _refine(
        self, chosen: QEffTrainingArgs, output: Path, validate: bool, tell: Callable[[Any], None], load: bool
    ) -> tuple[Any, Any]:
        """`refine`, once the output directory is there and nobody else writes to it."""
        if chosen.eval_prompts is not None:
            check_samples(self.config)
        manager = self._manager()
        check_teacher(self.config, manager.tokenizer, manager.home)
        data = self._data(manager)
        train, held = data.prepare_dataset()
        tell(data.audit)
        if held is None and (chosen.eval_strategy != "no" or chosen.eval_prompts is not None):
            name = "eval_prompts" if chosen.eval_prompts is not None else "eval_strategy"
            raise OptionError(
                f"{name} needs evaluation rows, and there are none: lower train_frac or leave {name} out."
            )
        if chosen.eval_prompts is not None:
            check_room(chosen, data, manager.positions)
        if self.config.task == "seq_classification":
            classes = manager.set_classes(data.label_names, data.pad_token_id)
            head = "a new head" if classes.new_head else "the checkpoint's head"
            what = "a score" if data.label_names is None else f"{len(classes.names)} classes"
            tell(f"{what} on {head}: {', '.join(classes.names[:20])}")
        asked = chosen.resume_from_checkpoint
        earlier, identity = self._begin(chosen, output, manager, data)
        if chosen.dry_run:
            return None, manager.tokenizer
        with bar(f"preparing {self.config.model_id}") as report:
            step = manager.prepare_for_training(report)
            parts = (("train", train), ("eval", held))
            train, held = (
                None
                if rows is None
                else completed(rows, split, manager, step, data.fingerprint, data.pad_token_id, report)
                for split, rows in parts
            )
        training = copy.copy(chosen)
        # A run shows what it gained; one that continues has shown it.
        training.eval_on_start = held is not None and not (asked or earlier)
        self.trainer = QEffTrainer(
            step,
            training,
            data,
            train,
            held,
            method=method_of(self.config),
            run_identity=identity,
            callbacks=self.callbacks,
            tokenizer=data.tokenizer,
            base_files=manager.base_files(),
        )
        if chosen.eval_prompts is not None and chosen.process_index == 0:
            self.trainer.add_callback(EvalSamples(manager, data, step, chosen, tell))
        if validate and not earlier and chosen.process_index == 0:
            self._prove(step, tell, output)
        if earlier and not asked:
            tell(f"continuing from {earlier[-1]} (overwrite_output_dir=True, --overwrite, starts anew).")
        began = _step_of(earlier[-1]) if earlier and not asked else -1
        self.trainer.train(resume_from_checkpoint=asked or bool(earlier))
        if began == self.trainer.state.global_step:
            tell(f"the run was finished at step {began} already: nothing was trained; raise max_steps to go on.")
        if held is not None and not self._just_evaluated(chosen):
            self.trainer.evaluate()
        self._save_final(output)
        if chosen.should_save and began != self.trainer.state.global_step:
            write_record(output, self.config, chosen, step, self.trainer.state.global_step)
            if is_ours(output / CARD):
                write_card(output)
        if isinstance(train, StreamRows) and train.left_out:
            reasons = ", ".join(f"{count:,} × {reason}" for reason, count in train.left_out.items())
            tell(f"rows that were left out of the stream: {reasons}")
        tell(f"saved to {output}")
        self._tuned, self._answers = output, None
        return (self.load_tuned() if load else None), data.tokenizer

    def _begin(
        self, chosen: QEffTrainingArgs, output: Path, manager: QEffModelManager, data: QEffDataManager
    ) -> tuple[list[Path], dict[str, Any]]:
        """Writes what is known before training, and says where it goes on.

        Returns:
            (complete checkpoints of an earlier run that is continued, what a resumed run must share with this one).
        """
        asked = chosen.resume_from_checkpoint
        if chosen.overwrite_output_dir and not asked and chosen.should_save and not chosen.dry_run:
            for path in checkpoints(output):
                shutil.rmtree(path)
        earlier = shared_checkpoints(output)
        identity: dict[str, Any] = {}
        if not chosen.dry_run:
            # Before anything is compiled or written: a directory of another run stays as it is.
            identity = {**manager.identity(), "data": data.fingerprint}
            resume_point(output, asked or bool(earlier), identity)
        if chosen.should_save:
            if not (asked or earlier or chosen.dry_run):
                forget_record(output)
            data.write_report(output)
            self.config.save(output / CONFIG_FILE)
            chosen.save(output / ARGUMENTS_FILE)
            write_settings(output / RUN_FILE, resolved(self.config, chosen), "the options of the run")
        return earlier, identity

    def generate(
        self,
        prompt: Any,
        max_length: int | None = None,
        *,
        max_new_tokens: int | None = None,
        return_full_text: bool = False,
        **settings: Any,
    ) -> Any:
        """Answers prompts: with the base model before `refine`, with the tuned one after it.

        Runs the compiled inference package; a trained adapter is bound to it as inputs.

        Args:
            prompt: a text, a list of texts, or chat messages; put into the form the model was trained on.
            max_length: prompt and answer together, in tokens; 100 when nothing is given.
            max_new_tokens: tokens of the answer; wins over ``max_length``.
            return_full_text: the prompt too.
            **settings: generation settings of `QEFFAutoModelForCausalLM.generate`.

        Returns:
            A text, or a list of texts for a list.
        """
        if isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt):
            return [
                self.generate(
                    p, max_length, max_new_tokens=max_new_tokens, return_full_text=return_full_text, **settings
                )
                for p in prompt
            ]
        if self._answers is None:
            manager = self._manager()
            self._answers = Answers(manager, self._data(manager), self._tuned)
        return self._answers.answer(
            prompt, max_length, max_new_tokens=max_new_tokens, return_full_text=return_full_text, **settings
        )

    def load_tuned(self) -> Any:
        """The tuned model in torch, float32: a ``PeftModel``, or a transformers model after full fine-tuning."""
        if self._tuned is None:
            raise OptionError("nothing was tuned yet: call refine() first.")
        reference: Any = self._manager().load_reference()
        if not (self._tuned / "adapter_config.json").is_file():
            assert self.trainer is not None
            named = dict(reference.named_parameters(remove_duplicate=False))
            for name, parameter in self.trainer._step.named_parameters():
                named[name].data.copy_(parameter.detach())
            return reference
        from peft import PeftModel

        with quiet():
            return PeftModel.from_pretrained(reference, str(self._tuned))

    # ------------------------------------------------------------------ parts

    def parts(self) -> tuple[QEffModelManager, QEffDataManager]:
        """The managers of model and data, made if needed; nothing is prepared yet."""
        manager = self._manager()
        return manager, self._data(manager)

    def _manager(self) -> QEffModelManager:
        if self.model_manager is None:
            args = self.args or QEffTrainingArgs()
            self.model_manager = QEffModelManager(
                self.config, args, transforms=self.transforms, cache_home_dir=self.cache_home_dir
            )
        return self.model_manager

    def _data(self, manager: QEffModelManager) -> QEffDataManager:
        if self.data_manager is None:
            self.data_manager = QEffDataManager(
                self.config, manager.tokenizer, self.custom_dataset_class, self.args, cache_home_dir=self.cache_home_dir
            )
        return self.data_manager

    def _just_evaluated(self, args: QEffTrainingArgs) -> bool:
        """Whether the weights as they are now were evaluated by the last step already."""
        assert self.trainer is not None
        state = self.trainer.state
        if args.load_best_model_at_end:  # the weights are an earlier step's
            return False
        return any("eval_loss" in row and row.get("step") == state.global_step for row in state.log_history)

    def _prepare_output(self, output: Path, args: QEffTrainingArgs) -> None:
        asked = args.resume_from_checkpoint
        if isinstance(asked, str):
            complete(Path(asked))
        there = next(path for path in (output, *output.absolute().parents) if path.exists())
        if not there.is_dir():
            what = "is a file" if there == output else f"cannot be made, for {there} is a file"
            raise OptionError(f"output_dir {output} {what}: choose a directory.")
        if args.should_save:
            with write_errors("the output directory", output):
                output.mkdir(parents=True, exist_ok=True)

    def _prove(self, step: Any, tell: Callable[[Any], None], output: Path) -> None:
        trainer, args = self.trainer, self.args
        assert trainer is not None
        assert args is not None
        assert self.model_manager is not None
        batch = next(iter(trainer.get_train_dataloader()))
        weighed = trainer.method.weigh(step, batch, trainer.method.count(batch))
        inputs = dict(weighed.inputs)
        if "weights" in inputs:
            inputs["weights"] = inputs["weights"] / weighed.normaliser
        reference = reference_model(self.model_manager, step)
        self.proof = compare_first_step(
            step,
            reference,
            inputs,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            quantity="loss" if weighed.measured is None else "weighted sum of log-probabilities",
        )
        del reference
        self.proof.save(output / PROOF_FILE)
        tell(str(self.proof))
        require(self.proof)

    def _save_final(self, output: Path) -> None:
        """The final (or best) weights at the top of ``output_dir``, complete or absent."""
        trainer = self.trainer
        assert trainer is not None
        if not trainer.args.should_save:
            return
        place = staging(output, "final")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        trainer.save_model(str(place), _internal_call=True)
        for path in sorted(place.iterdir()):
            path.replace(output / path.name)
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _gone_if_empty(output: Path) -> Iterator[None]:
    """Takes a directory that was made for this away again when an error leaves it empty."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty, or gone
            output.rmdir()
        raise


@contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Holds the output directory; raises OptionError when another run does."""
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OptionError(
            f"another run is writing to {output}: wait until it has ended, or choose another output_dir."
        ) from None
    try:
        yield
    finally:
        # While it is held: whoever opened it before finds it gone (filelock looks) and takes a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _print(message: Any) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(message, markup=False)


def _quiet(message: Any) -> None:
    del message

"""Texts at every evaluation: the prompts of ``eval_prompts``, answered by the adapter as it is at that step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from QEfficient.errors import ContextLengthError, OptionError
from QEfficient.finetune.answers import Answers
from QEfficient.finetune.arguments import QEffTrainingArgs
from QEfficient.finetune.callbacks import RowFile
from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data_manager import QEffDataManager
from QEfficient.finetune.model_manager import QEffModelManager
from QEfficient.finetune.trainer import save_trained

SAMPLES_FILE = "samples.jsonl"


def check_samples(config: QEffConfig) -> None:
    """OptionError when the run trains what no text can be sampled from; before anything is loaded."""
    if config.task != "generation":
        raise OptionError(f"eval_prompts needs a model that generates text, not task={config.task!r}: leave it out.")
    if config.lora_config is None:
        raise OptionError(
            "eval_prompts needs lora_config: an adapter is an input of the inference package, and any other trained "
            "weight would mean compiling it again at every evaluation; generate after the run instead."
        )
    if config.lora_config.get("modules_to_save"):
        raise OptionError(
            "eval_prompts does not go with lora_config.modules_to_save, for whole modules are no inputs of the "
            "inference package: leave one of them out, or generate after the run from the merged model."
        )


def check_room(args: QEffTrainingArgs, data: QEffDataManager, room: int | None) -> None:
    """ContextLengthError when a prompt and its answer need more than ``room`` tokens; None is no limit."""
    wanted = (args.eval_generation or {})["max_new_tokens"]
    for number, prompt in enumerate(args.eval_prompts or (), 1):
        length = len(data.prompt_ids(prompt))
        if room is not None and length + wanted - 1 > room:  # the last token is never stored
            raise ContextLengthError(
                f"prompt {number} of eval_prompts has {length} tokens, and {wanted} new ones do not fit into the "
                f"{room} of the model's context: shorten it, or lower max_new_tokens in eval_generation."
            )


class EvalSamples(TrainerCallback):
    """Writes ``samples.jsonl``: a row of step, prompt and text per prompt and evaluation, and shows them.

    The inference package is compiled when this is made, so that all that can go wrong does so before the run; an
    evaluation only swaps the adapter.

    Args:
        step: the compiled step that is trained.
        args: with ``eval_prompts``.
        say: receives what a person should see.

    Raises:
        UnsupportedModelError: the adapter is of a kind that a package has no inputs for.
        ContextLengthError: a prompt and its answer are longer than the package's context.
    """

    def __init__(
        self,
        manager: QEffModelManager,
        data: QEffDataManager,
        step: CompiledStep,
        args: QEffTrainingArgs,
        say: Callable[[str], None],
    ) -> None:
        self.step, self.say, self.rows = step, say, RowFile(args.logs_dir / SAMPLES_FILE)
        self.prompts, self.settings = list(args.eval_prompts or ()), dict(args.eval_generation or {})
        # The model reads the adapter's files again when it opens its package, so they live as long as it does.
        self._place = tempfile.TemporaryDirectory(prefix="qefficient-samples-")
        self._adapter = Path(self._place.name)
        save_trained(step, self._adapter)
        self.answers = Answers(manager, data, self._adapter)
        check_room(args, data, self.answers.ctx_len)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if state.is_world_process_zero:
            self.rows.begin(state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if not state.is_world_process_zero:
            return
        save_trained(self.step, self._adapter)
        self.answers.load_adapter(self._adapter)
        for prompt in self.prompts:
            text = self.answers.answer(prompt, **self.settings)
            self.rows.add({"step": state.global_step, "prompt": prompt, "text": text})
            self.say(f"step {state.global_step}, {prompt!r}: {text!r}")

"""Answers of a model that is trained or was: prompts in the form of the training data, run by the compiled package."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from QEfficient.engine.row_prefill import PREFILL
from QEfficient.errors import InputError
from QEfficient.finetune.data_manager import QEffDataManager
from QEfficient.finetune.model_manager import QEffModelManager
from QEfficient.targets.manifest import Manifest


class Answers:
    """Generates with the compiled inference model. An adapter is an input of it and can be changed.

    Args:
        tuned: directory with an adapter or a whole model; None is the base model.
    """

    def __init__(self, manager: QEffModelManager, data: QEffDataManager, tuned: Path | None) -> None:
        self.manager, self.data, self.tuned = manager, data, tuned
        # Answers were trained to end with the tokenizer's end token, which the model's own settings may not know.
        own = manager.source.generation_config().get("eos_token_id")
        known = own if isinstance(own, list) else [] if own is None else [own]
        end = data.tokenizer.eos_token_id
        self._ends = {} if end is None else {"eos_token_id": [*known, end]}

    @functools.cached_property
    def model(self) -> Any:
        """The inference model, compiled when it is first needed.

        Raises:
            UnsupportedModelError: the task generates no text, or the adapter is of a kind that a package has no
                inputs for.
        """
        return self.manager.inference(self.tuned)

    @property
    def ctx_len(self) -> int | None:
        """Most tokens of a prompt and its answer."""
        return Manifest.load(self.model.qpc_path).specialization(PREFILL).symbols["ctx_len"].exact

    def load_adapter(self, directory: Path) -> None:
        """Answers from now on with the adapter in ``directory``; nothing is compiled."""
        self.model.load_adapter(directory, self.model.active_adapter)

    def answer(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        max_length: int | None = None,
        *,
        max_new_tokens: int | None = None,
        return_full_text: bool = False,
        **settings: Any,
    ) -> str:
        """One answer, greedy unless the settings say otherwise; see `QEfficient.generate`."""
        ids = self.data.prompt_ids(prompt)
        if max_new_tokens is None:
            limit = 100 if max_length is None else max_length
            max_new_tokens = limit - len(ids)
            if max_new_tokens < 1:
                raise InputError(f"the prompt has {len(ids)} tokens and max_length={limit} leaves no room: raise it.")
        chosen = {"do_sample": False, **self._ends, **settings}
        out = self.model.generate(input_ids=np.asarray([ids], np.int64), max_new_tokens=max_new_tokens, **chosen)
        row = np.asarray(out)[0].tolist()
        shown = row if return_full_text else row[len(ids) :]
        return str(self.data.tokenizer.decode(shown, skip_special_tokens=True))

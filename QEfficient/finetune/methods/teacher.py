"""A teacher for distillation: its likeliest next tokens for every place of the data, or answers of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.data.encode import EncodeOptions, RowEncoder
from QEfficient.finetune.data.examples import Conversation, Example, Exchange
from QEfficient.finetune.data.loader import Rows
from QEfficient.finetune.data.token_rows import Item
from QEfficient.finetune.tokenizer_files import load_tokenizer
from QEfficient.models.hub import resolve
from QEfficient.models.source import CheckpointSource
from QEfficient.progress import Progress, silent
from QEfficient.store.digest import json_digest
from QEfficient.store.store import ArtifactStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "teacher"
_IDS, _LOGPROBS = "ids.npy", "logprobs.npy"
#: Prompts that the teacher answers at once.
_TOGETHER = 8


class TaughtRows:
    """Tokenized rows with what a teacher says of every token.

    ``rows[i]`` has ``"teacher_ids"`` int64 [L, K] and ``"teacher_logprobs"`` float32 [L, K] besides: the teacher's K
    likeliest tokens at the token's own column, with log-probabilities that sum to probability 1.
    """

    classes = False

    def __init__(self, rows: Rows, ids: np.ndarray, logprobs: np.ndarray) -> None:
        self.rows, self.ids, self.logprobs = rows, ids, logprobs
        self._offsets = _offsets(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        item = self.rows[index]
        index %= len(self.rows)
        span = slice(self._offsets[index], self._offsets[index + 1])
        teacher = {"teacher_ids": self.ids[span].astype(np.int64), "teacher_logprobs": np.array(self.logprobs[span])}
        return {**item, **teacher}

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, int64 ``[N]``."""
        return self.rows.lengths


def _offsets(rows: Rows) -> np.ndarray:
    """Where each row starts in a list of all tokens, and the end, int64 ``[N + 1]``."""
    return np.concatenate([[0], np.cumsum(rows.lengths)]).astype(np.int64)


class Teacher:
    """A model to learn from.

    Args:
        model_id: hub id or directory of a causal language model.
        store: where what it says is kept.
        trust_remote_code: run Python code that its repository brings.

    Raises:
        ModelLoadError: there is no such model.
    """

    def __init__(self, model_id: str, store: ArtifactStore, *, trust_remote_code: bool = False) -> None:
        self.model_id, self.store, self.trust_remote_code = model_id, store, trust_remote_code
        self.source = CheckpointSource(resolve(model_id), model_id, trust_remote_code)
        self.tokenizer = load_tokenizer(self.source.directory, trust_remote_code=trust_remote_code)

    def identity(self) -> dict[str, Any]:
        """What decides what the teacher says, as JSON."""
        return self.source.identity(self.store.memo)

    def require_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses a student that numbers its tokens in another way.

        Raises:
            OptionError: the vocabularies differ.
        """
        if self.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise OptionError(
                f"teacher_model={self.model_id!r} has another vocabulary than the student, so their probabilities "
                "cannot be compared: use distillation='response'."
            )

    def require_tokens(self, top: int) -> None:
        """Refuses to be asked for more tokens than there are.

        Raises:
            OptionError: there are fewer.
        """
        if top > len(self.tokenizer):
            raise OptionError(
                f"teacher_top={top} is more than the {len(self.tokenizer)} tokens the teacher knows: lower it."
            )

    def taught(self, rows: Rows, data: str, top: int, progress: Progress = silent) -> TaughtRows:
        """The rows with the teacher's ``top`` likeliest tokens at every place that is trained; cached.

        Args:
            data: identifies the rows.
        """

        def build(directory: Path) -> None:
            offsets = _offsets(rows)
            ids = np.zeros((offsets[-1], top), np.int32)
            logprobs = np.full((offsets[-1], top), -np.log(top), np.float32)
            model: Any = self.source.load("AutoModelForCausalLM").eval()
            for number in range(len(rows)):
                progress("the teacher's probabilities", number, len(rows))
                begin, end = offsets[number], offsets[number + 1]
                if end - begin > 1:
                    found = _likeliest(model, np.asarray(rows[number]["input_ids"]), top, len(self.tokenizer))
                    ids[begin + 1 : end], logprobs[begin + 1 : end] = found
            np.save(directory / _IDS, ids, allow_pickle=False)
            np.save(directory / _LOGPROBS, logprobs, allow_pickle=False)

        key = json_digest({"artefact": "teacher", "data": data, "top": top, "model": self.identity()})
        place = self.store.build(KIND, key, build, f"probabilities of {self.model_id}")
        return TaughtRows(rows, *(np.load(place / n, mmap_mode="r", allow_pickle=False) for n in (_IDS, _LOGPROBS)))

    def answers(
        self, examples: Sequence[Example], max_ctx_len: int, home: Path | None, progress: Progress = silent
    ) -> list[Example | None]:
        """The examples with the answers the teacher gives (greedily) in place of their last ones.

        None where an answer did not end within ``max_ctx_len``: to learn from it would be to stop in mid-sentence.

        Args:
            max_ctx_len: most tokens of a prompt, its answer and an end token.
            home: the cache of compiled models.

        Raises:
            InputError: an example that asks nothing, such as a plain text.
        """
        from QEfficient.models.auto import QEFFAutoModelForCausalLM

        encoder = RowEncoder(self.tokenizer, EncodeOptions())
        model = QEFFAutoModelForCausalLM.from_pretrained(
            str(self.source.directory), trust_remote_code=self.trust_remote_code, cache_home_dir=home
        )
        model.compile()
        found: list[Example | None] = []
        for begin in range(0, len(examples), _TOGETHER):
            progress("the teacher's answers", begin, len(examples))
            part = examples[begin : begin + _TOGETHER]
            texts = self._generate(model, [encoder.prompt_ids(_asking(e)) for e in part], max_ctx_len)
            found += [None if t is None else _answered(_asking(e), t) for e, t in zip(part, texts, strict=True)]
        return found

    def _generate(self, model: Any, prompts: list[list[int]], max_ctx_len: int) -> list[str | None]:
        width = max(map(len, prompts))
        most = max(max_ctx_len - width - 1, 1)
        ids, mask = np.zeros((len(prompts), width), np.int64), np.zeros((len(prompts), width), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        own = self.source.generation_config().get("eos_token_id")
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id}
        out = np.asarray(
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=most,
                do_sample=False,
                eos_token_id=sorted(ends - {None}),
            )
        )[:, width:]
        return [
            str(self.tokenizer.decode(row, skip_special_tokens=True)) if ends & set(row) else None
            for row in out.tolist()
        ]


def _likeliest(model: Any, ids: np.ndarray, top: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, log-probabilities) [L - 1, top] after every token but the last; heads may be wider than vocabularies."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1, :vocabulary].float()
    values, places = logits.topk(top, dim=-1)
    return places.numpy(), values.log_softmax(-1).numpy()


def _asking(example: Example) -> Exchange | Conversation:
    if not isinstance(example, Exchange | Conversation):
        raise InputError("a teacher answers prompts or conversations, and this row is neither.")
    return example


def _answered(example: Exchange | Conversation, text: str) -> Example:
    if isinstance(example, Exchange):
        return dataclasses.replace(example, completion=text)
    last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
    answer: Mapping[str, Any] = {"role": "assistant", "content": text}
    return dataclasses.replace(example, messages=(*example.messages[:last], dict(answer)))

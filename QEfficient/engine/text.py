"""Text generation from a package: the prompt form and Hugging Face's `generate` form over one token loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from QEfficient.engine.adapter_file import FILES as ADAPTER_FILES
from QEfficient.engine.adapters import ADAPTERS_DIR, AdaptedPackage, AdapterBank
from QEfficient.engine.arrays import integer_matrix, mask_matrix, same_kind
from QEfficient.engine.json_file import read_object
from QEfficient.engine.loop import Request, Timings, TokenLoop
from QEfficient.engine.package import LoadedPackage
from QEfficient.engine.results import GenerationMetrics, GenerationResult, peak_rss_mb
from QEfficient.engine.settings import GenerationSettings
from QEfficient.engine.stopping import Criterion, Stopping
from QEfficient.engine.streaming import ConsoleStreamer, StreamerAdapter
from QEfficient.errors import ContextLengthError, InputError, OptionError, PackageError
from QEfficient.targets.base import Session
from QEfficient.targets.manifest import Manifest

if TYPE_CHECKING:
    from QEfficient.engine.tokenizer import TextTokenizer

#: Tokens HF's generate makes when neither the call nor the model's configuration says how many.
HF_DEFAULT_NEW_TOKENS = 20


class CompiledCausalLM(AdaptedPackage, LoadedPackage):
    """A causal language model package."""

    def __init__(self, directory: Path, manifest: Manifest, session: Session) -> None:
        super().__init__(directory, manifest, session)
        self._loop = TokenLoop(session)
        self.generation_defaults = read_object(directory / "generation_config.json")
        #: Metrics of the last call, for the form that returns ids only.
        self.last_metrics: GenerationMetrics | None = None
        self._bank = AdapterBank(session)
        bundled = manifest.model.get("lora") or {}
        for name in bundled.get("adapters", ()):
            # Only files whose digests the manifest vouches for.
            if any(f"{ADAPTERS_DIR}/{name}/{file}" not in manifest.files for file in ADAPTER_FILES):
                raise PackageError(f"{directory} lacks the files of its adapter {name!r}: compile the package again.")
            self.load_adapter(directory / ADAPTERS_DIR / name, name)
        self.set_adapter(bundled.get("active"))

    def limit_chunk(self, tokens: int) -> None:
        self._loop.limit_chunk(tokens)

    @property
    def ctx_len(self) -> int:
        """Capacity of the KV state in tokens."""
        return self._loop.capacity

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *,
        prompts: str | Sequence[str] | None = None,
        messages: Sequence[Any] | None = None,
        tokenizer: object | None = None,
        generation_len: int | None = None,
        generation_config: object | Mapping[str, Any] | None = None,
        streamer: Any = None,
        stream: bool = False,
        stopping_criteria: Criterion | Sequence[Criterion] | None = None,
        adapter_name: str | None = None,
        **settings: Any,
    ) -> Any:
        """Generates text, in one of two forms.

        Prompt form: ``generate(prompts=[...])`` or ``generate(messages=[...])`` returns a `GenerationResult`.
        ``generation_len`` is the most tokens per prompt; None goes on to the end of the context.

        Hugging Face form: ``generate(input_ids=..., attention_mask=..., max_new_tokens=...)`` returns ids
        [batch, prompt + new] of the kind that came in (torch or numpy); rows that ended early are padded on the
        right. Prompts may be padded on the left (or right) as the mask says; without one the padding token is
        padding, unless it also ends a text.

        Args:
            tokenizer: used instead of the package's own; a transformers or tokenizers object.
            messages: one conversation (list of role/content dicts) or a list of conversations.
            generation_config: a transformers GenerationConfig or a dict.
            streamer: an HF streamer (``put``/``end``); one prompt at a time.
            stream: print the text as it is made; one prompt at a time.
            stopping_criteria: HF criteria, called for each row alone with (ids [1, length], None).
            adapter_name: a loaded adapter for this call only; None is the active one (`set_adapter`).
            **settings: fields of `GenerationSettings` (``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``,
                ``repetition_penalty``, ``seed``, ``eos_token_id``, ``stop_strings`` …); unknown ones are errors.

        Raises:
            InputError: empty, misshapen or contradictory input.
            ContextLengthError: a prompt, or a prompt and the tokens asked for, does not fit ``ctx_len``.
            OptionError: an unknown or unsupported setting.
        """
        given = [
            n for n, v in (("input_ids", input_ids), ("prompts", prompts), ("messages", messages)) if v is not None
        ]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise InputError(f"pass one of input_ids, prompts and messages, got {found}.")
        if stream and streamer is not None:
            raise InputError("pass either stream=True or a streamer, not both.")
        if generation_len is not None:
            if settings.get("max_new_tokens", generation_len) != generation_len:
                raise OptionError(
                    f"generation_len={generation_len} and max_new_tokens={settings['max_new_tokens']} mean the same "
                    "thing: give one."
                )
            settings["max_new_tokens"] = generation_len
        resolved = GenerationSettings.resolve(self.generation_defaults, generation_config, settings)
        # A length the caller wrote is kept or refused; one from the checkpoint's own defaults gives way to the context.
        asked = generation_config is not None or not {"max_new_tokens", "max_length"}.isdisjoint(settings)
        with self._bank.using(adapter_name):
            if input_ids is not None:
                return self._from_ids(
                    input_ids, attention_mask, resolved, asked, tokenizer, streamer, stream, stopping_criteria
                )
            if attention_mask is not None:
                raise InputError("attention_mask goes with input_ids, not with prompts.")
            text = self.tokenizer if tokenizer is None else _as_tokenizer(tokenizer)
            rows = self._encode(text, prompts, messages)
            if asked:
                limits = [self._limit(resolved, len(row), len(row), None, asked) for row in rows]
            else:
                limits = [self._loop.room(len(row)) for row in rows]
            requests, timings = self._run(rows, limits, resolved, text, streamer, stream, stopping_criteria, None)
            texts = [r.stopping.cut(0, text.decode(r.generated.tolist(), skip_special_tokens=True)) for r in requests]
            self.last_metrics = _metrics(requests, timings)
            ids = [request.generated.tolist() for request in requests]
            return GenerationResult(texts, ids, [str(r.reason) for r in requests], self.last_metrics)

    def _from_ids(
        self,
        input_ids: Any,
        attention_mask: Any,
        settings: GenerationSettings,
        asked: bool,
        tokenizer: object | None,
        streamer: Any,
        stream: bool,
        criteria: Criterion | Sequence[Criterion] | None,
    ) -> Any:
        ids = integer_matrix("input_ids", input_ids)
        pad = settings.pad_token_id
        if attention_mask is None and pad is not None and pad not in settings.eos_token_id:
            attention_mask = (ids != pad).astype(np.int64)  # as Hugging Face reads padding without a mask
        mask = mask_matrix(attention_mask, ids.shape)
        rows = [row[keep] for row, keep in zip(ids, mask, strict=True)]
        limits = [self._limit(settings, ids.shape[1], len(row), HF_DEFAULT_NEW_TOKENS, asked) for row in rows]
        text: TextTokenizer | None = None
        if tokenizer is not None:
            text = _as_tokenizer(tokenizer)
        elif settings.stop_strings or stream:
            text = self.tokenizer
        back = same_kind(input_ids)
        requests, timings = self._run(rows, limits, settings, text, streamer, stream, criteria, back)
        self.last_metrics = _metrics(requests, timings)
        new = max(len(request.generated) for request in requests)
        fill = settings.fill_id if settings.fill_id is not None else 0
        out = np.full((len(rows), ids.shape[1] + new), fill, dtype=np.int64)
        out[:, : ids.shape[1]] = ids
        for i, request in enumerate(requests):
            out[i, ids.shape[1] : ids.shape[1] + len(request.generated)] = request.generated
        return back(out)

    def _run(
        self,
        rows: list[np.ndarray],
        limits: list[int],
        settings: GenerationSettings,
        tokenizer: TextTokenizer | None,
        streamer: Any,
        stream: bool,
        criteria: Criterion | Sequence[Criterion] | None,
        to_user: Any,
    ) -> tuple[list[Request], Timings]:
        self._check_ids(rows)
        requests = [
            Request(
                number,
                row,
                limit,
                Stopping(
                    settings,
                    1,
                    len(row),
                    limit=limit,
                    tokenizer=tokenizer,
                    stopping_criteria=criteria,
                    to_user=to_user,
                ),
            )
            for number, (row, limit) in enumerate(zip(rows, limits, strict=True))
        ]
        if stream and tokenizer is not None:
            streamer = ConsoleStreamer(tokenizer)
        if streamer is None:
            return requests, self._loop.run(requests, settings)
        adapter = StreamerAdapter(streamer, batch_size=len(rows), to_user=to_user)
        adapter.prompt(rows[0][None, :])
        timings = self._loop.run(requests, settings, lambda request, token, ended: adapter.token(token))
        adapter.end()
        return requests, timings

    def _encode(
        self, tokenizer: TextTokenizer, prompts: str | Sequence[str] | None, messages: Sequence[Any] | None
    ) -> list[np.ndarray]:
        if messages is not None:
            if not isinstance(messages, list | tuple):
                raise InputError(f"messages must be a list of messages, got {type(messages).__name__}: pass a list.")
            if not messages:
                raise InputError("messages is empty: pass at least one message.")
            conversations = [messages] if isinstance(messages[0], Mapping) else list(messages)
            texts = [tokenizer.apply_chat_template(conversation) for conversation in conversations]
            # The template writes the special tokens itself.
            encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        else:
            if not isinstance(prompts, str | Iterable):
                raise InputError(f"prompts must be strings, got {type(prompts).__name__}: pass a string or a list.")
            texts = [prompts] if isinstance(prompts, str) else list(prompts)
            if not texts:
                raise InputError("prompts is empty: pass at least one prompt.")
            for number, text in enumerate(texts):
                if not isinstance(text, str):
                    raise InputError(f"prompt {number} is a {type(text).__name__}: prompts must be strings.")
                if not text:
                    raise InputError(f"prompt {number} is empty: pass some text.")
            encoded = [tokenizer.encode(text) for text in texts]
        for number, ids in enumerate(encoded):
            if not ids:
                raise InputError(f"prompt {number} has no tokens: pass some text.")
        return [np.asarray(ids, dtype=np.int64) for ids in encoded]

    def _limit(self, settings: GenerationSettings, counted: int, length: int, default: int | None, asked: bool) -> int:
        """Most new tokens of a row of ``length`` tokens; ``counted`` is what ``max_length`` counts (padding too)."""
        room = self._loop.room(length)
        wanted = settings.new_tokens(counted)
        if wanted is None:
            return min(default, room) if default is not None else room
        if wanted > room and asked:
            raise ContextLengthError(
                f"a prompt of {length} tokens and {wanted} new ones do not fit ctx_len={self.ctx_len}: ask for at most "
                f"{room} or compile with ctx_len={length + wanted}."
            )
        return min(wanted, room)

    def _check_ids(self, rows: list[np.ndarray]) -> None:
        vocabulary = self.manifest.model.get("vocab_size")
        for number, row in enumerate(rows):
            if vocabulary is not None and (row.min() < 0 or row.max() >= vocabulary):
                raise InputError(
                    f"row {number} holds token id {row.min() if row.min() < 0 else row.max()}, outside the model's "
                    f"vocabulary of {vocabulary}: was it made by another model's tokenizer?"
                )


def _as_tokenizer(tokenizer: object) -> TextTokenizer:
    from QEfficient.engine.tokenizer import as_tokenizer  # ids alone need none of it

    return as_tokenizer(tokenizer)


def _metrics(requests: list[Request], timings: Timings) -> GenerationMetrics:
    return GenerationMetrics(
        prompt_tokens=sum(len(request.prompt) for request in requests),
        generated_tokens=sum(len(request.generated) for request in requests),
        ttft_s=timings.first_token or 0.0,
        prefill_s=timings.prefill,
        decode_s=timings.decode,
        total_s=timings.total,
        decoded_tokens=timings.decoded,
        peak_rss_mb=peak_rss_mb(),
    )

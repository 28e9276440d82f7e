"""Generation settings: Hugging Face's names and merge order, every value checked, none dropped silently."""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean

#: Options of transformers' ``GenerationConfig`` and ``generate`` that change which tokens come out and are
#: not implemented here, by the values that mean "off"; None always does, and any other value is an error.
#: Where there are two, they are the defaults of different transformers versions, written out by checkpoints.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    name: off
    for off, names in (
        ((1,), "num_beams num_beam_groups num_return_sequences"),
        ((0,), "min_length no_repeat_ngram_size encoder_no_repeat_ngram_size"),
        ((0.0,), "epsilon_cutoff eta_cutoff penalty_alpha"),
        ((1.0,), "typical_p encoder_repetition_penalty guidance_scale"),
        ((False,), "remove_invalid_values token_healing is_assistant use_mtp synced_gpus"),
        (
            (False,),
            "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate",
        ),
        ((5, 20), "num_assistant_tokens"),
        (("heuristic", "constant"), "num_assistant_tokens_schedule"),
        ((0.4,), "assistant_confidence_threshold"),
        ((10,), "assistant_lookbehind target_lookbehind"),
        ((), "assistant_model assistant_tokenizer assistant_early_exit assistant_ensemble_weight"),
        ((), "prompt_lookup_num_tokens speculation_type max_time top_h bad_words_ids sequence_bias"),
        ((), "forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens"),
        ((), "exponential_decay_length_penalty watermarking_config dola_layers constraints force_words_ids"),
        ((), "logits_processor prefix_allowed_tokens_fn negative_prompt_ids negative_prompt_attention_mask"),
        ((), "custom_generate use_model_defaults"),
    )
    for name in names.split()
}

#: Options that only shape beam search. Checkpoints carry them beside ``num_beams``, where that one already
#: decides; asked for by a caller they would be ignored, so there they are errors.
_BEAM_ONLY: dict[str, tuple[Any, ...]] = {
    "early_stopping": (False,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
}

#: Keys that cannot change the tokens of a decoder-only package: metadata, memory and speed.
_HARMLESS = frozenset(
    name
    for names in (
        "transformers_version _from_model_config _commit_hash trust_remote_code bos_token_id",
        "decoder_start_token_id use_cache cache_implementation cache_config max_cache_len compile_config",
        "disable_compile prefill_chunk_size low_memory renormalize_logits continuous_batching_config",
        "max_matching_ngram_size",
    )
    for name in names.split()
)

#: What None switches an option to when a caller passes it, where that is not the field's default.
_OFF = {"top_k": 0}

#: Options that do nothing without sampling, with the values nobody needs to be told about.
_SAMPLING_ONLY: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 1.0),
    "top_k": (0, 50),
    "top_p": (1.0,),
    "min_p": (0.0,),
}


@dataclass(frozen=True)
class GenerationSettings:
    """How to choose tokens and when to stop; names, defaults and meanings are HF's ``GenerationConfig``'s.

    ``seed`` and ``ignore_eos`` are this library's own. Lengths are in tokens.

    Attributes:
        max_new_tokens: most tokens to generate; wins over ``max_length``.
        max_length: most tokens of prompt and generated text together.
        min_new_tokens: the end-of-sequence tokens are forbidden before this many.
        do_sample: draw tokens; otherwise (or with ``temperature=0``) the most likely one is taken.
        temperature, top_k, top_p, min_p: shape the distribution that is drawn from; ``top_k=0`` is off.
        repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely.
        seed: makes draws repeatable; row i's draws depend on the seed and on i only.
        eos_token_id: tokens that end a row; empty for none.
        pad_token_id: fills rows that ended; the first end-of-sequence token when None.
        stop_strings: texts that end a row.
        ignore_eos: generate on after an end-of-sequence token.

    Raises:
        OptionError: a value has the wrong type, is out of range or contradicts another.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, minimum, optional in (
            ("max_new_tokens", 1, True),
            ("max_length", 1, True),
            ("min_new_tokens", 0, False),
            ("top_k", 0, False),
            ("seed", 0, True),
            ("pad_token_id", 0, True),
        ):
            _check_integer(name, getattr(self, name), minimum, optional)
        for name in ("do_sample", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, got {_short(getattr(self, name))}.")
        _check_number("temperature", self.temperature, "at least 0 (0 is greedy)", lambda v: v >= 0)
        _check_number("top_p", self.top_p, "above 0 and at most 1", lambda v: 0 < v <= 1)
        _check_number("repetition_penalty", self.repetition_penalty, "above 0", lambda v: v > 0)
        if self.min_p is not None:
            _check_number("min_p", self.min_p, "from 0 to 1", lambda v: 0 <= v <= 1)
        if not isinstance(self.eos_token_id, tuple):
            raise OptionError(f"eos_token_id must be a token id or a list of them, got {_short(self.eos_token_id)}.")
        for value in self.eos_token_id:
            _check_integer("eos_token_id", value, 0, optional=False)
        if not isinstance(self.stop_strings, tuple) or not all(isinstance(s, str) and s for s in self.stop_strings):
            raise OptionError(f"stop_strings must be non-empty strings, got {_short(self.stop_strings)}.")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise OptionError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}: "
                "lower the one or raise the other."
            )

    @property
    def sampling(self) -> bool:
        """Whether tokens are drawn; False is greedy."""
        return self.do_sample and self.temperature > 0

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token ids that end a row: ``eos_token_id`` unless ``ignore_eos``."""
        return () if self.ignore_eos else self.eos_token_id

    @property
    def fill_id(self) -> int | None:
        """The id that fills ended rows, chosen as HF does: padding, else first end-of-sequence, else none."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else None

    def new_tokens(self, prompt_length: int) -> int | None:
        """Most tokens to generate after a prompt of this many tokens; None when neither limit is set.

        Raises:
            OptionError: ``max_length`` leaves no room for a single token.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return None
        if self.max_length <= prompt_length:
            raise OptionError(
                f"max_length={self.max_length} counts the prompt, which has {prompt_length} tokens already: "
                "raise it or use max_new_tokens."
            )
        return self.max_length - prompt_length

    @classmethod
    def resolve(
        cls,
        defaults: Mapping[str, Any],
        generation_config: object | Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> GenerationSettings:
        """Merges the package's settings, a ``generation_config`` and the caller's keywords; later ones win.

        None in the first two means "not set"; as a keyword it switches the option off, as in HF. A
        ``max_length`` from a later source also overrides an earlier ``max_new_tokens`` (HF would warn and
        ignore it); from the same source ``max_new_tokens`` wins. Negative pad and end ids mean none.

        Args:
            defaults: the package's ``generation_config`` as a dict; keys unknown to HF are ignored.
            generation_config: an HF ``GenerationConfig`` (anything with ``to_dict()``) or a mapping.
            overrides: only the keywords the caller wrote.

        Raises:
            OptionError: an unknown keyword, an HF option that is not supported, or a bad value.
        """
        asked = dict(overrides or {})
        given = _as_mapping(generation_config)
        _refuse_unknown(asked, known_elsewhere=())
        _refuse_unknown(given, known_elsewhere=defaults)
        merged: dict[str, tuple[Any, str]] = {}
        for origin, layer in (
            (" in the package's generation config", {k: v for k, v in defaults.items() if v is not None}),
            (" in generation_config", {k: v for k, v in given.items() if v is not None}),
            ("", asked),
        ):
            if layer.get("max_length") is not None and "max_new_tokens" not in layer:
                merged.pop("max_new_tokens", None)
            merged.update({key: (value, origin) for key, value in layer.items()})
        for key, (value, origin) in merged.items():
            neutral = _UNSUPPORTED.get(key) if origin else {**_UNSUPPORTED, **_BEAM_ONLY}.get(key)
            if neutral is not None and not _is_neutral(value, neutral):
                off = _short(neutral[-1] if neutral else None)
                raise OptionError(f"{key}={_short(value)}{origin} is not supported: leave it out or pass {key}={off}.")
        names = {f.name for f in dataclasses.fields(cls)}
        settings = cls(**{k: _normal(k, v) for k, (v, _) in merged.items() if k in names and not _is_unset(k, v)})
        if not settings.do_sample:
            _warn_without_sampling(asked)
        return settings


def _as_mapping(config: object | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """``config`` as a mapping; an object is asked for its ``to_dict()``; transformers stays out."""
    if config is None:
        return {}
    to_dict = getattr(config, "to_dict", None)
    found = to_dict() if callable(to_dict) and not isinstance(config, type) else config
    if not isinstance(found, Mapping):
        raise OptionError(
            f"generation_config must be a GenerationConfig or a dict, got {type(config).__name__}: pass one."
        )
    return found


def _refuse_unknown(layer: Mapping[str, Any], known_elsewhere: Iterable[str]) -> None:
    """Raises OptionError for a key that is neither ours nor HF's.

    A checkpoint's own extra keys (``known_elsewhere``) come back in its ``GenerationConfig`` and may pass.
    """
    fields = [f.name for f in dataclasses.fields(GenerationSettings)]
    known = {*fields, *_UNSUPPORTED, *_BEAM_ONLY, *_HARMLESS, *known_elsewhere}
    for name in layer:
        if name not in known:
            hint = did_you_mean(str(name), fields) or did_you_mean(str(name), known)
            raise OptionError(
                f"There is no generation option {name!r}.{hint or ' See GenerationSettings for the list.'}"
            )


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value is None or (isinstance(value, list | tuple | dict) and not value):
        return True
    return isinstance(value, bool | int | float | str) and value in neutral


def _is_unset(name: str, value: Any) -> bool:
    return value is None and name not in _OFF


def _normal(name: str, value: Any) -> Any:
    """``value`` in the field's own type: arrays become Python values, single ids and strings tuples."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return _OFF[name]
    if name == "stop_strings":
        value = (value,) if isinstance(value, str) else value
        return tuple(value) if isinstance(value, list) else value
    if name == "eos_token_id":
        ids = value if isinstance(value, list | tuple) else (value,)
        return tuple(dict.fromkeys(i for i in ids if not (_is_integer(i) and i < 0)))
    if name == "pad_token_id" and _is_integer(value) and value < 0:
        return None
    return value


def _warn_without_sampling(asked: Mapping[str, Any]) -> None:
    idle = [k for k, neutral in _SAMPLING_ONLY.items() if asked.get(k) is not None and asked[k] not in neutral]
    if idle:
        warnings.warn(f"{', '.join(idle)} has no effect on greedy decoding: pass do_sample=True as well.", stacklevel=4)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_integer(name: str, value: Any, minimum: int, optional: bool) -> None:
    if value is None and optional:
        return
    if not _is_integer(value) or value < minimum:
        raise OptionError(f"{name} must be an integer of at least {minimum}, got {_short(value)}.")


def _check_number(name: str, value: Any, wanted: str, accepts: Any) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not accepts(value):
        raise OptionError(f"{name} must be a number {wanted}, got {_short(value)}.")


def _short(value: object) -> str:
    return reprlib.repr(value)

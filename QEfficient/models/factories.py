"""transformers' Auto classes by name, and its loading errors as sentences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from QEfficient.errors import ModelLoadError, UnsupportedModelError

#: Our task's factory -> what to say when a model does not fit it.
_HINTS = {
    "AutoModelForCausalLM": "QEFFAutoModelForCausalLM takes decoder-only models; for embeddings use QEFFAutoModel",
    "AutoModel": "QEFFAutoModel takes text encoders and decoders",
    "AutoModelForSequenceClassification": "QEFFAutoModelForSequenceClassification takes classifiers",
}


def auto_class(factory: str, config: Any, name: str) -> Any:
    """The Auto class called ``factory``, after checking that it knows this configuration.

    Raises:
        UnsupportedModelError: it does not, or the model is an encoder given to the causal class.
    """
    auto = getattr(transformers, factory)
    known = type(config) in auto._model_mapping or factory.removeprefix("Auto") in str(getattr(config, "auto_map", ""))
    if not known and not (getattr(config, "auto_map", None) or {}).get(factory):
        raise UnsupportedModelError(
            f"{name} is a {config.model_type!r} model, which transformers cannot load as {factory}: {_HINTS[factory]}."
        )
    if factory == "AutoModelForCausalLM":
        architectures = getattr(config, "architectures", None) or []
        if getattr(config, "is_encoder_decoder", False) or (
            architectures and not any(_generates(a) for a in architectures)
        ):
            found = architectures[0] if architectures else config.model_type
            raise UnsupportedModelError(f"{name} holds {found}: {_HINTS[factory]}.")
    return auto


def _generates(architecture: str) -> bool:
    """Whether an architecture name is a causal language model's (…ForCausalLM, GPT2LMHeadModel, …)."""
    return any(part in architecture for part in ("CausalLM", "LMHead", "ForConditionalGeneration", "DecoderModel"))


@contextlib.contextmanager
def translate_load_errors(name: str) -> Iterator[None]:
    """Turns what transformers raises for unreadable or unknown models into a ModelLoadError."""
    try:
        yield
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ModelLoadError(f"{name} has a config.json that transformers refuses: {reason[:300]}") from error
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelLoadError(f"transformers cannot load {name}: {reason[:300]}") from error


@contextlib.contextmanager
def no_loading_bars() -> Iterator[None]:
    """Turns transformers' own progress bars off for the body; they would also be drawn into files and pipes."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()

"""Text to token ids and back for a package, as transformers does it, with `tokenizers` and `jinja2` only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tokenizers import AddedToken, Tokenizer

from QEfficient.engine.json_file import read_object
from QEfficient.errors import InputError, PackageError

#: HF's ``SPECIAL_TOKENS_ATTRIBUTES``: what a tokenizer's config may name and a chat template may use.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

#: Texts that are encoded at a time; what the library makes of a text is many times as large as its ids.
_BATCH = 1024

#: HF's ``clean_up_tokenization``: replacements, in order.
_CLEAN_UP = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)


@runtime_checkable
class TextTokenizer(Protocol):
    """What the engine asks of a tokenizer."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Text of one sequence of token ids."""

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text for a conversation; encode it with ``add_special_tokens=False``."""


class PackageTokenizer:
    """A tokenizer read from a package's files, without transformers.

    Attributes:
        special_tokens: name (``eos_token`` and so on) to text.
        chat_templates: name to Jinja source; ``default`` is the usual one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        clean_up: bool = False,
    ) -> None:
        # A tokenizer.json may carry the truncation and padding of its last use; HF applies them on request.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self._clean_up = clean_up
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        missing = [text for text in self.special_tokens.values() if text not in known]
        # As HF does: a token that only the config names is still never split and is skipped when decoding.
        self._tokenizer.add_special_tokens([AddedToken(t, special=True) for t in dict.fromkeys(missing)])

    @classmethod
    def from_directory(cls, directory: str | Path) -> PackageTokenizer:
        """Reads ``tokenizer.json`` and, where present, the config and chat-template files beside it.

        The folder is expected to be what ``save_pretrained`` writes: that puts into the files what a
        transformers class would otherwise add in code.

        Raises:
            InputError: there is no ``tokenizer.json``.
            PackageError: a file is corrupt.
        """
        root = Path(directory)
        path = root / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{root} has no tokenizer: pass input_ids, or a tokenizer with tokenizer=.")
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            if type(error) is not Exception:  # the Rust library raises just that for every malformed file
                raise
            raise PackageError(f"{path} cannot be read ({error}): make the package again.") from None
        config = read_object(root / "tokenizer_config.json")
        named = dict(config)
        if "added_tokens_decoder" not in config:  # HF reads the older file only then
            named.update(read_object(root / "special_tokens_map.json"))
        special = {name: text for name in _SPECIAL if (text := _token_text(named.get(name))) is not None}
        # HF skips clean-up for BPE, where it would eat real spaces.
        clean_up = bool(config.get("clean_up_tokenization_spaces")) and type(tokenizer.model).__name__ != "BPE"
        return cls(tokenizer, special, _read_templates(root, config), clean_up)

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, neither truncated nor padded; equals HF's ``tokenizer(text).input_ids``.

        Raises:
            InputError: ``text`` is not a string.
        """
        _check_text(text)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, several at a time.

        Raises:
            InputError: one of them is not a string.
        """
        for text in texts:
            _check_text(text)
        found: list[list[int]] = []
        for start in range(0, len(texts), _BATCH):
            found += [encoded.ids for encoded in self._tokenizer.encode_batch_fast(texts[start : start + _BATCH])]
        return found

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Text of one sequence of ids; equals HF's ``tokenizer.decode``.

        Raises:
            InputError: not a flat sequence of non-negative integers.
        """
        text = self._tokenizer.decode(_flat_ids(ids), skip_special_tokens=skip_special_tokens)
        if self._clean_up:
            for old, new in _CLEAN_UP:
                text = text.replace(old, new)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders a conversation as HF's ``apply_chat_template(..., tokenize=False)`` does.

        Args:
            messages: one conversation: dicts with ``role`` and ``content``.
            add_generation_prompt: end with the header of the assistant's answer.
            variables: what else the template may read (``tools``, ``documents``, ``enable_thinking``, ...).

        Raises:
            InputError: no chat template, not a conversation, or the template refuses it.
        """
        extra = dict(variables or {})
        name = "tool_use" if extra.get("tools") is not None and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            raise InputError("This package's tokenizer has no chat template: pass the prompt as plain text.")
        from QEfficient.engine.chat_template import render  # takes a while to import, and few prompts are chats

        values = {"tools": None, "documents": None, **self.special_tokens, **extra}
        return render(self.chat_templates[name], messages, {**values, "add_generation_prompt": add_generation_prompt})


class _HuggingFaceTokenizer:
    """Adapter for a transformers tokenizer the caller passes; transformers itself may not be imported."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def eos_token_id(self) -> int | None:
        return getattr(self._tokenizer, "eos_token_id", None)

    @property
    def bos_token_id(self) -> int | None:
        return getattr(self._tokenizer, "bos_token_id", None)

    @property
    def pad_token_id(self) -> int | None:
        return getattr(self._tokenizer, "pad_token_id", None)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        _check_text(text)
        return [int(i) for i in self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(_flat_ids(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        from QEfficient.engine.chat_template import conversation

        return str(
            self._tokenizer.apply_chat_template(
                conversation(messages),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **dict(variables or {}),
            )
        )


def as_tokenizer(tokenizer: object) -> TextTokenizer:
    """``tokenizer`` as a :class:`TextTokenizer`: ours, from ``tokenizers`` or from transformers.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(tokenizer, PackageTokenizer | _HuggingFaceTokenizer):
        return tokenizer
    if isinstance(tokenizer, Tokenizer):
        return PackageTokenizer(tokenizer)
    if callable(tokenizer) and hasattr(tokenizer, "decode") and not isinstance(tokenizer, type):
        return _HuggingFaceTokenizer(tokenizer)
    raise InputError(f"tokenizer must be one of transformers or tokenizers, got {type(tokenizer).__name__}: pass one.")


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise InputError(f"The text to encode must be a string, got {type(text).__name__}: encode one text at a time.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("The text holds half a character (a lone surrogate): pass valid UTF-8.") from None


def _flat_ids(ids: Any) -> list[int]:
    found = ids.tolist() if hasattr(ids, "tolist") else list(ids) if isinstance(ids, list | tuple | range) else None
    if isinstance(found, list) and all(isinstance(i, int | np.integer) and i >= 0 for i in found):
        return [int(i) for i in found]
    raise InputError("The ids to decode must be one flat sequence of token ids of at least 0: decode row by row.")


def _token_text(value: object) -> str | None:
    """The text of a special token: configs write it as a string or as an AddedToken's fields."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _read_templates(root: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Files win over the config, as in HF; the config holds one template or a list of named ones."""
    found = config.get("chat_template")
    templates = {"default": found} if isinstance(found, str) else {}
    if isinstance(found, list):
        templates = {entry["name"]: entry["template"] for entry in found}
    files = {"default": root / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((root / "additional_chat_templates").glob("*.jinja"))}
    read = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    return read or templates

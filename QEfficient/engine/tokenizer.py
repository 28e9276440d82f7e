"""Text to token ids and back for a package, as transformers does it, with `tokenizers` and `jinja2` only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from QEfficient.engine.json_file import read_object
from QEfficient.errors import InputError, PackageError

#: HF's ``SPECIAL_TOKENS_ATTRIBUTES``: what a tokenizer's config may name and a chat template may use.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

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
        values = {"tools": None, "documents": None, **self.special_tokens, **extra}
        values |= {"messages": _conversation(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return (
                _environment().from_string(self.chat_templates[name]).render({k: _plain(v) for k, v in values.items()})
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"The chat template does not accept these messages: {error}") from error


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
        return str(
            self._tokenizer.apply_chat_template(
                _conversation(messages),
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


def _environment() -> ImmutableSandboxedEnvironment:
    """Templates are untrusted code; set up as in transformers' ``utils/chat_template_utils.py`` (5.23)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "dict": _TemplateDict(),
        "namespace": _TemplateNamespace,
    }
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's tokens for training; here its body is rendered, no more."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateDict:
    """``dict`` for templates, without the attributes of the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _TemplateNamespace(jinja2.utils.Namespace):
    """``namespace`` without underscore names, as in transformers: they lead to Python's internals."""

    # No named self, as in jinja2, so that namespace(self=...) works.
    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store the attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(value: Any) -> Any:
    """Plain JSON data for templates: rich objects have methods the sandbox does not know to be dangerous."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(v) for v in value]
        return items if isinstance(value, list) else tuple(items)
    return f"<{type(value).__name__}>"


def _conversation(messages: Any) -> list[dict[str, Any]]:
    """A checked copy without None values, which templates would print, and reasoning under HF's names."""
    if not isinstance(messages, list | tuple) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise InputError("messages must be one conversation: a non-empty list of dicts with 'role' and 'content'.")
    chat = []
    for message in messages:
        kept = {k: v for k, v in message.items() if v is not None}
        reasoning = next((kept[k] for k in ("reasoning_content", "thinking", "reasoning") if k in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        chat.append(kept)
    return chat

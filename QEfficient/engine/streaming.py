"""Tokens to the caller as they come: whole pieces of text, Hugging Face streamers, the console."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from QEfficient.errors import InputError

if TYPE_CHECKING:
    from QEfficient.engine.tokenizer import TextTokenizer

#: What decoders put in place of bytes that are not (yet) a character.
_INCOMPLETE = "\ufffd"


class IncrementalDecoder:
    """Turns one row's tokens into pieces of text that never split a character.

    A piece is what a token adds to the text of the tokens before it, so the spaces and joins at word
    boundaries are those of decoding everything at once; only the last few tokens are decoded each time. (The
    method is that of text-generation-inference's ``decode_token``.)
    """

    def __init__(self, tokenizer: TextTokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        #: Tokens whose text is out; kept because they decide how the next ones join.
        self._shown = 0

    def push(self, ids: Iterable[int]) -> str:
        """Adds tokens and returns the text that is now certain; empty while a character is incomplete."""
        self._ids.extend(int(i) for i in ids)
        return self._advance(final=False)

    def flush(self) -> str:
        """Returns what is left, incomplete or not, and forgets everything."""
        rest = self._advance(final=True)
        self._ids, self._shown = [], 0
        return rest

    def _advance(self, final: bool) -> str:
        old = self._decode(self._ids[: self._shown])
        new = self._decode(self._ids)
        if len(new) <= len(old) or (new.endswith(_INCOMPLETE) and not final):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return new[len(old) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""


class StreamerAdapter:
    """Drives an HF-style streamer: ``put`` the prompt [1, n], ``put`` each new token [1], then ``end``."""

    def __init__(self, streamer: Any, batch_size: int = 1, to_user: Callable[[np.ndarray], Any] | None = None) -> None:
        """Checks that ``streamer`` can follow this request.

        Args:
            streamer: anything with ``put(value)`` and ``end()``.
            batch_size: rows in the request; HF streams one only.
            to_user: turns int64 arrays into what the caller works with; HF's own streamers take numpy too.

        Raises:
            InputError: it has no ``put`` or ``end``, or there is more than one row.
        """
        if not callable(getattr(streamer, "put", None)) or not callable(getattr(streamer, "end", None)):
            raise InputError(f"streamer must have the methods put and end, {type(streamer).__name__} has not.")
        if batch_size != 1:
            raise InputError(f"A streamer follows one row and there are {batch_size}: pass one prompt or no streamer.")
        self._streamer = streamer
        self._to_user = to_user or (lambda ids: ids)

    def prompt(self, ids: np.ndarray) -> None:
        """Hands over the prompt: int, [n] or [1, n]."""
        self._streamer.put(self._to_user(_one_row(ids).reshape(1, -1)))

    def token(self, token: int | np.ndarray) -> None:
        """Hands over one new token: an int or int [1]."""
        self._streamer.put(self._to_user(_one_row(token)))

    def end(self) -> None:
        """Says that no more tokens come."""
        self._streamer.end()


class ConsoleStreamer:
    """Prints text as it is generated; an HF-style streamer that needs no transformers."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        skip_prompt: bool = True,
        skip_special_tokens: bool = True,
        file: TextIO | None = None,
    ) -> None:
        """Prints to ``file``, by default standard output as it is when text arrives."""
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens)
        self._skip_prompt = skip_prompt
        self._file = file
        self._at_prompt = True

    def put(self, value: Any) -> None:
        """Takes token ids, [n] or [1, n]; the first call of a text is its prompt.

        Raises:
            InputError: more than one row.
        """
        ids = _one_row(value)
        prompt, self._at_prompt = self._at_prompt, False
        if not (prompt and self._skip_prompt):
            self._write(self._decoder.push(ids.tolist()))

    def end(self) -> None:
        """Prints the rest and a newline; the next text may begin."""
        self._write(self._decoder.flush() + "\n")
        self._at_prompt = True

    def _write(self, text: str) -> None:
        if text:
            print(text, end="", flush=True, file=self._file or sys.stdout)


def _one_row(ids: Any) -> np.ndarray:
    """``ids`` (int, [n], [1, n] or a single one) as int64 [n]."""
    found = np.asarray(ids, np.int64)
    if found.ndim > 1 and found.shape[0] != 1:
        raise InputError(f"A streamer follows one row and got {found.shape[0]}: stream one prompt at a time.")
    return found.reshape(-1)

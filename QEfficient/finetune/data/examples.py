"""What a row of data means, whatever its columns are called: the few kinds of example that can be encoded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

#: A chat message: ``role``, ``content`` and whatever else the template reads.
Message = dict[str, Any]


@dataclass(frozen=True)
class Exchange:
    """A prompt and its answer, as text.

    Attributes:
        prompt, completion: the two texts, never stripped.
        system: system message, if any.
        history: earlier (prompt, answer) pairs.
        joiner: what stands between prompt and answer where there is no chat template.
        plain: the two are one text as it is, which no chat template goes around.
    """

    prompt: str
    completion: str
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    joiner: str = ""
    plain: bool = False

    def conversation(self) -> Conversation:
        """The same as chat messages."""
        messages: list[Message] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for question, answer in self.history:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages += [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}]
        return Conversation(tuple(messages))


@dataclass(frozen=True)
class Conversation:
    """Chat messages; a message may carry ``weight`` (a number) or ``train`` (a bool) for its own tokens."""

    messages: tuple[Message, ...]
    tools: list[Any] | None = None

    def with_system(self, prompt: str) -> Conversation:
        """This conversation, opened by a system message unless it has one."""
        if any(message["role"] == "system" for message in self.messages):
            return self
        return dataclasses.replace(self, messages=({"role": "system", "content": prompt}, *self.messages))


@dataclass(frozen=True)
class Segments:
    """Texts that follow each other as they are, each with the weight of its tokens (0: not trained)."""

    pieces: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Document:
    """One text, all of it trained."""

    text: str


@dataclass(frozen=True)
class Tokenized:
    """Token ids with the weight of each as a label (0: not trained)."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Labeled:
    """A text, or two, and its class."""

    text: str
    label: int | str
    pair: str | None = None


@dataclass(frozen=True)
class Preference:
    """The better and the worse of two answers to one prompt."""

    chosen: Exchange | Conversation
    rejected: Exchange | Conversation


@dataclass(frozen=True)
class Judged:
    """An answer that is good or bad by itself."""

    answer: Exchange | Conversation
    desirable: bool


Example = Exchange | Conversation | Segments | Document | Tokenized | Labeled | Preference | Judged

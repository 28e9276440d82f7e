"""Chat templates: where the answers are in a rendered conversation, and templates for tokenizers without one."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.data.examples import Conversation, Message
from QEfficient.finetune.keywords import short
from QEfficient.finetune.settings_file import nearest_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Built-in templates, by the name ``chat_template`` calls them.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
        "+ '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{{ bos_token or '' }}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
        "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
}


def with_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that was chosen; a copy if that changes it.

    Args:
        tokenizer: left as it is.
        choice: None, ``"none"``, a name of ``TEMPLATES``, or the path of a Jinja file.

    Raises:
        OptionError: no such file, or not a template.
    """
    if choice is None:
        return tokenizer
    body: str | None = None
    if choice in TEMPLATES:
        body = TEMPLATES[choice]
    elif choice != "none":
        path = Path(choice).expanduser()
        if not path.is_file():
            names = ", ".join(map(repr, ("none", *TEMPLATES)))
            raise OptionError(
                f"chat_template must be {names} or a file, and there is no file {path}.{nearest_file(path)}"
            )
        body = path.read_text(encoding="utf-8")
        try:
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]).parse(
                # transformers' own tag, which marks what the model generates.
                body.replace("{% generation %}", "").replace("{% endgeneration %}", "")
            )
        except jinja2.TemplateSyntaxError as error:
            raise OptionError(f"{path} is not a Jinja template (line {error.lineno}: {error.message}).") from error
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = body
    return changed


class ChatRenderer:
    """Renders conversations with a tokenizer's template and finds the answers in the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @property
    def available(self) -> bool:
        """Whether the tokenizer has a template."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def shows_system(self) -> bool:
        """Whether the template renders system messages; one that refuses them says so when it is used."""
        question = {"role": "user", "content": "a"}
        try:
            return self.text([{"role": "system", "content": "b"}, question], None) != self.text([question], None)
        except InputError:
            return True

    def text(self, messages: Sequence[Message], tools: list[Any] | None, generation_prompt: bool = False) -> str:
        """A conversation as text.

        Raises:
            InputError: the template refuses it (roles it does not know, turns in another order).
            OptionError: the template writes an end token, and the tokenizer has none.
        """
        shown = [{k: v for k, v in message.items() if k not in ("weight", "train")} for message in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    shown, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        except (jinja2.TemplateError, TypeError) as error:
            if isinstance(error, jinja2.UndefinedError) and "'eos_token'" in str(error):
                raise OptionError(
                    "The chat template writes an end-of-sequence token and the tokenizer has none: name one as "
                    '"eos_token" in its tokenizer_config.json.'
                ) from error
            raise InputError(f"the chat template refuses it ({' '.join(str(error).split())}).") from error

    def answers(self, chat: Conversation) -> tuple[str, list[tuple[int, int, int]]]:
        """The rendered conversation, and for every assistant message (start, end, index of the message) in it.

        A span begins where the generation prompt ends, and ends where the next message begins, so it holds the
        answer and what the template writes after it. Where the template renders a conversation's beginning
        differently from the conversation (it hides earlier reasoning, say), the answer is found by its own text.

        Raises:
            InputError: the place of an answer is ambiguous.
        """
        messages, tools = chat.messages, chat.tools
        whole = self.text(messages, tools)
        spans: list[tuple[int, int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            floor = spans[-1][1] if spans else 0
            prompt = self.text(messages[:index], tools, generation_prompt=True) if index else ""
            through = whole if index + 1 == len(messages) else self.text(messages[: index + 1], tools)
            content = message["content"].strip()
            begins = whole.startswith(prompt) and len(prompt) >= floor
            if begins and whole.startswith(through) and content in whole[len(prompt) : len(through)]:
                spans.append((len(prompt), len(through), index))
                continue
            start, end = self._find(whole, content, len(prompt) if begins else floor)
            spans.append((len(prompt) if begins and not whole[len(prompt) : start].strip() else start, end, index))
        return whole, spans

    def _find(self, whole: str, content: str, floor: int) -> tuple[int, int]:
        """Where an answer is after ``floor``, with the end marker that follows it."""
        start = whole.find(content, floor)
        if not content or start < 0 or whole.find(content, start + 1) >= 0:
            raise InputError(
                f"the place of the answer {short(content)} in the chat template's text is ambiguous: pass another "
                "chat_template, or train_on='all'."
            )
        end = start + len(content)
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        marks = {token.content for token in added if token.special} | set(self._tokenizer.all_special_tokens)
        # Longest first: one mark may begin with another.
        pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) or "(?!)"
        found = re.compile(rf"\s*(?:{pattern})").match(whole, end)
        return start, found.end() if found else end

"""An example becomes token ids and a weight per token: prompts masked, one end token trained, answers never lost.

Labels are unshifted: the label of a position is the token there, and the step shifts. Masks are decided by position,
never by token id, because padding and the end token may be the same token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune.data.chat import ChatRenderer
from QEfficient.finetune.data.examples import (
    Conversation,
    Document,
    Example,
    Exchange,
    Judged,
    Labeled,
    Preference,
    Segments,
    Tokenized,
)
from QEfficient.finetune.data.tokens import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NO_END = (
    'The tokenizer has no end-of-sequence token, so answers would never end: name one as "eos_token" in its '
    "tokenizer_config.json."
)


@dataclass
class Encoded:
    """A row ready to be trained on.

    Attributes:
        ids: token ids ``[L]``.
        weights: weight of every token as a label ``[L]``; 0 is not trained.
        ends: positions of the tokens that end an answer.
        marks: what happened to the row: "prompt shortened", "turns left out", "answer cut", "text cut",
            "encoded apart".
        label: class, for classification.
        desirable: whether the answer is good, where rows say so.
    """

    ids: list[int]
    weights: list[float]
    ends: list[int] = field(default_factory=list)
    marks: set[str] = field(default_factory=set)
    label: int | str | None = None
    desirable: bool | None = None

    @property
    def trained(self) -> int:
        """Tokens that are trained: the first one has nothing before it to be predicted from."""
        return sum(1 for weight in self.weights[1:] if weight)


@dataclass(frozen=True)
class Dropped:
    """A row that is left out, why, and how many tokens it would have needed (0: more would not help)."""

    reason: str
    needs: int = 0


@dataclass(frozen=True)
class EncodeOptions:
    """The part of ``QEffConfig`` that decides ids and labels; see there."""

    max_ctx_len: int = 512
    train_on: str = "completion"
    truncation: str = "truncate"
    task: str = "generation"
    system_prompt: str | None = None


class RowEncoder:
    """Encodes examples one by one.

    Args:
        tokenizer: with the chat template to use, if any.
        options: lengths and which tokens are trained.

    Raises:
        OptionError: a system prompt that the chat template ignores.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> None:
        self.options = options
        self.tokens = TextEncoder(tokenizer)
        self.chat = ChatRenderer(tokenizer)
        if options.system_prompt is not None and self.chat.available and not self.chat.shows_system():
            raise OptionError(
                "The chat template ignores system messages, so system_prompt would have no effect: leave it out or "
                "choose another chat_template."
            )

    def rows(self, example: Example) -> list[Encoded] | Dropped:
        """What an example becomes: two rows for a preference, chosen and rejected, else one; see `encode`."""
        if isinstance(example, Preference):
            return self._preference(example)
        row = self.encode(example.answer if isinstance(example, Judged) else example)
        if isinstance(row, Dropped):
            return row
        if isinstance(example, Judged):
            row.desirable = example.desirable
        return [row]

    def encode(self, example: Example) -> Encoded | Dropped:
        """One example as ids and weights, at most ``max_ctx_len`` of them.

        Raises:
            InputError: the chat template refuses a conversation or hides an answer; ids outside the vocabulary.
            OptionError: the tokenizer lacks an end token or a chat template that the example needs.
        """
        if isinstance(example, Labeled):
            return self._labeled(example)
        if isinstance(example, Tokenized):
            return self._tokenized(example)
        if isinstance(example, Segments):
            return self._fit_tokens(self._pieces(example.pieces, end=False))
        if isinstance(example, Document):
            return self._document(example)
        assert isinstance(example, Exchange | Conversation)
        return self._fit_chat(self._prepared(example))[1]

    def _preference(self, example: Preference) -> list[Encoded] | Dropped:
        """Both answers after the same prompt, which is as long as the longer answer leaves room for."""
        pair = [self._prepared(answer) for answer in (example.chosen, example.rejected)]
        sizes = [len(self._render(answer).ids) for answer in pair]
        longer = sizes.index(max(sizes))
        prompt, first = self._fit_chat(pair[longer])
        second = self._fit_chat(_answered(prompt, pair[1 - longer]))[1]
        if isinstance(first, Dropped):
            return first
        if isinstance(second, Dropped):
            return second
        if first.ids == second.ids:  # cut off after the beginning they share
            return Dropped("answers equal after the cut")
        return [first, second] if longer == 0 else [second, first]

    def prompt_ids(self, example: Exchange | Conversation) -> list[int]:
        """Ids that inference must feed to ask what ``example`` asks: all before its last answer."""
        example = self._prepared(example)
        if isinstance(example, Exchange):
            return [*self.tokens.opening, *self.tokens.ids(_prompt_text(example))]
        last = max((i for i, m in enumerate(example.messages) if m["role"] == "assistant"), default=None)
        before = example.messages if last is None else example.messages[:last]
        return self.tokens.ids(self.chat.text(before, example.tools, generation_prompt=True))

    def _prepared(self, example: Exchange | Conversation) -> Exchange | Conversation:
        system = self.options.system_prompt
        if self.chat.available and not (isinstance(example, Exchange) and example.plain):
            chat = example.conversation() if isinstance(example, Exchange) else example
            return chat if system is None else chat.with_system(system)
        if isinstance(example, Conversation):
            raise OptionError(
                "The tokenizer has no chat template, which rows of messages need: set chat_template to 'chatml', "
                "'plain' or a Jinja file."
            )
        return example if system is None or example.system else dataclasses.replace(example, system=system)

    # ------------------------------------------------------------------------------------------------ by kind

    def _render(self, example: Exchange | Conversation) -> Encoded:
        if isinstance(example, Conversation):
            return self._conversation(example)
        pieces: list[tuple[str, float]] = []
        answers = [*(answer for _, answer in example.history), example.completion]
        prompts = _prompt_texts(example)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            pieces += [(prompt, 0.0), (answer, float(self._trains(index == len(answers) - 1)))]
        return self._pieces(pieces, end=True, opening=self.tokens.opening)

    def _conversation(self, chat: Conversation) -> Encoded:
        whole, spans = self.chat.answers(chat)
        last = spans[-1][2] if spans else -1
        pieces: list[tuple[str, float]] = []
        position = 0
        for start, end, index in spans:
            message = chat.messages[index]
            weight = float(message.get("weight", 1.0)) * message.get("train", True) * self._trains(index == last)
            pieces += [(whole[position:start], 0.0), (whole[start:end], weight)]
            position = end
        pieces.append((whole[position:], 0.0))
        return self._pieces(pieces, end=True)

    def _trains(self, last: bool) -> bool:
        return last or self.options.train_on != "last"

    def _document(self, example: Document) -> Encoded | Dropped:
        ids = [*self.tokens.opening, *self.tokens.ids(example.text)]
        row = Encoded(ids, [1.0] * len(ids))
        if self.tokens.eos is not None and (not ids or ids[-1] != self.tokens.eos):
            row.ends.append(len(ids))
            row.ids.append(self.tokens.eos)
            row.weights.append(1.0)
        limit = self.options.max_ctx_len
        if len(row.ids) <= limit:
            return _checked(row)
        if self.options.truncation in ("drop", "error"):
            return self._too_long(len(row.ids))
        return _checked(Encoded(row.ids[:limit], row.weights[:limit], [], {"text cut"}))

    def _tokenized(self, example: Tokenized) -> Encoded | Dropped:
        if min(example.ids) < 0 or max(example.ids) >= self.tokens.size:
            raise InputError(
                f"input_ids has {max(example.ids) if min(example.ids) >= 0 else min(example.ids)}, and the tokenizer's "
                f"vocabulary has {self.tokens.size} tokens: tokenize with the model's own tokenizer."
            )
        ids, weights = list(example.ids), list(example.weights)
        ends = [i for i, token in enumerate(ids) if weights[i] and token in self.tokens.special]
        return self._fit_tokens(Encoded(ids, weights, ends))

    def _labeled(self, example: Labeled) -> Encoded | Dropped:
        limit, truncation = self.options.max_ctx_len, self.options.truncation
        whole = self.tokens.tokenizer(example.text, example.pair, verbose=False)["input_ids"]
        if len(whole) > limit and truncation in ("drop", "error"):
            return self._too_long(len(whole))
        ids = whole
        if len(whole) > limit:
            # The tokenizer's own truncation keeps its closing token and shortens the longer of two texts.
            ids = self.tokens.tokenizer(example.text, example.pair, truncation=True, max_length=limit)["input_ids"]
        if not ids:
            return Dropped("empty")
        marks = {"text cut"} if len(whole) > limit else set()
        return Encoded(list(ids), [0.0] * len(ids), [], marks, example.label)

    # ------------------------------------------------------------------------------------------------ labels

    def _pieces(self, pieces: Sequence[tuple[str, float]], end: bool, opening: Sequence[int] = ()) -> Encoded:
        """Texts with weights as one row; with ``end``, every trained text ends in exactly one trained end token."""
        kept = [piece for piece in pieces if piece[0]]
        parts, apart = self.tokens.join([text for text, _ in kept])
        row = Encoded(list(opening), [0.0] * len(opening), marks={"encoded apart"} if apart else set())
        for (_, weight), part in zip(kept, parts, strict=True):
            masked = 0
            if weight and end:
                if self.tokens.eos is None and self.options.train_on != "all":
                    raise OptionError(NO_END)
                part, masked = self._ended(part)
                row.ends.append(len(row.ids) + len(part) - masked - 1)
            row.ids += part
            row.weights += [weight] * (len(part) - masked) + [0.0] * masked
        if end and self.options.train_on == "all":
            row.weights = [1.0] * len(row.ids)
        return row

    def _ended(self, part: list[int]) -> tuple[list[int], int]:
        """An answer's ids with an end token, and how many ids after that token the template adds (a line break)."""
        begin = len(part)
        while begin and (part[begin - 1] in self.tokens.special or not self.tokens.decode([part[begin - 1]]).strip()):
            begin -= 1
        for index in range(begin, len(part)):
            if part[index] in self.tokens.special:
                # Marks that touch belong together: the end of a tool call and the end of the turn.
                while index + 1 < len(part) and part[index + 1] in self.tokens.special:
                    index += 1
                return part, len(part) - index - 1
        return ([*part, self.tokens.eos] if self.tokens.eos is not None else part), 0

    # ------------------------------------------------------------------------------------------------ lengths

    def _fit_chat(self, example: Exchange | Conversation) -> tuple[Exchange | Conversation, Encoded | Dropped]:
        """What is left of the example within the limit, and its row: older turns go first, then the prompt from its
        left; the answer stays."""
        limit = self.options.max_ctx_len
        row = self._render(example)
        if len(row.ids) <= limit:
            return example, _checked(row)
        if self.options.truncation in ("drop", "error"):
            return example, self._too_long(len(row.ids))
        marks: set[str] = set()
        while (shorter := _without_oldest(example)) is not None and len(row.ids) > limit:
            example, row = shorter, self._render(shorter)
            marks.add("turns left out")
        for place in _places(example):
            while (excess := len(row.ids) - limit) > 0:
                shortened = self._shortened(_get(example, place), excess)
                if shortened == _get(example, place):
                    break
                example = _put(example, place, shortened)
                row = self._render(example)
                marks.add("prompt shortened")
        row.marks |= marks
        if len(row.ids) > limit and self.options.truncation == "truncate":
            return example, Dropped("answer too long", len(row.ids))
        return example, _checked(_cut(row, limit, "answer cut"))

    def _shortened(self, text: str, excess: int) -> str:
        ids = self.tokens.ids(text)
        # Half a character may be left at the cut.
        shorter = self.tokens.decode(ids[excess:]).lstrip("�") if excess < len(ids) else ""
        return shorter if len(shorter) < len(text) else text[1:]

    def _fit_tokens(self, row: Encoded) -> Encoded | Dropped:
        """Rows whose text is unknown: the untrained beginning is shortened from its left, after the first token."""
        limit = self.options.max_ctx_len
        if len(row.ids) <= limit:
            return _checked(row)
        if self.options.truncation in ("drop", "error"):
            return self._too_long(len(row.ids))
        prompt = next((i for i, weight in enumerate(row.weights) if weight), len(row.ids))
        # A row trained from its beginning is a text, of which any part can be learned.
        if prompt <= 1:
            return _checked(_cut(row, limit, "text cut"))
        answer = len(row.ids) - prompt
        if answer > limit - 1 and self.options.truncation == "truncate":
            return Dropped("answer too long", answer + 1)
        kept, _ = keep_answer(prompt, answer, limit)
        opening = 1 if row.ids[0] in self.tokens.special and kept else 0
        gone = prompt - kept
        ids = row.ids[:opening] + row.ids[gone + opening :]
        weights = row.weights[:opening] + row.weights[gone + opening :]
        ends = [end - gone for end in row.ends]
        return _checked(_cut(Encoded(ids, weights, ends, row.marks | {"prompt shortened"}), limit, "answer cut"))

    def _too_long(self, length: int) -> Dropped:
        return Dropped("longer than max_ctx_len", length if self.options.truncation == "error" else 0)


def keep_answer(prompt: int, answer: int, limit: int) -> tuple[int, int]:
    """How many tokens of a prompt and of its answer are kept within ``limit``: the answer first, one token for the
    prompt, then as much of the prompt as fits."""
    kept = min(answer, limit - 1)
    return min(prompt, limit - kept), kept


def _cut(row: Encoded, limit: int, mark: str) -> Encoded:
    """The first ``limit`` tokens; an end token that is cut off is not replaced: the text does not end there."""
    if len(row.ids) <= limit:
        return row
    ends = [end for end in row.ends if end < limit]
    return Encoded(row.ids[:limit], row.weights[:limit], ends, row.marks | {mark}, row.label)


def _checked(row: Encoded) -> Encoded | Dropped:
    if row.trained == 0:
        return Dropped("no trained token")
    return row


def _answered(prompt: Exchange | Conversation, answer: Exchange | Conversation) -> Exchange | Conversation:
    """The prompt of one example, which may be shortened by now, with the answer of another to the same prompt."""
    if isinstance(prompt, Exchange):
        assert isinstance(answer, Exchange)
        return dataclasses.replace(prompt, completion=answer.completion)
    assert isinstance(answer, Conversation)
    before, after = prompt.messages[: _answer_begins(prompt)], answer.messages[_answer_begins(answer) :]
    return dataclasses.replace(prompt, messages=(*before, *after))


def _answer_begins(chat: Conversation) -> int:
    """The message after the prompt's, whose messages are not trained."""
    return max((n for n, message in enumerate(chat.messages, start=1) if message.get("train") is False), default=0)


def _prompt_texts(example: Exchange) -> list[str]:
    """What stands before each answer, without a chat template."""
    opening = f"{example.system}\n\n" if example.system else ""
    texts = []
    for index, (question, _) in enumerate([*example.history, (example.prompt, "")]):
        texts.append((opening if index == 0 else "\n\n") + question + example.joiner)
    return texts


def _prompt_text(example: Exchange) -> str:
    answers = [*(answer for _, answer in example.history), ""]
    return "".join(a + b for a, b in zip(_prompt_texts(example), answers, strict=True))


def _without_oldest(example: Exchange | Conversation) -> Exchange | Conversation | None:
    """The example without its oldest turn, or None when only the last exchange is left."""
    if isinstance(example, Exchange):
        return dataclasses.replace(example, history=example.history[1:]) if example.history else None
    messages = example.messages
    first = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    later = [i for i, m in enumerate(messages) if m["role"] == "user" and i > first]
    # The last answer needs a question: stop at the last user message that an answer follows.
    if not later or not any(m["role"] == "assistant" for m in messages[later[0] :]):
        return None
    return dataclasses.replace(example, messages=(*messages[:first], *messages[later[0] :]))


#: Where a text is that may be shortened: a field of an exchange, or the index of a message.
_Place = str | int


def _places(example: Exchange | Conversation) -> list[_Place]:
    """Texts that may be shortened, in order: questions first, instructions to the system last."""
    if isinstance(example, Exchange):
        return ["prompt", *(["system"] if example.system else [])]
    last = max((i for i, m in enumerate(example.messages) if m["role"] == "assistant"), default=0)
    before = [i for i, m in enumerate(example.messages[:last]) if m["role"] != "assistant"]
    late = [i for i in before if example.messages[i]["role"] in ("system", "developer")]
    return [*(i for i in before if i not in late), *late]


def _get(example: Exchange | Conversation, place: _Place) -> str:
    if isinstance(example, Exchange):
        return str(getattr(example, str(place)))
    return str(example.messages[int(place)]["content"])


def _put(example: Exchange | Conversation, place: _Place, text: str) -> Exchange | Conversation:
    if isinstance(example, Exchange):
        return dataclasses.replace(example, **{str(place): text})  # type: ignore[arg-type]
    messages = list(example.messages)
    messages[int(place)] = {**messages[int(place)], "content": text}
    return dataclasses.replace(example, messages=tuple(messages))

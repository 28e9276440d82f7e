"""Readers of rows that say which answers are better: two to one prompt, or single ones judged good or bad."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from QEfficient.errors import InputError
from QEfficient.finetune.data.examples import Conversation, Exchange, Judged, Preference
from QEfficient.finetune.data.readers import from_sharegpt, message_pair, messages, sharegpt, string, system_of
from QEfficient.finetune.keywords import short

Row = Mapping[str, Any]

#: Columns of the better and the worse answer.
PAIRED = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
#: Columns that hold the messages before the answers, where there is no ``prompt``.
_HISTORIES = ("conversations", "messages")
#: What judges of single answers write.
_VERDICTS = {1: True, 0: False, "true": True, "false": False, "1": True, "0": False}


def preference(row: Row) -> Preference | None:
    """``chosen`` and ``rejected``, texts or messages, after ``prompt``, ``question`` or ``instruction``, ``input``.

    Without a prompt the two must begin alike, and what they share is the prompt; texts are then whole as they are.
    Messages that begin with the user's are whole conversations, whatever else the row has.
    """
    first, second = next(pair for pair in PAIRED if pair[0] in row and pair[1] in row)
    chosen, rejected = _answer(row[first]), _answer(row[second])
    if not chosen or not rejected:
        return None
    if chosen == rejected:
        raise InputError(f"{first} and {second} are the same, so there is nothing to prefer.")
    prompt = None if _whole(chosen) and _whole(rejected) else _prompt(row)
    shared = prompt is None
    if shared:
        prompt, (chosen, rejected) = _shared(first, second, chosen, rejected)
    pair = [_reply(row, prompt, name, answer, shared) for name, answer in ((first, chosen), (second, rejected))]
    return None if pair[0] is None or pair[1] is None else Preference(pair[0], pair[1])


def judged(row: Row) -> Judged | None:
    """A prompt, ``completion`` and ``label``, or a conversation and ``kto_tag``: true where the answer is good."""
    name = "kto_tag" if "kto_tag" in row else "label"
    value = row.get(name)
    if value is None:
        return None
    plain = value.strip().lower() if isinstance(value, str) else value
    verdict = _VERDICTS.get(plain) if isinstance(plain, Hashable) else None
    if verdict is None:
        raise InputError(f"{name} must be true or false, got {short(value)}.")
    if name == "kto_tag":
        answer: Exchange | Conversation | None = messages(row) if "messages" in row else sharegpt(row)
    else:
        answer = _reply(row, _prompt(row) or "", "completion", _answer(row["completion"]))
    return None if answer is None else Judged(answer, verdict)


def _answer(value: Any) -> Any:
    """A text, or a list of messages; a single message is a list of one. Columns of text hold messages as JSON."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", '{"'):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, Mapping):
        value = [value]
    return [from_sharegpt(item) for item in value] if isinstance(value, list | tuple) else value


def _whole(answer: Any) -> bool:
    """Whether these are messages with the prompt among them."""
    return isinstance(answer, list) and isinstance(answer[0], Mapping) and answer[0].get("role") in ("system", "user")


def _prompt(row: Row) -> Any:
    """A text or messages, which may be empty; None where the row has neither."""
    for name in ("prompt", "question"):
        if row.get(name) is not None:
            return _answer(row[name])
    if row.get("instruction"):
        extra = string("input", row.get("input") or "")
        return string("instruction", row["instruction"]) + (f"\n{extra}" if extra else "")
    if row.get("input"):
        return _answer(row["input"])
    return next((_answer(row[name]) for name in _HISTORIES if row.get(name)), None)


def _shared(first: str, second: str, chosen: Any, rejected: Any) -> tuple[Any, tuple[Any, Any]]:
    """What both begin with, and the rest of each."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        size = _alike(chosen, rejected)
        # A space belongs to the word after it, as tokenizers have it.
        size -= size > 0 and chosen[size - 1] == " "
    elif isinstance(chosen, list) and isinstance(rejected, list):
        size = _alike(chosen, rejected)
    else:
        raise InputError(f"{first} and {second} must both be texts or both be messages.")
    if not size or size in (len(chosen), len(rejected)):
        raise InputError(
            f"there is no prompt, and {first} and {second} do not begin with the same one: add a column prompt."
        )
    return chosen[:size], (chosen[size:], rejected[size:])


def _alike(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def _reply(row: Row, prompt: Any, name: str, answer: Any, whole: bool = False) -> Exchange | Conversation | None:
    if prompt in ("", []):
        return None
    if isinstance(prompt, list) or isinstance(answer, list):
        return message_pair("prompt", prompt, name, answer, row)
    if prompt is None or answer is None:
        return None
    prompt, answer = string("prompt", prompt), string(name, answer)
    if not prompt.strip() or not answer.strip():
        return None
    # As in prompt_completion: only a column called prompt is the beginning of the text that the answer goes on with.
    joined = whole or "prompt" in row
    return Exchange(prompt, answer, system_of(row), (), "" if joined else "\n", whole)

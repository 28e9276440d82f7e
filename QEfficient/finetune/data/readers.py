"""One reader per format: the values of a row, checked, as an example. None means a required value is empty."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from QEfficient.errors import InputError
from QEfficient.finetune.data.examples import (
    Conversation,
    Document,
    Exchange,
    Labeled,
    Message,
    Segments,
    Tokenized,
)
from QEfficient.finetune.keywords import is_number, short

Row = Mapping[str, Any]

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("observation", "tool", "ipython", "function", "function_response"), "tool"),
    "function_call": "function_call",
}


def tokenized(row: Row) -> Tokenized | None:
    """``input_ids`` with ``labels``, or with a 0/1 mask, or alone (all trained); padding at either end is removed."""
    ids = _integers("input_ids", row["input_ids"])
    if not ids.size:
        return None
    weights = _label_weights(row, ids)
    mask = row.get("attention_mask")
    if mask is not None:
        mask = _integers("attention_mask", mask, ids.size)
        real = np.flatnonzero(mask)
        if not real.size:
            return None
        keep = slice(real[0], real[-1] + 1)
        if len(np.unique(mask[keep])) != 1:
            raise InputError("attention_mask has a hole between real tokens; padding belongs at an end.")
        ids, weights = ids[keep], weights[keep]
    positions = row.get("position_ids")
    if positions is not None:
        positions = _integers("position_ids", positions)
        if positions[: ids.size].tolist() != list(range(ids.size)):
            raise InputError("position_ids do not count from 0, and positions are made here: leave them out.")
    return Tokenized(tuple(ids.tolist()), tuple(weights.tolist()))


def _label_weights(row: Row, ids: np.ndarray) -> np.ndarray:
    weights = np.ones(ids.size)
    if row.get("labels") is not None:
        labels = _integers("labels", row["labels"], ids.size)
        trained = labels != -100
        if not np.array_equal(labels[trained], ids[trained]):
            raise InputError("labels must be -100 or the token at the same place, unshifted.")
        weights = trained.astype(np.float64)
    for name in ("completion_mask", "assistant_masks"):
        if row.get(name) is not None:
            weights = weights * (_integers(name, row[name], ids.size) != 0)
    if row.get("weights") is not None:
        given = np.asarray(row["weights"], np.float64).reshape(-1)
        if given.size != ids.size or not np.isfinite(given).all():
            raise InputError(f"weights must be {ids.size} finite numbers, one per token.")
        weights = weights * given
    return weights


def _integers(name: str, value: Any, size: int | None = None) -> np.ndarray:
    """A list, array or tensor ``[L]`` or ``[1, L]`` as int64 ``[L]``."""
    value = _decoded(value)
    detach = getattr(value, "detach", None)
    try:
        array = np.asarray(detach().cpu() if callable(detach) else value)
    except ValueError as error:
        raise InputError(f"{name} is ragged.") from error
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.size == 0 and array.ndim <= 1:
        array = np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise InputError(f"{name} must be one list of integers, got {short(value)}.")
    if size is not None and array.size != size:
        raise InputError(f"{name} has {array.size} values and input_ids has {size}.")
    return array.astype(np.int64)


def segments(row: Row) -> Segments | None:
    """``segments: [{label: bool, text: str}]``, joined as written."""
    found = listed("segments", row["segments"])
    pieces = []
    for item in found:
        if not isinstance(item, Mapping) or not isinstance(item.get("label"), bool):
            raise InputError(f"a segment must have a text and a label of true or false, got {short(item)}.")
        pieces.append((string("text", item.get("text")), float(item["label"])))
    pieces = [piece for piece in pieces if piece[0]]
    return Segments(tuple(pieces)) if any(weight for _, weight in pieces) else None


def messages(row: Row) -> Conversation | None:
    """``messages: [{role, content}]``."""
    return conversation("messages", row["messages"], row)


def sharegpt(row: Row) -> Conversation | None:
    """``conversations: [{from, value}]``; items with role and content are read as messages."""
    found = [from_sharegpt(item) for item in listed("conversations", row["conversations"])]
    return conversation("conversations", found, row)


def from_sharegpt(item: Any) -> Any:
    if not isinstance(item, Mapping) or "from" not in item:
        return item
    role = ROLES.get(str(item["from"]).lower())
    if role is None:
        raise InputError(f"{short(item['from'])} is no known speaker (human, gpt, system, observation, …).")
    extra = {name: value for name, value in item.items() if name not in ("from", "value")}
    if role != "function_call":
        return {"role": role, "content": item.get("value"), **extra}
    call = item.get("value")
    try:
        call = json.loads(call) if isinstance(call, str) else call
    except ValueError as error:
        raise InputError(f"the function_call {short(call)} is not JSON.") from error
    calls = call if isinstance(call, list) else [call]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": entry} for entry in calls],
        **extra,
    }


def conversation(column: str, value: Any, row: Row) -> Conversation | None:
    found = [_message(column, item) for item in listed(column, value)]
    system = row.get("system") or row.get("system_prompt")
    if system and not any(message["role"] == "system" for message in found):
        found.insert(0, {"role": "system", "content": string("system", system)})
    answers = [message for message in found if message["role"] == "assistant"]
    if not any(message.get("content") or message.get("tool_calls") for message in answers):
        return None
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError("tools is not JSON.") from error
    return Conversation(tuple(found), tools)


def _message(column: str, item: Any) -> Message:
    if not isinstance(item, Mapping) or "role" not in item:
        raise InputError(f"an item of {column} must have role and content, got {short(item)}.")
    role = ROLES.get(str(item["role"]).lower())
    if role is None or role == "function_call":
        raise InputError(f"{short(item['role'])} is no known role (system, user, assistant, tool).")
    content = item.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part) for part in content)
    # A null content is what a message with tool calls has.
    content = "" if content is None and item.get("tool_calls") else string("content", content)
    message = {name: value for name, value in item.items() if value is not None or name == "content"}
    if "weight" in message and not is_number(message["weight"]):
        raise InputError(f"the weight of a message must be a number, got {short(message['weight'])}.")
    if "train" in message and not isinstance(message["train"], bool):
        raise InputError(f"train of a message must be true or false, got {short(message['train'])}.")
    return {**message, "role": role, "content": content}


def _text_part(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        return string("text", part.get("text"))
    raise InputError(f"a message has the part {short(part)}, and only text can be trained.")


def alpaca(row: Row) -> Exchange | None:
    """``instruction``, ``output`` or ``response``, and optionally ``input``, ``system``, ``history``."""
    answers = [row[name] for name in ("output", "response") if row.get(name)]
    if len(answers) > 1:
        raise InputError("it has both output and response; map one of them with columns.")
    instruction = string("instruction", row.get("instruction") or "")
    extra = string("input", row.get("input") or "")
    if not instruction.strip() or not answers or not string("output", answers[0]).strip():
        return None
    history = []
    for pair in listed("history", row.get("history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"history must hold [question, answer] pairs, got {short(pair)}.")
        history.append((string("history", pair[0]), string("history", pair[1])))
    prompt = f"{instruction}\n{extra}" if extra else instruction
    return Exchange(prompt, answers[0], system_of(row), tuple(history), "\n")


def prompt_completion(pairs_in: Callable[[Iterable[str]], list[tuple[str, str]]]) -> Callable[[Row], Any]:
    """A reader of prompt–completion rows: two strings, or two lists of messages."""

    def read(row: Row) -> Exchange | Conversation | None:
        first, second = pairs_in(row)[0]
        prompt, completion = row[first], row[second]
        if isinstance(prompt, list) or isinstance(completion, list):
            return message_pair(first, prompt, second, completion, row)
        if prompt is None or completion is None:
            return None
        prompt, completion = string(first, prompt), string(second, completion)
        if not prompt.strip() or not completion.strip():
            return None
        # prompt and completion are one text cut in two; the other pairs are fields that need something between.
        return Exchange(
            prompt, completion, system_of(row), (), "" if (first, second) == ("prompt", "completion") else "\n"
        )

    return read


def message_pair(first: str, prompt: Any, second: str, completion: Any, row: Row) -> Conversation | None:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    before = [{**_message(first, item), "train": False} for item in listed(first, prompt)]
    after = [_message(second, item) for item in listed(second, completion)]
    return conversation(second, [*before, *after], row) if before and after else None


def classification(row: Row) -> Labeled | None:
    """``text``, or ``sentence``, or ``sentence1`` and ``sentence2``, and ``label`` (int or string)."""
    name = next(name for name in ("text", "sentence", "sentence1") if name in row)
    label, pair = row.get("label"), row.get("sentence2") if name == "sentence1" else None
    if row[name] is None or label is None or not string(name, row[name]).strip():
        return None
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)  # CSV files and some databases hold numbers as text
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise InputError(f"label must be an integer or a string, got {short(label)}.")
    if isinstance(label, int) and label < 0:
        raise InputError(f"label must be at least 0, got {label}.")
    return Labeled(row[name], label, None if pair is None else string("sentence2", pair))


def document(row: Row) -> Document | None:
    """``text`` or ``content``."""
    value = row.get("text") if "text" in row else row.get("content")
    if value is None or not string("text", value).strip():
        return None
    return Document(value)


def system_of(row: Row) -> str | None:
    value = row.get("system") or row.get("system_prompt")
    return string("system", value) if value else None


def string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, got {short(value)}.")
    return value


def listed(name: str, value: Any) -> list[Any]:
    value = _decoded(value)
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise InputError(f"{name} must be a list, got {short(value)}.")
    return list(value)


def _decoded(value: Any) -> Any:
    """A list that a text column holds as JSON, as CSV files and databases do; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value

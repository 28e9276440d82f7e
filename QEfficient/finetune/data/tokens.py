"""Text to token ids for training: pieces joined so that the prompt's ids are the ones inference will feed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from QEfficient.errors import InputError
from QEfficient.finetune.keywords import short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Put before a text whose tokenizer adds a space at the start of everything, to get its ids without that space.
_ANCHORS = ("\n", "a", ":")


class TextEncoder:
    """A tokenizer as training uses it.

    Args:
        tokenizer: any Hugging Face tokenizer.

    Attributes:
        opening: ids the tokenizer itself puts before a text (``<s>``, ``[CLS]``).
        eos: the end-of-sequence id, or None.
        special: ids that are no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not callable(getattr(tokenizer, "encode", None)) or not callable(getattr(tokenizer, "decode", None)):
            raise InputError(f"The tokenizer must be able to encode and decode, got {short(tokenizer)}.")
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        self.eos: int | None = tokenizer.eos_token_id
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        self.opening = self._opening()

    def _opening(self) -> list[int]:
        plain = self.ids("a")
        framed = list(self.tokenizer.encode("a", add_special_tokens=True))
        for start in range(len(framed) - len(plain) + 1):
            if framed[start : start + len(plain)] == plain:
                return framed[:start]
        return []

    def ids(self, text: str) -> list[int]:
        """Ids of a text, with nothing around them."""
        return self._many([text])[0] if text else []

    def _many(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, which a fast tokenizer encodes side by side."""
        # verbose would warn of every text longer than the model's limit, which is shortened here.
        found: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included, spaces as they are."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def join(self, texts: Sequence[str]) -> tuple[list[list[int]], bool]:
        """Ids of texts that follow each other, one list per text, and whether they had to be encoded apart.

        The ids of the whole are used where those of every beginning are a prefix of them. Where a token would cross a
        boundary, the texts are encoded apart, because inference ends the prompt exactly there.
        """
        heads = list(itertools.accumulate(texts))
        if not heads:
            return [], False
        *begins, whole = self._many(heads)
        cuts = [0]
        for begin in begins:
            if len(begin) < cuts[-1] or whole[: len(begin)] != begin:
                return self._apart(texts, whole), True
            cuts.append(len(begin))
        cuts.append(len(whole))
        return [whole[a:b] for a, b in itertools.pairwise(cuts)], False

    def _apart(self, texts: Sequence[str], whole: list[int]) -> list[list[int]]:
        wanted = self.decode(whole)
        simple = [self.ids(text) for text in texts]
        if self.decode([i for part in simple for i in part]) == wanted:
            return simple
        # The tokenizer puts a space before every text it is given: only the first may have it.
        return [simple[0], *(self._continuation(text) for text in texts[1:])]

    def _continuation(self, text: str) -> list[int]:
        for anchor in _ANCHORS:
            start, both = self.ids(anchor), self.ids(anchor + text)
            if both[: len(start)] == start:
                return both[len(start) :]
        return self.ids(text)

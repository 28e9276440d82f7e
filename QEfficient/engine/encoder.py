"""Embeddings and classification from a package: any batch, any length, padding without effect on the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from QEfficient.engine.arrays import integer_matrix, mask_matrix, same_kind
from QEfficient.engine.buckets import CALL_TOKENS, buckets
from QEfficient.engine.package import LoadedPackage
from QEfficient.errors import InputError
from QEfficient.targets.manifest import Manifest, Specialization

_ACCEPTED = ("input_ids", "attention_mask", "token_type_ids")


def gives_vectors(manifest: Manifest) -> bool:
    """Whether each text becomes one vector, [batch, hidden], and not one per token."""
    return len(manifest.outputs[0].shape) == 2


class CompiledEncoder(LoadedPackage):
    """A package without state: token ids in, one array out."""

    #: Tokens of a call of `embed`, padding included.
    _call_tokens = CALL_TOKENS

    def limit_chunk(self, tokens: int) -> None:
        """Lets `embed` run texts of together at most so many tokens at a time, padding included."""
        self._call_tokens = tokens

    def generate(self, inputs: Mapping[str, Any] | None = None, **arrays: Any) -> dict[str, Any]:
        """Runs a batch.

        Args:
            inputs: tokenizer output: ``input_ids`` int [batch, seq], ``attention_mask`` and, where the model uses
                them, ``token_type_ids`` of the same shape; torch or numpy. The same names work as keywords.

        Returns:
            ``{"output": array}`` of the kind that came in: [batch, hidden] when pooled, else [batch, seq, hidden] with
            zeros at padding. Classification packages return ``{"logits": [batch, labels]}``.

        Raises:
            InputError: missing, misshapen or empty input, or longer than the package allows.
        """
        if inputs is not None and not isinstance(inputs, Mapping):
            raise InputError(f"pass the tokenizer's output (a mapping), got {type(inputs).__name__}.")
        given = {**(inputs or {}), **arrays}
        unknown = sorted(set(given) - set(_ACCEPTED))
        if unknown:
            raise InputError(f"unexpected input {unknown[0]!r}: this package takes {list(_ACCEPTED)}.")
        if "input_ids" not in given:
            raise InputError("input_ids is missing: pass the tokenizer's output.")
        ids = integer_matrix("input_ids", given["input_ids"])
        mask = mask_matrix(given.get("attention_mask"), ids.shape)
        types = self._token_types(given.get("token_type_ids"), ids.shape)
        vocabulary = self.manifest.model.get("vocab_size")
        if vocabulary is not None and (ids.min() < 0 or ids.max() >= vocabulary):
            raise InputError(f"input_ids holds an id outside the model's vocabulary of {vocabulary}.")
        back = same_kind(given["input_ids"])
        name = self.manifest.outputs[0].name
        return {name: back(self._batches(ids, mask, types))}

    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """Embeds texts with the package's own tokenizer, in batches of similar length, and keeps their order.

        Args:
            texts: strings; longer ones are cut to the package's longest input.
            batch_size: most texts of one call; fewer run together where that is faster.

        Returns:
            float32 [len(texts), hidden].

        Raises:
            InputError: no text, not strings, no batch size, or the package was compiled without pooling.
        """
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise InputError("texts must be a non-empty list of strings.")
        if not gives_vectors(self.manifest):
            raise InputError("this package gives one vector per token: compile with pooling='mean' (or another) first.")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
        limit = self.max_length
        return self.embed_ids([_truncated(ids, limit) for ids in self.tokenizer.encode_batch(texts)], batch_size)

    def embed_ids(self, encoded: Sequence[Sequence[int]], batch_size: int = 32) -> np.ndarray:
        """`embed` for texts that are token ids already, special tokens included, none of them empty."""
        # A package for one batch size pays for every row of it, used or not.
        fixed = self.manifest.specializations[0].symbols["batch_size"].minimum > 1
        groups = buckets([len(ids) for ids in encoded], batch_size, None if fixed else self._call_tokens)
        out: np.ndarray | None = None
        for chosen in groups:
            width = max(len(encoded[i]) for i in chosen)
            ids = np.zeros((len(chosen), width), np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, : len(encoded[i])] = encoded[i]
                mask[row, : len(encoded[i])] = 1
            result = self.generate(input_ids=ids, attention_mask=mask)[self.manifest.outputs[0].name]
            if out is None:
                out = np.empty((len(encoded), result.shape[1]), result.dtype)
            out[chosen] = result
        if out is None:
            raise InputError("texts must be a non-empty list of strings.")
        return out

    @property
    def max_length(self) -> int | None:
        """Longest input in tokens; None when there is no limit."""
        limits = [spec.symbols["seq_len"].maximum for spec in self.manifest.specializations]
        return None if None in limits else max(limit for limit in limits if limit is not None)

    def _token_types(self, value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
        takes = any(spec.name == "token_type_ids" for spec in self.manifest.inputs)
        if value is None:
            return np.zeros(shape, np.int64) if takes else None
        types = integer_matrix("token_type_ids", value)
        if types.shape != shape:
            raise InputError(f"token_type_ids has shape {types.shape}, input_ids {shape}: they must agree.")
        kinds = self.manifest.model.get("token_types")
        if takes and kinds and (types.min() < 0 or types.max() >= kinds):
            raise InputError(f"token_type_ids must be from 0 to {kinds - 1} for this model.")
        if not takes and types.any():
            raise InputError("this model has no token types, but token_type_ids holds values other than 0.")
        return types if takes else None

    def _batches(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None) -> np.ndarray:
        """Moves padding to the right, cuts it off, runs groups of rows, and puts token outputs back in place."""
        order = np.argsort(~mask, axis=1, kind="stable") if _left_padded(mask) else None
        if order is not None:
            ids, mask = np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)
            types = None if types is None else np.take_along_axis(types, order, 1)
        length = int(np.flatnonzero(mask.any(axis=0))[-1]) + 1
        spec = self._fit(length)
        width = spec.symbols["seq_len"].pad_to(length) or length
        rows = spec.symbols["batch_size"].maximum or len(ids)
        parts = []
        for start in range(0, len(ids), rows):
            part = slice(start, start + rows)
            parts.append(self._call(spec, ids[part], mask[part], None if types is None else types[part], width))
        out = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if out.ndim != 3:
            return out
        full = np.zeros((*ids.shape, out.shape[2]), out.dtype)
        full[:, :length] = out[:, :length] * mask[:, :length, None]
        if order is not None:
            unsorted = np.empty_like(full)
            np.put_along_axis(unsorted, order[:, :, None], full, 1)
            return unsorted
        return full

    def _call(
        self, spec: Specialization, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None, width: int
    ) -> np.ndarray:
        count = len(ids)
        rows = spec.symbols["batch_size"].pad_to(count) or count
        feeds = {
            "input_ids": _fit_to(ids, rows, width),
            "attention_mask": _fit_to(mask.astype(np.int64), rows, width),
        }
        feeds["attention_mask"][count:, 0] = 1  # rows that only fill a fixed batch must not be empty
        if types is not None:
            feeds["token_type_ids"] = _fit_to(types, rows, width)
        out = self.session.run(feeds, spec.name)[self.manifest.outputs[0].name]
        return out[:count].copy()

    def _fit(self, length: int) -> Specialization:
        """The smallest compiled length that holds ``length`` tokens."""
        for spec in self.manifest.specializations:
            if spec.symbols["seq_len"].pad_to(length) is not None:
                return spec
        raise InputError(
            f"an input of {length} tokens is longer than the {self.max_length} this package takes: shorten it"
            " (tokenizer(..., truncation=True)) or compile with a larger seq_len."
        )


class CompiledClassifier(CompiledEncoder):
    """A sequence classification package; `generate` returns ``{"logits": [batch, labels]}``."""

    @property
    def labels(self) -> dict[int, str]:
        """Label names by index."""
        return {int(k): str(v) for k, v in (self.manifest.model.get("labels") or {}).items()}


def _left_padded(mask: np.ndarray) -> bool:
    """Whether some row begins with padding and every row's tokens are contiguous."""
    return bool((~mask[:, 0]).any()) and bool((np.abs(np.diff(mask.astype(np.int8), axis=1)).sum(axis=1) <= 2).all())


def _fit_to(array: np.ndarray, rows: int, width: int) -> np.ndarray:
    """The array cut or zero-padded to [rows, width]."""
    if array.shape == (rows, width):
        return array
    out = np.zeros((rows, width), array.dtype)
    part = array[:, :width]
    out[: part.shape[0], : part.shape[1]] = part
    return out


def _truncated(ids: list[int], limit: int | None) -> list[int]:
    """Cuts to ``limit`` tokens, keeping the last one (the separator) as tokenizers do."""
    if limit is None or len(ids) <= limit:
        return ids
    return [*ids[: limit - 1], ids[-1]]

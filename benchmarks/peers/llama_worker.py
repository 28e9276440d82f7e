"""llama.cpp as a worker, through its C functions: nothing of the Python wrapper's own work is in the times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worker import Engine, Setup, main

#: The precision that llama.cpp's own quantizer makes of Q4_0: the embedding and the head keep more bits.
OWN = "q4_0-own"
#: ``LLAMA_FTYPE_MOSTLY_Q4_0`` of llama.h.
_MOSTLY_Q4_0 = 2


class LlamaEngine(Engine):
    distributions = ("llama-cpp-python", "gguf")

    @classmethod
    def convert(cls, source: Path, destination: Path, precision: str) -> Path:
        from to_gguf import convert

        made = destination.with_suffix(".gguf")
        if precision != OWN:
            return convert(source, made, precision)
        whole = convert(source, made.with_name(f"{made.stem}-f32.gguf"), "f32")
        try:
            _quantize(whole, made)
        finally:
            whole.unlink()
        return made

    def load(self, setup: Setup) -> None:
        import llama_cpp

        self.api = api = llama_cpp
        api.llama_backend_init()
        self._log = api.llama_log_callback(_quiet)
        api.llama_log_set(self._log, None)
        self.model = api.llama_model_load_from_file(setup.model.encode(), api.llama_model_default_params())
        # llama.cpp's defaults but for the sizes: prompts go in one piece, as its own benchmark feeds them.
        wanted = api.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = setup.context, setup.context, 512
        wanted.n_threads = wanted.n_threads_batch = setup.threads
        self.context = api.llama_init_from_model(self.model, wanted)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def first(self, ids: list[int]) -> int:
        self._clear()
        return self._step(ids)

    def next(self, token: int) -> int:
        return self._step([token])

    def _clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def _step(self, ids: list[int]) -> int:
        tokens = (self.api.llama_token * len(ids))(*ids)
        self._decode(self.api.llama_batch_get_one(tokens, len(ids)))
        return int(self._rows(self.api.llama_get_logits_ith(self.context, -1), 1)[0].argmax())

    def _decode(self, batch: Any) -> None:
        code = self.api.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def _rows(self, pointer: Any, count: int) -> Any:
        """Logits as a float32 array [count, vocabulary] over llama.cpp's own memory."""
        import numpy as np

        return np.ctypeslib.as_array(pointer, shape=(count * self.vocabulary,)).reshape(count, self.vocabulary)

    def logits(self, window: list[int], prompt: int) -> Any:
        self._clear()
        batch = self.api.llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for position, token in enumerate(window):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
            batch.logits[position] = 1
        try:
            self._decode(batch)
            return self._rows(self.api.llama_get_logits(self.context), len(window))[prompt:].copy()
        finally:
            self.api.llama_batch_free(batch)


def _quantize(source: Path, destination: Path) -> None:
    import ctypes

    import llama_cpp

    llama_cpp.llama_backend_init()
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype = _MOSTLY_Q4_0
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(destination).encode(), ctypes.byref(wanted))
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code}")


def _quiet(level: int, text: bytes, data: Any) -> None:
    """Takes llama.cpp's log, which would fill the error output with tensor names."""


if __name__ == "__main__":
    main(LlamaEngine)

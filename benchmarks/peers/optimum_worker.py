"""ONNX Runtime through Hugging Face Optimum as a worker: `ORTModelForCausalLM`, the usual way to run exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worker import Engine, Setup, main


class OptimumEngine(Engine):
    distributions = ("optimum-onnx", "onnxruntime", "transformers")

    @classmethod
    def convert(cls, source: Path, destination: Path, precision: str) -> Path:
        from optimum.onnxruntime import ORTModelForCausalLM

        ORTModelForCausalLM.from_pretrained(source, export=True, use_cache=True).save_pretrained(destination)
        return destination

    def load(self, setup: Setup) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        torch.set_num_threads(setup.threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setup.threads
        self.torch = torch
        self.model: Any = ORTModelForCausalLM.from_pretrained(setup.model, session_options=options, use_cache=True)

    def first(self, ids: list[int]) -> int:
        self.length, self.past = 0, None
        return self._step(ids)

    def next(self, token: int) -> int:
        return self._step([token])

    def _step(self, ids: list[int]) -> int:
        self.length += len(ids)
        mask = self.torch.ones((1, self.length), dtype=self.torch.int64)
        with self.torch.inference_mode():
            output = self.model(
                input_ids=self.torch.tensor([ids]), attention_mask=mask, past_key_values=self.past, use_cache=True
            )
        self.past = output.past_key_values
        return int(output.logits[0, -1].argmax())

    def logits(self, window: list[int], prompt: int) -> Any:
        ids = self.torch.tensor([window])
        with self.torch.inference_mode():
            output = self.model(input_ids=ids, attention_mask=self.torch.ones_like(ids), use_cache=True)
        return output.logits[0, prompt:].numpy()


if __name__ == "__main__":
    main(OptimumEngine)

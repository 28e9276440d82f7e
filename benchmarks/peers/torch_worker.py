"""Hugging Face transformers on torch as a worker: the plain loop over `DynamicCache` that `generate` runs."""

from __future__ import annotations

from typing import Any

from worker import Engine, Setup, main


class TorchEngine(Engine):
    distributions = ("torch", "transformers")

    def load(self, setup: Setup) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(setup.threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setup.precision]
        self.torch, self.cache_class = torch, DynamicCache
        self.model: Any = AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype).eval()

    def first(self, ids: list[int]) -> int:
        self.cache = self.cache_class(config=self.model.config)
        return self._step(ids)

    def next(self, token: int) -> int:
        return self._step([token])

    def _step(self, ids: list[int]) -> int:
        with self.torch.inference_mode():
            # Logits of the last position alone, as `generate` asks for them.
            output = self.model(self.torch.tensor([ids]), past_key_values=self.cache, logits_to_keep=1)
            return int(output.logits[0, -1].argmax())

    def logits(self, window: list[int], prompt: int) -> Any:
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([window])).logits[0, prompt:].float().numpy()


if __name__ == "__main__":
    main(TorchEngine)

"""This library as a worker: packages made by `compile`, run without torch."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from onnx_bytes import read_bytes
from worker import Engine, Message, Setup, main

#: Tokens of prompt and answer together that a package has room for, unless the environment says otherwise.
CONTEXT = "BENCH_CONTEXT"


class QEfficientEngine(Engine):
    distributions = ("qefficient", "onnxruntime", "numpy")

    @classmethod
    def convert(cls, source: Path, destination: Path, precision: str) -> Path:
        """Compiles into the cache that ``QEFF_HOME`` names, where an unchanged package is found again."""
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        options = weight_options(precision)
        if "CausalLM" in config["architectures"][0]:
            from QEfficient import QEFFAutoModelForCausalLM

            context = int(os.environ.get(CONTEXT, "640"))
            return QEFFAutoModelForCausalLM.from_pretrained(source).compile(ctx_len=context, progress=False, **options)
        from QEfficient import QEFFAutoModel

        return QEFFAutoModel.from_pretrained(source, pooling="mean").compile(progress=False, **options)

    @classmethod
    def weight_bytes(cls, model: Path) -> int:
        """What the program of the decode step reads; the one for prompts may have weights of its own."""
        manifest = json.loads((model / "manifest.json").read_text(encoding="utf-8"))
        programs = {spec["name"]: spec.get("program") for spec in manifest["specializations"]}
        return read_bytes(model / (programs.get("Decode") or manifest["program"]))

    def load(self, setup: Setup) -> None:
        import QEfficient

        self.package: Any = QEfficient.load(setup.model, threads=setup.threads)

    def generate(self, ids: list[int], new: int) -> Message:
        """As a user calls it; the engine's own clock says how long it was from the first token to the last."""
        import numpy as np

        prompt = np.array([ids], dtype=np.int64)
        began = time.perf_counter()
        out = self.package.generate(input_ids=prompt, max_new_tokens=new + 1, do_sample=False, ignore_eos=True)
        elapsed = time.perf_counter() - began
        decode = self.package.last_metrics.total_s - self.package.last_metrics.ttft_s
        return {"prefill_s": elapsed - decode, "decode_s": decode, "tokens": out[0, len(ids) :].tolist()}

    def first(self, ids: list[int]) -> int:
        return int(self.generate(ids, 0)["tokens"][0])

    def embed(self, texts: list[str], batch: int) -> Any:
        return self.package.embed(texts, batch_size=batch)

    def logits(self, window: list[int], prompt: int) -> Any:
        """The prompt as `generate` feeds it, the rest token by token through the session, which kept the state."""
        import numpy as np

        beginning = np.array([window[:prompt]], dtype=np.int64)
        self.package.generate(input_ids=beginning, max_new_tokens=1, do_sample=False, ignore_eos=True)
        rows = []
        for position, token in enumerate(window[prompt:], start=prompt):
            feeds = {"input_ids": np.array([[token]]), "position_ids": np.array([[position]])}
            rows.append(self.package.session.run(feeds, "Decode")["logits"][0, -1].copy())
        return np.stack(rows)


def weight_options(precision: str) -> dict[str, Any]:
    """Arguments of `compile` for a weight precision."""
    return {} if precision == "fp32" else {"weights": precision}


if __name__ == "__main__":
    main(QEfficientEngine)

"""onnxruntime-genai as a worker: files from its own model builder, run by its generator."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from onnx_bytes import read_bytes
from worker import Engine, Setup, main


class GenAiEngine(Engine):
    distributions = ("onnxruntime-genai", "onnxruntime", "onnx-ir")

    @classmethod
    def convert(cls, source: Path, destination: Path, precision: str) -> Path:
        """Runs the builder with its defaults; a tied embedding and head stay one tensor."""
        module = "onnxruntime_genai.models.builder"
        with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
            where = ["-i", str(source), "-o", str(destination), "-c", scratch]
            subprocess.run([sys.executable, "-m", module, *where, "-p", precision, "-e", "cpu"], check=True)
        return destination

    @classmethod
    def weight_bytes(cls, model: Path) -> int:
        return read_bytes(model / "model.onnx")

    def load(self, setup: Setup) -> None:
        import onnxruntime_genai

        self.genai, self.capacity = onnxruntime_genai, setup.context
        config = onnxruntime_genai.Config(setup.model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": setup.threads}}}}))
        self.model = onnxruntime_genai.Model(config)
        self.generator: Any = None

    def first(self, ids: list[int]) -> int:
        self._start(ids)
        return self.next(0)

    def next(self, token: int) -> int:
        """The generator remembers which token it chose last."""
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def _start(self, ids: list[int]) -> None:
        import numpy as np

        self.generator = None  # frees the last one's state before the next one allocates its own
        settings = self.genai.GeneratorParams(self.model)
        # A least length as long as the context keeps an end-of-sequence token from ending the generation.
        settings.set_search_options(max_length=self.capacity, min_length=self.capacity, do_sample=False)
        self.generator = self.genai.Generator(self.model, settings)
        self.generator.append_tokens(np.array([ids], dtype=np.int32))

    def logits(self, window: list[int], prompt: int) -> Any:
        self._start(window)
        return self.generator.get_output("logits")[0, prompt:]


if __name__ == "__main__":
    main(GenAiEngine)

"""OpenVINO GenAI as a worker: exported and quantized with optimum-intel, run by `openvino_genai.LLMPipeline`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker import Engine, Message, Setup, main, tree_bytes

#: Inputs that share a scale; narrower rows take the largest size that divides them.
GROUP_SIZES = (128, 64, 32)
#: Weight precision -> arguments of ``optimum-cli export openvino``. ``--all-layers`` gives the embedding and the head
#: four bits too, as the other engines' int4 files here have them; by default they would stay int8.
WEIGHT_ARGUMENTS = {
    "fp32": ["--weight-format", "fp32"],
    "int8": ["--weight-format", "int8", "--sym"],
    "int4": ["--weight-format", "int4", "--sym", "--ratio", "1.0", "--all-layers"],
}


class OpenVinoEngine(Engine):
    distributions = ("openvino-genai", "openvino", "optimum-intel", "nncf")

    @classmethod
    def convert(cls, source: Path, destination: Path, precision: str) -> Path:
        arguments = [*WEIGHT_ARGUMENTS[precision]]
        if precision == "int4":
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            arguments += ["--group-size", str(group_size(config["hidden_size"], config["intermediate_size"]))]
        tool = Path(sys.executable).with_name("optimum-cli")
        task = ["--task", "text-generation-with-past", "--model", str(source)]
        subprocess.run([str(tool), "export", "openvino", *task, *arguments, str(destination)], check=True)
        return destination

    @classmethod
    def weight_bytes(cls, model: Path) -> int:
        return tree_bytes(model / "openvino_model.bin")

    def load(self, setup: Setup) -> Message:
        import openvino
        import openvino_genai

        self.genai, self.setup = openvino_genai, setup
        self.pipeline = openvino_genai.LLMPipeline(setup.model, "CPU", INFERENCE_NUM_THREADS=setup.threads)
        self.plain: Any = None
        computes_in = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
        return {"float_bytes": computes_in.size}

    def generate(self, ids: list[int], new: int) -> Message:
        """One greedy generation; a streamer notes when tokens come."""
        import numpy as np
        import openvino

        times: list[float] = []
        genai = self.genai

        class Clock(genai.StreamerBase):  # type: ignore[name-defined]
            def write(self, token: Any) -> Any:
                times.append(time.perf_counter())
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        settings = genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos = new + 1, True
        settings.do_sample, settings.apply_chat_template = False, False
        prompt = np.array([ids], dtype=np.int64)
        began = time.perf_counter()
        inputs = genai.TokenizedInputs(openvino.Tensor(prompt), openvino.Tensor(np.ones_like(prompt)))
        tokens = self.pipeline.generate(inputs, settings, Clock()).tokens[0]
        ended = time.perf_counter()
        first = times[0] if new else ended
        return {"prefill_s": first - began, "decode_s": ended - first, "tokens": [int(token) for token in tokens]}

    def first(self, ids: list[int]) -> int:
        return int(self.generate(ids, 0)["tokens"][0])

    def logits(self, window: list[int], prompt: int) -> Any:
        """From the exported model itself: the pipeline keeps logits to itself."""
        import numpy as np

        if self.plain is None:
            import openvino

            path = str(Path(self.setup.model) / "openvino_model.xml")
            threads = {"INFERENCE_NUM_THREADS": self.setup.threads}
            self.plain = openvino.Core().compile_model(path, "CPU", threads).create_infer_request()
        self.plain.reset_state()
        ids = np.array([window], dtype=np.int64)
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(window))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.plain.infer(feeds)
        return self.plain.get_tensor("logits").data[0, prompt:].astype(np.float32)


def group_size(*widths: int) -> int:
    """The largest group that divides every width; OpenVINO refuses others."""
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise ValueError(f"rows of {widths} values have no group size in {GROUP_SIZES}")


if __name__ == "__main__":
    main(OpenVinoEngine)

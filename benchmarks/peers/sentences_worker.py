"""sentence-transformers as a worker, with its torch and its ONNX backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worker import Engine, Setup, main

#: Precision -> the ONNX file inside the model directory; the plain export has the first name.
FILES = {"onnx": "onnx/model.onnx", "onnx-int8": "onnx/model_qint8_avx512_vnni.onnx"}


class SentencesEngine(Engine):
    distributions = ("sentence-transformers", "optimum-onnx", "onnxruntime", "transformers", "torch")

    @classmethod
    def convert(cls, source: Path, destination: Path, precision: str) -> Path:
        """The library's own export, and for int8 its own dynamic quantization for processors with VNNI."""
        if precision == "torch":
            return source
        from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

        model = SentenceTransformer(
            str(source), backend="onnx", model_kwargs={"export": True, "provider": "CPUExecutionProvider"}
        )
        model.save_pretrained(str(destination))
        if precision == "onnx-int8":
            export_dynamic_quantized_onnx_model(model, "avx512_vnni", str(destination))
            (destination / FILES["onnx"]).unlink()
        return destination

    def load(self, setup: Setup) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(setup.threads)
        if setup.precision == "torch":
            self.model: Any = SentenceTransformer(setup.model, device="cpu")
            return
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setup.threads
        arguments = {
            "file_name": FILES[setup.precision],
            "provider": "CPUExecutionProvider",
            "session_options": options,
        }
        self.model = SentenceTransformer(setup.model, backend="onnx", model_kwargs=arguments)

    def embed(self, texts: list[str], batch: int) -> Any:
        return self.model.encode(texts, batch_size=batch, show_progress_bar=False)


if __name__ == "__main__":
    main(SentencesEngine)

"""ONNXModel: a graph one can export, modify, validate and save, as the documents of refine name it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from QEfficient.errors import OptionError, TransformError
from QEfficient.onnx_io import load_model, save_model, weight_files
from QEfficient.progress import silent
from QEfficient.store.files import place_file
from QEfficient.transforms.onnx.queue import TransformLike, resolve, run_queue


class ONNXModel:
    """A training graph on disk or in the making.

    Args:
        path: a ``model.onnx``; its weights lie beside it and are read when needed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise OptionError(f"{path} does not exist: pass a model.onnx, or use ONNXModel.export.")
        self.model: ir.Model = load_model(self.path)
        self.log: list[dict[str, Any]] = []
        self._workspace = tempfile.TemporaryDirectory(prefix="qefficient-onnx-")

    @classmethod
    def export(cls, module: Any, path: str | Path, *, trainable: Sequence[str] | None = None) -> Self:
        """Captures the training step of a transformers or PEFT model and writes it to ``path`` (a new directory).

        Standard domain only, opset 21, dynamic ``batch_size``, ``seq_len`` and ``rows``.

        Raises:
            ExportError, UnsupportedModelError, OptionError: as their names say.
        """
        from QEfficient.finetune.step_model import from_module
        from QEfficient.finetune.step_package import export_step
        from QEfficient.models.base import check_destination, copy_entry
        from QEfficient.store.home import cache_home
        from QEfficient.store.store import ArtifactStore

        check_destination(Path(path))
        _, directory = export_step(from_module(module, trainable), ArtifactStore(cache_home(None)))
        return cls(copy_entry(directory, Path(path)) / "model.onnx")

    def modify(self, transforms: Sequence[TransformLike]) -> list[tuple[str, bool]]:
        """Runs transforms in order; returns (name, whether it changed anything) for each.

        Raises:
            TransformError: one failed.
        """
        place = Path(tempfile.mkdtemp(dir=self._workspace.name))
        records = run_queue(self.model, resolve(list(transforms)), place, silent)
        self.log += records
        return [(record["name"], bool(record["modified"])) for record in records]

    def validate(
        self,
        inputs: Mapping[str, np.ndarray],
        expected: Mapping[str, np.ndarray],
        tolerance: float = 1e-4,
    ) -> dict[str, float]:
        """Checks the graph with ONNX's own checker, runs it on ONNX Runtime and compares outputs.

        Args:
            inputs: every graph input.
            expected: output name -> value, such as gradients of torch autograd (``grad/<name>``).
            tolerance: largest difference relative to the largest expected value.

        Returns:
            Relative difference of each expected output.

        Raises:
            TransformError: the graph is not valid, or an output differs by more.
        """
        import onnx
        import onnxruntime as ort

        place = Path(tempfile.mkdtemp(dir=self._workspace.name))
        program = self._write(place)
        try:
            onnx.checker.check_model(onnx.load(str(program), load_external_data=False))
            session = ort.InferenceSession(str(program), providers=["CPUExecutionProvider"])
        except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
            raise TransformError(f"the graph is not valid: {str(error).splitlines()[0]}") from error
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(None, dict(inputs)), strict=True))
        report = {}
        for name, value in expected.items():
            if name not in found:
                raise TransformError(f"the graph has no output {name!r}.")
            scale = max(float(np.abs(value).max()), 1e-6)
            report[name] = float(np.abs(found[name] - value).max()) / scale
        worst = max(report, key=lambda name: report[name], default=None)
        if worst is not None and not report[worst] <= tolerance:
            raise TransformError(
                f"{worst} differs by {report[worst]:.1e} of its largest value (allowed {tolerance:.1e})."
            )
        return report

    def save(self, path: str | Path) -> Path:
        """Writes graph and weights into a new or empty directory, whole or not at all; returns ``model.onnx``."""
        from QEfficient.models.base import check_destination
        from QEfficient.store.copy import copy_tree

        destination = Path(path)
        check_destination(destination)
        place = Path(tempfile.mkdtemp(dir=self._workspace.name))
        self._write(place)
        copy_tree(place, destination)
        return destination / "model.onnx"

    def _write(self, place: Path) -> Path:
        for location, file in weight_files(self.model).items():
            (place / location).parent.mkdir(parents=True, exist_ok=True)
            place_file(file, place / location)
        save_model(self.model, place / "model.onnx")
        return place / "model.onnx"

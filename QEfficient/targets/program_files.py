"""Puts the weights of a graph into a package, as links where the filesystem can."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from QEfficient.onnx_io import file_tensors, weight_files
from QEfficient.store.files import place_file
from QEfficient.targets.base import CompileRequest

WEIGHTS_DIR = "weights"


def place_weights(model: ir.Model, request: CompileRequest) -> None:
    """Places every weight file in ``weights/`` of the package and points the model's tensors there."""
    files = weight_files(model)
    if files:
        (request.directory / WEIGHTS_DIR).mkdir()
    for number, (location, file) in enumerate(files.items()):
        request.progress("placing weights", number, len(files))
        place_file(file, request.directory / WEIGHTS_DIR / Path(location).name)
    request.progress("placing weights", len(files), len(files))
    for tensor in file_tensors(model).values():
        tensor.location = f"{WEIGHTS_DIR}/{Path(tensor.location).name}"

"""The interface of an exported graph: what `interface.json` says beside `model.onnx`. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from QEfficient.targets.manifest import StateSpec, TensorSpec

ONNX_FILE = "model.onnx"
INTERFACE_FILE = "interface.json"


@dataclass(frozen=True)
class Interface:
    """Inputs, outputs and states of an exported graph, in graph order; what `interface.json` holds.

    ``facts`` are what later stages want to know without loading the model: architecture, model_type, vocab_size,
    hidden_size, max_positions (None = unlimited), labels of a classifier. ``parameters`` are inputs that hold between
    steps, such as adapter tensors.
    """

    task: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    facts: dict[str, Any]
    parameters: tuple[TensorSpec, ...] = ()

    def save(self, directory: Path) -> None:
        text = json.dumps(asdict(self), indent=2) + "\n"
        (directory / INTERFACE_FILE).write_text(text, encoding="utf-8")

    def with_facts(self, facts: dict[str, Any]) -> Interface:
        return replace(self, facts=facts)

    @classmethod
    def load(cls, directory: Path) -> Interface:
        body = json.loads((directory / INTERFACE_FILE).read_text(encoding="utf-8"))
        return cls(
            body["task"],
            tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in body["inputs"]),
            tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in body["outputs"]),
            tuple(StateSpec(**{**s, "shape": tuple(s["shape"])}) for s in body["states"]),
            body["facts"],
            tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in body.get("parameters", ())),
        )

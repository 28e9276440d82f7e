"""Three ways to run one step of a causal model with the same call: torch, plain ONNX Runtime, package session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from QEfficient.engine.row_prefill import DECODE, PREFILL, RowPrefill
from QEfficient.exporter.interface import Interface
from QEfficient.targets.base import Session

if TYPE_CHECKING:
    from QEfficient.transforms.pytorch.eager import TransformedModel


class StepRunner(Protocol):
    """Runs steps of one sequence."""

    def begin(self, capacity: int) -> None:
        """Starts an empty sequence of at most ``capacity`` tokens."""

    def step(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 [1, seq] twice -> float32 [vocab], the logits of the last token."""


class TorchSteps:
    """The transformed torch module."""

    def __init__(self, model: TransformedModel) -> None:
        self.model = model

    def begin(self, capacity: int) -> None:
        self.state = [t.zeros(1, capacity) for t in self.model.layout.tensors]

    def step(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        import torch

        logits, *self.state = self.model(torch.from_numpy(ids), torch.from_numpy(positions), self.state)
        return np.asarray(logits[0, -1].numpy())


class OnnxSteps:
    """The exported graph in a plain ONNX Runtime session: state is passed in and out as arrays, nothing is bound.

    ``parameters`` are the values of the graph's parameters, such as an adapter's tensors.
    """

    def __init__(self, onnx_path: Path, interface: Interface, parameters: Mapping[str, np.ndarray]) -> None:
        self.session, self.interface, self.parameters = plain_session(onnx_path), interface, parameters

    def begin(self, capacity: int) -> None:
        sizes = {"batch_size": 1, "full_batch_size": 1, "ctx_len": capacity}
        self.state = {
            s.input: np.zeros([sizes[d] if isinstance(d, str) else d for d in s.shape], s.dtype)
            for s in self.interface.states
        }

    def step(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        names = [s.output for s in self.interface.states]
        logits, *state = self.session.run(["logits", *names], self.feeds(ids, positions))
        self.state = {s.input: array for s, array in zip(self.interface.states, state, strict=True)}
        return np.asarray(logits)[0, -1]

    def feeds(self, ids: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        """What the graph reads in the next step."""
        feeds = {"input_ids": ids, "position_ids": positions, **self.state, **self.parameters}
        if any(spec.name == "batch_index" for spec in self.interface.inputs):
            feeds["batch_index"] = np.zeros((1, 1), np.int64)
        return feeds


class SessionSteps:
    """A package's own session, in chunks of its prefill length."""

    def __init__(self, session: Session) -> None:
        self.session = session
        symbols = session.manifest.specialization(PREFILL).symbols
        self.by_row = session.manifest.specialization(PREFILL).by_row
        self.chunk = symbols["seq_len"]
        self.rows = symbols["full_batch_size"].exact if "full_batch_size" in symbols else None

    def begin(self, capacity: int) -> None:
        capacity = self.session.manifest.specialization(PREFILL).symbols["ctx_len"].exact or capacity
        rows = {"full_batch_size": self.rows} if self.rows is not None else {"batch_size": 1}
        self.session.begin({**rows, "ctx_len": capacity})

    def step(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        if self.by_row and ids.shape[1] > 1:
            return RowPrefill(self.session).feed(ids[0], int(positions[0, 0]), 0)
        logits = np.zeros(0, np.float32)
        width = self.chunk.maximum or ids.shape[1]
        for start in range(0, ids.shape[1], width):
            feeds = {
                "input_ids": ids[:, start : start + width],
                "position_ids": positions[:, start : start + width],
            }
            if self.rows is not None:
                feeds["batch_index"] = np.zeros((1, 1), np.int64)
            logits = self.session.run(feeds, PREFILL if ids.shape[1] > 1 else DECODE)["logits"][0, -1].copy()
        return logits


def forced(runner: StepRunner, row: np.ndarray, chosen: np.ndarray, capacity: int) -> np.ndarray:
    """Feeds a prompt int64 [length], then tokens chosen elsewhere; float32 [tokens, vocab]."""
    runner.begin(capacity)
    positions = np.arange(len(row), dtype=np.int64)[None]
    out = [runner.step(row[None].astype(np.int64), positions)]
    for i, token in enumerate(chosen[:-1].tolist()):
        out.append(runner.step(np.array([[token]], np.int64), np.array([[len(row) + i]], np.int64)))
    return np.stack(out)


def greedy(runner: StepRunner, row: np.ndarray, count: int, capacity: int) -> np.ndarray:
    """The ``count`` tokens the runner itself puts after a prompt, int64 [count]."""
    runner.begin(capacity)
    chosen = [int(runner.step(row[None], np.arange(len(row), dtype=np.int64)[None]).argmax())]
    for i in range(count - 1):
        logits = runner.step(np.array([[chosen[-1]]], np.int64), np.array([[len(row) + i]], np.int64))
        chosen.append(int(logits.argmax()))
    return np.array(chosen, np.int64)


def encoder_feeds(session: Any, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of an encoder's graph, int64 [batch, seq] each."""
    feeds = {"input_ids": ids, "attention_mask": mask}
    if any(value.name == "token_type_ids" for value in session.get_inputs()):
        feeds["token_type_ids"] = np.zeros_like(ids)
    return feeds


def plain_session(onnx_path: Path):  # type: ignore[no-untyped-def] # onnxruntime ships no types
    """An ONNX Runtime session as anyone would open it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(onnx_path), options, providers=["CPUExecutionProvider"])

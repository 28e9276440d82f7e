"""`model.validate()`: Hugging Face = transformed torch = ONNX = package, on the caller's own input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from QEfficient.engine.package import LoadedPackage
from QEfficient.evaluate.inputs import check_tokens, one_of, refuse_long, token_rows
from QEfficient.evaluate.report import ParityReport, StageResult, compare
from QEfficient.evaluate.steps import (
    OnnxSteps,
    SessionSteps,
    StepRunner,
    TorchSteps,
    encoder_feeds,
    forced,
    plain_session,
)
from QEfficient.exporter.interface import Interface

if TYPE_CHECKING:
    from QEfficient.models.base import QEFFTransformersBase

#: Largest difference, relative to the largest reference value, that counts as equal in float32.
TOLERANCE = 1e-4


def validate(
    model: QEFFTransformersBase,
    inputs: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    prompts: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    tokens: int = 16,
    tolerance: float = TOLERANCE,
) -> ParityReport:
    """Runs the same input through every stage and measures where they part.

    Causal models: each prompt alone; ``tokens`` greedy steps of Hugging Face's ``generate``, whose tokens are fed to
    the other stages, so that every step's logits are compared. Encoders: the batch with padding, against Hugging Face
    on each row alone without padding.

    Args:
        model: compiled with defaults when it has not been compiled.
        inputs: tokenizer output (``input_ids``, ``attention_mask``) or texts; a few built-in texts when nothing is
            given (token ids when the model has no tokenizer).
        prompts, texts: other names for texts.
        tokens: greedy steps for causal models; fewer when the context is short.
        tolerance: largest relative difference that counts as equal.

    Raises:
        InputError: unusable input.
    """
    given = one_of(inputs, prompts, texts)
    check_tokens(tokens)
    package = model._ready()
    rows = token_rows(given, package)
    if model.onnx_path is None or not model.onnx_path.is_file():
        model.export()
    if model.task == "text-generation":
        stages, compared = _causal(model, package, rows, tokens, tolerance)
    else:
        stages, compared = _encoder(model, package, rows, tolerance)
    return ParityReport(model.model_name, model.task, compared, tolerance, tuple(stages))


def _causal(
    model: QEFFTransformersBase, package: LoadedPackage, rows: list[np.ndarray], tokens: int, tolerance: float
) -> tuple[list[StageResult], str]:
    capacity = package.ctx_len  # type: ignore[attr-defined]
    refuse_long(rows, capacity, "ctx_len")
    counts = [min(tokens, capacity - len(row) + 1) for row in rows]
    references = [_hf_greedy(model, row, count) for row, count in zip(rows, counts, strict=True)]
    interface = Interface.load(model.onnx_path.parent)  # type: ignore[union-attr]
    runners: list[tuple[str, StepRunner]] = [
        ("transformed torch", TorchSteps(model.transformed())),
        ("ONNX", OnnxSteps(model.onnx_path, interface, package.adapter_values)),  # type: ignore[arg-type,attr-defined]
        ("package", SessionSteps(package.session)),
    ]
    stages = []
    for name, runner in runners:
        found, equal = [], 0
        for row, (chosen, logits) in zip(rows, references, strict=True):
            steps = forced(runner, row, chosen, capacity)
            found.append(steps)
            equal += int((steps.argmax(-1) == chosen).sum()) + _excused(steps, logits, chosen, tolerance)
        reference = np.concatenate([logits for _, logits in references])
        stages.append(compare(name, reference, np.concatenate(found), tolerance, (equal, sum(counts))))
    short = f" (not {tokens} each: the context ends)" if min(counts) < tokens else ""
    return stages, f"logits of {sum(counts)} greedy steps over {len(rows)} prompts{short}"


def _excused(steps: np.ndarray, reference: np.ndarray, chosen: np.ndarray, tolerance: float) -> int:
    """Steps whose token differs only because the reference itself had a tie within the tolerance."""
    scale = float(np.abs(reference).max()) * tolerance
    best = steps.argmax(-1)
    index = np.arange(len(chosen))
    tie = (best != chosen) & (reference[index, chosen] - reference[index, best] <= scale)
    return int(tie.sum())


def _hf_greedy(model: QEFFTransformersBase, row: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Hugging Face's own ``generate``: (tokens [count], logits [count, vocab])."""
    import torch

    ids = torch.from_numpy(row)[None]
    reference: Any = model.model
    with torch.no_grad():
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    logits = np.stack([step[0].float().numpy() for step in out.logits])
    # The tokens as the logits say, before any processor of the model's generation config.
    return logits.argmax(-1), logits if _forced_by_logits(out, logits, len(row)) else _refeed(model, row, logits)


def _forced_by_logits(out: Any, logits: np.ndarray, length: int) -> bool:
    return bool((out.sequences[0, length:].numpy() == logits.argmax(-1)).all())


def _refeed(model: QEFFTransformersBase, row: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Greedy logits by plain forward calls, for models whose generation config changes the tokens."""
    import torch

    sequence, out = row.tolist(), []
    for _ in range(len(logits)):
        with torch.no_grad():
            step = model.model(input_ids=torch.tensor([sequence])).logits[0, -1].float().numpy()
        out.append(step)
        sequence.append(int(step.argmax()))
    return np.stack(out)


def _encoder(
    model: QEFFTransformersBase, package: LoadedPackage, rows: list[np.ndarray], tolerance: float
) -> tuple[list[StageResult], str]:
    import torch

    limit = package.max_length  # type: ignore[attr-defined]
    refuse_long(rows, limit, "seq_len")
    width = max(len(row) for row in rows)
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    reference = [_hf_row(model, row) for row in rows]

    def flat(batch: np.ndarray) -> np.ndarray:
        """Real values of a batch in one line: token vectors without padding, or pooled vectors."""
        parts = [b[: len(r)] if b.ndim == 2 else b for b, r in zip(batch, rows, strict=True)]
        return np.concatenate([part.reshape(-1) for part in parts])

    expected = np.concatenate([part.reshape(-1) for part in reference])
    torch_out = model.transformed()(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    session = plain_session(model.onnx_path)  # type: ignore[arg-type]
    feeds = encoder_feeds(session, ids, mask)
    name = package.manifest.outputs[0].name
    found = [
        ("transformed torch", torch_out),
        ("ONNX", session.run([name], feeds)[0]),
        ("package", package.generate(input_ids=ids, attention_mask=mask)[name]),
    ]
    stages = [compare(stage, expected, flat(np.asarray(values)), tolerance) for stage, values in found]
    return stages, f"{name} of {len(rows)} padded rows"


def _hf_row(model: QEFFTransformersBase, row: np.ndarray) -> np.ndarray:
    """Hugging Face on one row alone, pooled in torch when the model pools."""
    import torch

    from QEfficient.transforms.pytorch.pooling import resolve

    ids = torch.from_numpy(row.astype(np.int64))[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        result = model.model(input_ids=ids, attention_mask=mask)
        if model.task == "text-classification":
            return np.asarray(result.logits[0].float().numpy())
        pool = resolve(getattr(model, "pooling", None))
        hidden = result.last_hidden_state
        return np.asarray((hidden if pool is None else pool(hidden, mask))[0].float().numpy())

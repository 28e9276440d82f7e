"""`model.validate()`: Hugging Face = transformed torch = ONNX = package, on the caller's own input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from QEfficient.engine.arrays import integer_matrix, mask_matrix
from QEfficient.engine.package import LoadedPackage
from QEfficient.errors import InputError
from QEfficient.evaluate.report import ParityReport, StageResult, compare
from QEfficient.evaluate.steps import OnnxSteps, SessionSteps, StepRunner, TorchSteps, plain_session
from QEfficient.exporter.interface import Interface

if TYPE_CHECKING:
    from QEfficient.models.base import QEFFTransformersBase

#: Largest difference, relative to the largest reference value, that counts as equal in float32.
TOLERANCE = 1e-4
#: What is compared when the caller brings no input.
DEFAULT_TEXTS = (
    "Natalia sold clips to 48 of her friends.",
    "How many apples are left?",
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?",
)


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
    given = [value for value in (inputs, prompts, texts) if value is not None]
    if len(given) > 1:
        raise InputError("pass one of inputs, prompts and texts.")
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, got {tokens}.")
    package = model._ready()
    rows = _rows(given[0] if given else None, package)
    if model.onnx_path is None or not model.onnx_path.is_file():
        model.export()
    if model.task == "text-generation":
        stages, compared = _causal(model, package, rows, tokens, tolerance)
    else:
        stages, compared = _encoder(model, package, rows, tolerance)
    return ParityReport(model.model_name, model.task, compared, tolerance, tuple(stages))


def _rows(given: Any, package: LoadedPackage) -> list[np.ndarray]:
    """Token ids of each row, without padding."""
    if given is None:
        if (package.directory / "tokenizer.json").is_file():
            given = DEFAULT_TEXTS
        else:
            random = np.random.default_rng(0)
            vocabulary = package.manifest.model.get("vocab_size") or 100
            return [random.integers(4, max(vocabulary, 6), n) for n in (9, 5, 17)]
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise InputError("input_ids is missing: pass the tokenizer's output.")
        ids = integer_matrix("input_ids", given["input_ids"])
        mask = mask_matrix(given.get("attention_mask"), ids.shape)
        return [row[keep] for row, keep in zip(ids, mask, strict=True)]
    texts = [given] if isinstance(given, str) else list(given)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise InputError("texts must be a non-empty list of non-empty strings.")
    return [np.asarray(package.tokenizer.encode(text), np.int64) for text in texts]


def _causal(
    model: QEFFTransformersBase, package: LoadedPackage, rows: list[np.ndarray], tokens: int, tolerance: float
) -> tuple[list[StageResult], str]:
    capacity = package.ctx_len  # type: ignore[attr-defined]
    _refuse_long(rows, capacity, "ctx_len")
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
            steps = _forced(runner, row, chosen, capacity)
            found.append(steps)
            equal += int((steps.argmax(-1) == chosen).sum()) + _excused(steps, logits, chosen, tolerance)
        reference = np.concatenate([logits for _, logits in references])
        stages.append(compare(name, reference, np.concatenate(found), tolerance, (equal, sum(counts))))
    short = f" (not {tokens} each: the context ends)" if min(counts) < tokens else ""
    return stages, f"logits of {sum(counts)} greedy steps over {len(rows)} prompts{short}"


def _refuse_long(rows: list[np.ndarray], limit: int | None, option: str) -> None:
    """Proof about half a text is no proof: InputError instead of a silent cut."""
    longest = max(len(row) for row in rows)
    if limit is not None and longest > limit:
        raise InputError(f"a text of {longest} tokens does not fit {option}={limit}: shorten it or compile with more.")


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


def _forced(runner: StepRunner, row: np.ndarray, chosen: np.ndarray, capacity: int) -> np.ndarray:
    """Feeds the prompt, then the reference's tokens; float32 [tokens, vocab]."""
    runner.begin(capacity)
    positions = np.arange(len(row), dtype=np.int64)[None]
    out = [runner.step(row[None].astype(np.int64), positions)]
    for i, token in enumerate(chosen[:-1].tolist()):
        out.append(runner.step(np.array([[token]], np.int64), np.array([[len(row) + i]], np.int64)))
    return np.stack(out)


def _encoder(
    model: QEFFTransformersBase, package: LoadedPackage, rows: list[np.ndarray], tolerance: float
) -> tuple[list[StageResult], str]:
    import torch

    limit = package.max_length  # type: ignore[attr-defined]
    _refuse_long(rows, limit, "seq_len")
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
    feeds = {"input_ids": ids, "attention_mask": mask}
    if any(value.name == "token_type_ids" for value in session.get_inputs()):
        feeds["token_type_ids"] = np.zeros_like(ids)
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

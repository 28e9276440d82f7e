"""The proof: loss, every gradient and the first update of a compiled step against torch autograd."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from QEfficient.errors import TrainingError
from QEfficient.exporter.adapters import adapter_parameters
from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.finetune.settings_file import write_text
from QEfficient.finetune.step_session import IGNORED

#: Largest differences that still are rounding: of the loss relative to itself, of a gradient relative to the tensor's
#: largest, of an updated tensor relative to the learning rate where the gradient is well above its own noise.
LOSS, GRADIENT, UPDATE = 1e-4, 1e-3, 2e-2
_TEACHER = ("teacher_ids", "teacher_logprobs", "teacher_weights")
#: Gradients below this share of the model's largest are judged against it: some are 0 in exact arithmetic (the bias of
#: attention's keys), and a ratio of two roundings says nothing.
_FLOOR = 1e-5


@dataclass
class ProofReport:
    """What `compare_first_step` found; differences are relative as the tolerances say.

    ``quantity`` is what ``loss`` and ``torch_loss`` are: some methods compute their loss outside of the step.
    """

    loss: float
    torch_loss: float
    loss_difference: float
    worst_gradient: str
    gradient_difference: float
    worst_update: str
    update_difference: float
    tensors: int
    trained_tokens: int
    quantity: str = "loss"
    gradients: dict[str, float] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=lambda: {"loss": LOSS, "gradient": GRADIENT, "update": UPDATE})

    @property
    def passed(self) -> bool:
        """Whether everything is within tolerance; not-a-number never is."""
        return (
            self.loss_difference <= LOSS and self.gradient_difference <= GRADIENT and self.update_difference <= UPDATE
        )

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    def save(self, path: Path) -> Path:
        """Writes ``validate.json`` atomically."""
        return write_text(path, json.dumps(self.to_json(), indent=1) + "\n", "the proof")

    def __str__(self) -> str:
        return (
            f"first step against torch autograd: {self.quantity} {self.loss:.6f} / {self.torch_loss:.6f} "
            f"(difference {self.loss_difference:.1e}), {self.tensors} gradients, worst {self.gradient_difference:.1e} "
            f"of the tensor's largest ({self.worst_gradient}), updated tensors within {self.update_difference:.1e} of "
            f"the learning rate: {'equal' if self.passed else 'DIFFERENT'}"
        )


def compare_first_step(
    step: CompiledStep,
    reference: nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    quantity: str = "loss",
) -> ProofReport:
    """Runs one batch through the step and through torch, and one AdamW update on copies of both results.

    Every sequence of the batch runs through torch alone, without padding and without packing, so that the reference
    shares neither masks nor attention with the step.

    Args:
        reference: the torch model (with its adapter) whose frozen weights the step has; its trained tensors are
            overwritten with the step's.
        batch: what `CompiledStep.forward` takes, its ``weights`` as they are; without them the loss is a mean.
        quantity: what the step's loss is, for people.
    """
    pairs = _pairs(step, reference)
    for mine, theirs in pairs.values():
        theirs.data.copy_(mine.detach().reshape(theirs.shape))
        theirs.requires_grad_(True)
    step.zero_grad()
    result = step(**batch)
    result.backward()
    loss = float(result.detach())
    trained = step.last.trained_tokens if step.last is not None else 0
    reference.eval()
    reference.zero_grad()
    torch_loss = _reference_loss(reference, batch, step.is_classifier)
    gradients, updates = {}, {}
    floor = _FLOOR * max(float(p.grad.abs().max()) for _, p in pairs.values() if p.grad is not None)
    for name, (mine, theirs) in pairs.items():
        mine_grad = mine.grad if mine.grad is not None else torch.zeros_like(mine)
        their_grad = theirs.grad if theirs.grad is not None else torch.zeros_like(theirs)
        scale = max(float(their_grad.abs().max()), floor, 1e-7)
        gradients[name] = float((mine_grad - their_grad).abs().max()) / scale
        updates[name] = _update_difference(mine, mine_grad, theirs, their_grad, scale, learning_rate, weight_decay)
    step.zero_grad()
    reference.zero_grad()
    worst, moved = max(gradients, key=_nan_first(gradients)), max(updates, key=_nan_first(updates))
    return ProofReport(
        loss=loss,
        torch_loss=torch_loss,
        loss_difference=abs(loss - torch_loss) / max(abs(torch_loss), 1e-6),
        worst_gradient=worst,
        gradient_difference=gradients[worst],
        worst_update=moved,
        update_difference=updates[moved],
        tensors=len(pairs),
        trained_tokens=trained,
        quantity=quantity,
        gradients=gradients,
    )


def require(report: ProofReport) -> None:
    """Raises TrainingError when the proof failed."""
    if not report.passed:
        raise TrainingError(
            f"the compiled step differs from torch autograd (loss {report.loss_difference:.1e}, "
            f"{report.worst_gradient} {report.gradient_difference:.1e}): see validate.json; "
            "validate=False trains anyway."
        )


def _nan_first(values: Mapping[str, float]) -> Any:
    return lambda name: float("inf") if values[name] != values[name] else values[name]


def _pairs(step: CompiledStep, reference: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    own = dict(step.named_parameters())
    theirs: dict[str, Any] = dict(reference.named_parameters(remove_duplicate=False))
    if step.adapter is not None:
        theirs |= adapter_parameters(reference, step.adapter)
    found = {}
    for name, parameter in own.items():
        other = theirs.get(name)
        found[name] = (parameter, other if other is not None else theirs[step.file_names[name]])
    return found


def _reference_loss(reference: nn.Module, batch: Mapping[str, torch.Tensor], classifier: bool) -> float:
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    per_token = {name: batch[name] for name in ("labels", "weights", *_TEACHER) if name in batch}
    sequences = []
    for row in range(ids.shape[0]):
        for segment in sorted(set(mask[row].tolist()) - {0}):
            chosen = mask[row] == segment
            told = {n: v[row : row + 1] if classifier else v[row][chosen][1:] for n, v in per_token.items()}
            sequences.append((ids[row][chosen][None], told))
    total = sum(int((told["labels"] != IGNORED).sum()) for _, told in sequences)
    value = 0.0
    for tokens, told in sequences:
        if not bool((told["labels"] != IGNORED).any()):
            continue
        logits = reference(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float()
        loss = _sequence_loss(logits if classifier else logits[0, :-1], told, total)
        loss.backward()
        value += float(loss.detach())
    return value


def _sequence_loss(logits: torch.Tensor, told: Mapping[str, torch.Tensor], total: int) -> torch.Tensor:
    """The step's loss of one sequence: logits [places, vocabulary], what is told of the label at every place."""
    labels = told["labels"]
    # One output is a score: it has no probability.
    logprobs = logits if logits.shape[-1] == 1 else logits.log_softmax(-1)
    own = logprobs.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    weights = told["weights"] if "weights" in told else torch.full_like(own, 1 / total)
    loss = -(weights * own)[labels != IGNORED].sum()
    if "teacher_ids" in told:
        ids, wanted, share = (told[name] for name in _TEACHER)
        loss = loss + (share * (wanted.exp() * (wanted - logprobs.gather(1, ids))).sum(-1)).sum()
    return loss


def _update_difference(
    mine: nn.Parameter,
    my_grad: torch.Tensor,
    theirs: nn.Parameter,
    their_grad: torch.Tensor,
    scale: float,
    lr: float,
    decay: float,
) -> float:
    """AdamW's first update divides a gradient by itself: compared only where the gradient is above rounding noise."""
    results = []
    for parameter, gradient in ((mine, my_grad), (theirs, their_grad)):
        twin = nn.Parameter(parameter.detach().clone())
        twin.grad = gradient.detach().clone()
        torch.optim.AdamW([twin], lr=lr, weight_decay=decay).step()
        results.append(twin.detach())
    clear = their_grad.abs() > 1e-2 * scale
    if not bool(clear.any()) or lr == 0:
        return 0.0
    return float((results[0] - results[1])[clear].abs().max()) / lr

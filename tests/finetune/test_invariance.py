"""What must not change a step's numbers does not: accumulation, padding, packing; what must, does as torch says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from step_models import (
    IGNORED,
    apart,
    base_model,
    class_batch,
    compiled,
    counted,
    relative,
    step_gradients,
    token_batch,
    torch_gradients,
    torch_logprobs,
    with_lora,
)
from tiny_models import VOCAB_SIZE

from QEfficient.errors import InputError, OptionError, ShapeError
from QEfficient.finetune import CompiledStep

SAME = 1e-6
#: float32 through other kernels: torch and ONNX Runtime add in another order.
CLOSE = 1e-5
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama() -> Iterator[tuple[CompiledStep, Any]]:
    """A compiled step and the torch model with the same weights."""
    model = with_lora("llama")
    step = compiled(model)
    yield step, model
    step.close()


@pytest.fixture(scope="module")
def mistral() -> Iterator[CompiledStep]:
    """Attention within a window of 4: shorter than every packed segment."""
    step = compiled(with_lora("mistral"))
    yield step
    step.close()


@pytest.fixture(scope="module")
def gpt2() -> Iterator[CompiledStep]:
    """Learned positions."""
    step = compiled(with_lora("gpt2"))
    yield step
    step.close()


@pytest.fixture(scope="module")
def bert() -> Iterator[tuple[CompiledStep, Any]]:
    model = base_model("bert").requires_grad_(True)
    step = compiled(model)
    yield step, model
    step.close()


def assert_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """The whole gradient to 1e-6; every tensor by itself to what adding in another order may change."""
    assert apart(got, wanted) <= SAME
    assert relative(got, wanted) <= CLOSE


def rows_of(batch: Batch) -> list[Batch]:
    """Every row as a batch of its own, without its padding."""
    found = []
    for n in range(batch["input_ids"].shape[0]):
        real = batch["attention_mask"][n] != 0
        labels = batch["labels"]
        found.append(
            {
                "input_ids": batch["input_ids"][n][real][None],
                "attention_mask": batch["attention_mask"][n][real][None],
                "labels": labels[n : n + 1] if labels.dim() == 1 else labels[n][real][None],
            }
        )
    return found


def moved(batch: Batch, left: int, right: int, filler: int = 77) -> Batch:
    """The same rows between more columns of padding, whose ids and labels are rubbish where that is allowed."""
    pad = torch.nn.functional.pad
    return {
        "input_ids": pad(batch["input_ids"], (left, right), value=filler),
        "attention_mask": pad(batch["attention_mask"], (left, right)),
        "labels": pad(batch["labels"], (left, right), value=filler),
    }


def pack(rows: list[Batch], width: int) -> Batch:
    """One row of segments 1, 2, …, padded to ``width``; positions are left to the step."""
    names = ("input_ids", "labels")
    joined = {name: torch.cat([row[name][0] for row in rows]) for name in names}
    joined["attention_mask"] = torch.cat(
        [torch.full((row["input_ids"].shape[1],), n + 1) for n, row in enumerate(rows)]
    )
    free = width - joined["attention_mask"].numel()
    return {name: torch.nn.functional.pad(value, (0, free))[None] for name, value in joined.items()}


# ---------------------------------------------------------------------------------- accumulation, padding, packing


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("mistral", "gpt2"))]
)
def test_one_batch_of_eight_is_eight_batches_of_one(family: str, request: pytest.FixtureRequest) -> None:
    step = request.getfixturevalue(family)
    step = step[0] if isinstance(step, tuple) else step
    batch = token_batch([9, 4, 12, 2, 7, 15, 3, 10])
    count = counted(batch)
    loss, wanted = step_gradients(step, batch)
    split_loss, split = step_gradients(step, *({**row, "normaliser": count} for row in rows_of(batch)))
    assert split_loss == pytest.approx(loss, rel=SAME)
    assert_same(split, wanted)


def test_one_batch_of_eight_is_eight_batches_of_one_in_a_classifier(bert: tuple[CompiledStep, Any]) -> None:
    batch = class_batch([9, 4, 12, 2, 7, 15, 3, 10])
    loss, wanted = step_gradients(bert[0], batch)
    split_loss, split = step_gradients(bert[0], *({**row, "normaliser": 8} for row in rows_of(batch)))
    assert split_loss == pytest.approx(loss, rel=SAME)
    # The gradient of a key's bias is nothing but rounding: softmax takes it out.
    kept = [name for name in wanted if not name.endswith("key.bias")]
    assert_same({n: split[n] for n in kept}, {n: wanted[n] for n in kept})


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 6), (3, 4)])
def test_any_padding_side(family: str, left: int, right: int, request: pytest.FixtureRequest) -> None:
    step = request.getfixturevalue(family)
    step = step[0] if isinstance(step, tuple) else step
    batch = token_batch([6, 10, 8])
    loss, wanted = step_gradients(step, batch)
    padded_loss, padded = step_gradients(step, moved(batch, left, right))
    assert padded_loss == pytest.approx(loss, rel=SAME)
    assert_same(padded, wanted)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_packed_rows_are_unpacked_rows(family: str, request: pytest.FixtureRequest) -> None:
    """A segment sees nothing of its neighbours, its positions begin at 0 and its first token is not predicted."""
    step = request.getfixturevalue(family)
    step = step[0] if isinstance(step, tuple) else step
    batch = token_batch([6, 9, 2, 7, 5])
    rows = rows_of(batch)
    packed = {name: torch.cat([a, b]) for (name, a), b in zip(
        pack(rows[:3], 18).items(), pack(rows[3:], 18).values(), strict=True
    )}  # fmt: skip
    loss, wanted = step_gradients(step, batch)
    packed_loss, found = step_gradients(step, packed)
    assert packed_loss == pytest.approx(loss, rel=SAME)
    assert_same(found, wanted)
    assert step.last is not None
    assert step.last.trained_tokens == counted(batch)
    # As one sequence the numbers would be others: the segments do the work.
    joined = {**packed, "attention_mask": (packed["attention_mask"] != 0).long()}
    assert abs(step_gradients(step, joined)[0] - loss) > 1e-3


def test_rows_without_weight_change_nothing(llama: tuple[CompiledStep, Any]) -> None:
    """Rows whose labels are all masked, and rows with weight 0, as a rank without data gets them."""
    step, _ = llama
    batch = token_batch([6, 9])
    loss, wanted = step_gradients(step, batch)
    more = token_batch([9, 5], seed=3)
    for masked in (True, False):
        extra = {**more, "labels": torch.full_like(more["labels"], IGNORED)} if masked else more
        both: dict[str, Any] = {name: torch.cat([batch[name], extra[name]]) for name in batch}
        if not masked:
            weights = torch.zeros(both["labels"].shape)
            weights[:2] = 1.0 / counted(batch)
            both["weights"] = weights
        found_loss, found = step_gradients(step, both)
        assert found_loss == pytest.approx(loss, rel=SAME)
        assert_same(found, wanted)
    nothing = {**more, "labels": torch.full_like(more["labels"], IGNORED), "normaliser": 7.0}
    loss_of_nothing, zeros = step_gradients(step, nothing)
    assert loss_of_nothing == 0
    assert all(not gradient.any() for gradient in zeros.values())


# ---------------------------------------------------------------------------------- smallest and largest batches


def test_one_row_of_two_tokens(llama: tuple[CompiledStep, Any]) -> None:
    step, model = llama
    batch = {"input_ids": torch.tensor([[5, 9]]), "labels": torch.tensor([[5, 9]])}
    loss, found = step_gradients(step, batch)
    reference = -torch_logprobs(model, batch).sum()
    assert loss == pytest.approx(float(reference.detach()), abs=CLOSE)
    assert relative(found, torch_gradients(model, reference)) <= CLOSE
    assert step.last is not None
    assert step.last.trained_tokens == 1
    assert step.last.logprobs.shape == (1, 2)
    assert step.last.logprobs[0, 0] == 0


def test_one_token_has_nothing_to_predict(llama: tuple[CompiledStep, Any]) -> None:
    step, _ = llama
    one = {"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[5]])}
    with pytest.raises(InputError, match="nothing to train on"):
        step(**one)
    loss, zeros = step_gradients(step, {**one, "normaliser": 1.0})
    assert loss == 0
    assert all(not gradient.any() for gradient in zeros.values())


@pytest.mark.parametrize("column", [1, 9])
def test_a_single_trained_token(llama: tuple[CompiledStep, Any], column: int) -> None:
    """The second and the very last position."""
    step, model = llama
    batch = token_batch([10, 10])
    labels = torch.full_like(batch["labels"], IGNORED)
    labels[1, column] = batch["input_ids"][1, column]
    batch["labels"] = labels
    loss, found = step_gradients(step, batch)
    reference = -torch_logprobs(model, batch).sum()
    assert loss == pytest.approx(float(reference.detach()), abs=CLOSE)
    assert relative(found, torch_gradients(model, reference)) <= CLOSE


def test_the_models_last_position(gpt2: CompiledStep) -> None:
    """GPT-2 has 128 positions: a row of 128 tokens trains, one of 129 is refused with its size."""
    loss, found = step_gradients(gpt2, token_batch([128], prompt=0.9))
    assert np.isfinite(loss)
    assert any(gradient.any() for gradient in found.values())
    with pytest.raises(ShapeError, match="129"):
        gpt2(**token_batch([129]))


def test_a_session_runs_any_shapes_in_turn(llama: tuple[CompiledStep, Any]) -> None:
    """Buffers are reused: a large call between two equal small ones leaves no trace."""
    step, _ = llama
    small = token_batch([5, 3])
    loss, wanted = step_gradients(step, small)
    step_gradients(step, token_batch([31, 17, 9, 25, 4]))
    again, found = step_gradients(step, small)
    assert again == loss
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


# ---------------------------------------------------------------------------------- losses made of weights


def test_weights_are_of_each_labels_own_column(llama: tuple[CompiledStep, Any]) -> None:
    """loss = -sum w_t log p(token t | before t), with torch's gradient; policy-gradient weights may be negative."""
    step, model = llama
    batch = token_batch([8, 11])
    weights = torch.randn(batch["labels"].shape, generator=torch.Generator().manual_seed(5))
    loss, found = step_gradients(step, {**batch, "weights": weights})
    reference = -(weights * torch_logprobs(model, batch)).sum()
    assert loss == pytest.approx(float(reference.detach()), abs=1e-4)
    assert relative(found, torch_gradients(model, reference)) <= CLOSE
    halved, _ = step_gradients(step, {**batch, "weights": weights, "normaliser": 2.0})
    assert halved == pytest.approx(loss / 2, rel=1e-5)


def test_dpo_from_weights(llama: tuple[CompiledStep, Any]) -> None:
    """Direct preference optimisation in a few lines outside the graph.

    d(-log sigmoid(beta * margin)) is beta * sigmoid(-beta * margin) times the change of log p, so one call for the
    log-probabilities and one with weights give the gradient that autograd takes through the whole loss.
    """
    step, model = llama
    beta, chosen, rejected = 0.3, token_batch([9, 6], seed=1), token_batch([7, 8], seed=2)
    base = torch.tensor([[-9.0, -21.0], [-15.0, -11.0]])  # the reference model's sequence log-probabilities

    width = max(chosen["labels"].shape[1], rejected["labels"].shape[1])
    fill = {"labels": IGNORED}
    batch = {
        name: torch.cat([
            torch.nn.functional.pad(part[name], (0, width - part[name].shape[1]), value=fill.get(name, 0))
            for part in (chosen, rejected)
        ])
        for name in chosen
    }  # fmt: skip
    sums = torch.from_numpy(step.logprobs(batch)).sum(dim=1)
    margin = (sums[:2] - base[0]) - (sums[2:] - base[1])
    slope = beta * torch.sigmoid(-beta * margin) / 2  # mean over two pairs
    weights = torch.cat([slope, -slope])[:, None].expand(-1, width).contiguous()
    _, found = step_gradients(step, {**batch, "weights": weights})

    def reference() -> torch.Tensor:
        kept, dropped = (torch_logprobs(model, part).sum(dim=1) for part in (chosen, rejected))
        return -torch.nn.functional.logsigmoid(beta * ((kept - base[0]) - (dropped - base[1]))).mean()

    wanted = torch_gradients(model, reference())
    assert relative(found, wanted) <= CLOSE
    assert max(np.abs(gradient).max() for gradient in wanted.values()) > 1e-3


def test_classifier_weights(bert: tuple[CompiledStep, Any]) -> None:
    """Class weights, with a row that is masked."""
    step, model = bert
    batch = class_batch([5, 9, 7])
    batch["labels"][1] = IGNORED
    weights = torch.tensor([0.2, 5.0, 1.5])
    loss, found = step_gradients(step, {**batch, "weights": weights})
    reference = -(weights * torch_logprobs(model, batch)).sum()
    assert loss == pytest.approx(float(reference.detach()), abs=CLOSE)
    wanted = torch_gradients(model, reference)
    kept = [name for name in wanted if not name.endswith("key.bias")]
    assert relative({n: found[n] for n in kept}, {n: wanted[n] for n in kept}) <= 2 * CLOSE
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert step.last is not None
    np.testing.assert_allclose(step.last.logprobs, logits.numpy(), atol=1e-5)


def test_log_probabilities(llama: tuple[CompiledStep, Any]) -> None:
    step, model = llama
    batch = token_batch([8, 11, 2])
    with torch.no_grad():
        np.testing.assert_allclose(step.logprobs(batch), torch_logprobs(model, batch).numpy(), atol=1e-5)


def test_no_gradient_runs_the_package_without_a_backward_pass(llama: tuple[CompiledStep, Any]) -> None:
    step, _ = llama
    batch = token_batch([8, 11])
    with torch.no_grad():
        loss = step(**batch)
    assert not loss.requires_grad
    assert step.last is not None
    assert step.last.gradients == {}
    assert float(loss) == pytest.approx(step_gradients(step, batch)[0], rel=SAME)


# ---------------------------------------------------------------------------------- distillation


@pytest.fixture(scope="module")
def student() -> Iterator[tuple[CompiledStep, Any]]:
    model = with_lora("llama")
    step = compiled(model, teacher_top=4)
    yield step, model
    step.close()


def teacher(batch: Batch) -> dict[str, torch.Tensor]:
    """The four likeliest tokens of another model, aligned with the labels."""
    with torch.no_grad():
        named = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = with_lora("llama", seed=9)(**named).logits
    logprobs, ids = logits.log_softmax(-1).topk(4, dim=-1)
    shift = lambda x: torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
    return {"teacher_ids": shift(ids), "teacher_logprobs": shift(logprobs)}


def test_distillation(student: tuple[CompiledStep, Any]) -> None:
    """Hard and soft labels together: the gradient of torch's own KL divergence over the teacher's four tokens."""
    step, model = student
    batch = token_batch([9, 6])
    soft = teacher(batch)
    count = counted(batch)
    weights = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(4))
    soft_weights = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(6)) / count
    _, found = step_gradients(step, {**batch, **soft, "weights": weights, "teacher_weights": soft_weights})
    loss = step.last.loss if step.last is not None else float("nan")

    named = {name: batch[name] for name in ("input_ids", "attention_mask")}
    student_logprobs = torch.nn.functional.pad(model(**named).logits[:, :-1].log_softmax(-1), (0, 0, 1, 0))
    divergence = torch.nn.functional.kl_div(
        student_logprobs.gather(2, soft["teacher_ids"]), soft["teacher_logprobs"], log_target=True, reduction="none"
    ).sum(-1)
    real = batch["attention_mask"].bool()
    real[:, 0] = False
    reference = -(weights * torch_logprobs(model, batch)).sum() + (soft_weights * divergence)[real].sum()
    assert loss == pytest.approx(float(reference.detach()), rel=1e-5)
    assert relative(found, torch_gradients(model, reference)) <= CLOSE


def test_a_teacher_is_optional(student: tuple[CompiledStep, Any], llama: tuple[CompiledStep, Any]) -> None:
    """The step with the second head, without soft labels, is the plain step."""
    batch = token_batch([9, 6])
    loss, found = step_gradients(student[0], batch)
    plain, wanted = step_gradients(llama[0], batch)
    assert loss == pytest.approx(plain, rel=SAME)
    assert_same(found, wanted)


def test_soft_labels_alone(student: tuple[CompiledStep, Any]) -> None:
    """No hard label trains: the step still has rows, and its loss is the divergence."""
    step, _ = student
    batch = token_batch([9, 6])
    soft = teacher(batch)
    masked = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    zero = torch.zeros(batch["labels"].shape)
    ones = batch["attention_mask"].float()
    _, found = step_gradients(step, {**masked, **soft, "weights": zero, "teacher_weights": ones})
    _, wanted = step_gradients(step, {**batch, **soft, "weights": zero, "teacher_weights": ones})
    assert_same(found, wanted)
    assert any(np.abs(gradient).max() > 1e-3 for gradient in found.values())


def test_a_teacher_of_another_shape_is_refused(
    student: tuple[CompiledStep, Any], llama: tuple[CompiledStep, Any]
) -> None:
    batch = token_batch([9, 6])
    soft = teacher(batch)
    with pytest.raises(InputError, match="teacher"):
        student[0](**batch, **{name: value[..., :3] for name, value in soft.items()})
    with pytest.raises(InputError, match="teacher"):
        student[0](**batch, teacher_ids=soft["teacher_ids"])
    with pytest.raises(InputError, match="teacher"):
        llama[0](**batch, **soft)
    with pytest.raises(InputError, match="teacher_id'"):
        llama[0](**batch, teacher_id=soft["teacher_ids"])


# ---------------------------------------------------------------------------------- bad batches


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": None}, "labels"),
        ({"labels": torch.full((2, 8), IGNORED)}, "masked"),
        ({"labels": torch.zeros(2, 7, dtype=torch.long)}, "labels"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, "labels"),
        ({"labels": torch.zeros(2, 8)}, "labels"),
        ({"labels": torch.full((2, 8), VOCAB_SIZE)}, "labels"),
        ({"input_ids": torch.zeros(2, 8)}, "input_ids"),
        ({"input_ids": torch.zeros(8, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.full((2, 8), VOCAB_SIZE)}, "input_ids"),
        ({"input_ids": torch.full((2, 8), -1)}, "input_ids"),
        ({"attention_mask": torch.ones(2, 7, dtype=torch.long)}, "attention_mask"),
        ({"attention_mask": torch.rand(2, 8)}, "attention_mask"),
        ({"position_ids": torch.zeros(1, 8, dtype=torch.long)}, "position_ids"),
        ({"weights": torch.ones(2, 7)}, "weights"),
        ({"weights": torch.ones(2, 8, dtype=torch.long)}, "weights"),
        ({"weights": torch.full((2, 8), float("nan"))}, "NaN"),
        ({"normaliser": 0.0}, "normaliser"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_a_wrong_batch_is_named(llama: tuple[CompiledStep, Any], change: dict[str, Any], words: str) -> None:
    batch: dict[str, Any] = {**token_batch([8, 8]), **change}
    with pytest.raises(InputError, match=words):
        llama[0](**batch)


def test_a_wrong_class_is_named(bert: tuple[CompiledStep, Any]) -> None:
    batch = class_batch([8, 8])
    for labels in (torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(InputError, match="labels"):
            bert[0](**{**batch, "labels": labels})


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(OptionError, match=r"Did you mean .*norm\.weight"):
        CompiledStep.from_model(base_model("llama"), trainable=["model.norm.weigth"])
    with pytest.raises(OptionError, match="requires a gradient"):
        CompiledStep.from_model(base_model("llama").requires_grad_(False))

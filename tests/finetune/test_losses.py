"""Weight rules: the gradient of a weighted step is torch autograd's gradient of the loss as its paper writes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB_SIZE, tiny_causal_lm
from torch.nn import functional

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune import CompiledStep
from QEfficient.finetune.losses import (
    dpo_weights,
    kto_weights,
    orpo_weights,
    policy_gradient_weights,
    sft_weights,
    spread,
)

PAIRS, SEQ = 3, 14


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_causal_lm("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at its start an adapter adds nothing, and policy and reference are one
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def step(policy):
    made = CompiledStep.from_model(policy, progress=False)
    yield made
    made.close()


@pytest.fixture(scope="module")
def answers():
    """Chosen rows, then rejected ones: prompts masked, lengths ragged, padding on the right."""
    torch.manual_seed(1)
    ids = torch.randint(4, VOCAB_SIZE, (2 * PAIRS, SEQ))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(2 * PAIRS):
        labels[row, : 3 + row % 3] = -100
        end = SEQ - row % 4
        mask[row, end:], labels[row, end:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def torch_logprobs(model, batch):
    """Log-probability of every trained label, from HF's logits: [batch, seq - 1]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    found = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels != -100, found, 0.0)


def gradients_of(step, batch, weights):
    step.zero_grad()
    step(**batch, weights=torch.from_numpy(weights)).backward()
    return {name: parameter.grad.clone() for name, parameter in step.named_parameters()}


def assert_same_gradients(found, model, loss):
    model.zero_grad()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-4  # there is something to compare
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_the_adapter_switches_off_and_on_again(step, policy, answers):
    with torch.no_grad():
        own = torch_logprobs(policy, answers)
        with policy.disable_adapter():
            base = torch_logprobs(policy, answers)
    assert float((own - base).abs().max()) > 0.1
    for adapter, expected in ((False, base), (True, own)):
        found = step.logprobs(answers, adapter=adapter)
        np.testing.assert_allclose(found[:, 1:], expected, atol=2e-5)


def test_a_step_without_an_adapter_has_no_reference(step, answers, monkeypatch):
    monkeypatch.setattr(step, "adapter", None)
    with pytest.raises(OptionError, match="no adapter"):
        step.logprobs(answers, adapter=False)


def test_sft_is_the_mean_cross_entropy(step, policy, answers):
    weights = sft_weights(answers["labels"].numpy(), answers["attention_mask"].numpy())
    loss = policy(**answers).loss
    assert_same_gradients(gradients_of(step, answers, weights), policy, loss)
    assert step.last.loss == pytest.approx(float(loss.detach()), rel=1e-5)


def test_sft_counts_the_tokens_of_a_larger_batch(answers):
    labels = answers["labels"].numpy()
    assert sft_weights(labels, trained_tokens=1000).max() == pytest.approx(1e-3)
    with pytest.raises(InputError, match="masked"):
        sft_weights(np.full((2, 3), -100))


def test_dpo(step, policy, answers):
    """The textbook form: -log sigmoid of beta times the difference of the two log-ratios."""
    beta = 0.3
    sums = step.logprobs(answers).sum(1)
    reference = step.logprobs(answers, adapter=False).sum(1)
    rule = dpo_weights(sums[:PAIRS], sums[PAIRS:], reference[:PAIRS], reference[PAIRS:], beta)
    weights = spread(
        np.concatenate([rule.chosen, rule.rejected]), answers["labels"].numpy(), answers["attention_mask"].numpy()
    )
    found = gradients_of(step, answers, weights)

    with torch.no_grad(), policy.disable_adapter():
        ref = torch_logprobs(policy, answers).sum(1)
    ratios = torch_logprobs(policy, answers).sum(1) - ref
    loss = -functional.logsigmoid(beta * (ratios[:PAIRS] - ratios[PAIRS:])).mean()
    assert_same_gradients(found, policy, loss)
    assert rule.loss == pytest.approx(float(loss.detach()), rel=1e-4)


def test_orpo(step, policy, answers):
    beta = 0.5
    places = (answers["labels"] != -100).numpy()
    sums, sizes = step.logprobs(answers).sum(1), places.sum(1)
    rule = orpo_weights(sums[:PAIRS], sums[PAIRS:], sizes[:PAIRS], sizes[PAIRS:], beta)
    weights = spread(
        np.concatenate([rule.chosen, rule.rejected]), answers["labels"].numpy(), answers["attention_mask"].numpy()
    )
    found = gradients_of(step, answers, weights)

    total = torch_logprobs(policy, answers).sum(1)
    mean = total / torch.from_numpy(sizes)
    odds = mean - torch.log1p(-torch.exp(mean))
    preference = functional.logsigmoid(odds[:PAIRS] - odds[PAIRS:])
    loss = -total[:PAIRS].sum() / int(sizes[:PAIRS].sum()) - beta * preference.mean()
    assert_same_gradients(found, policy, loss)
    assert rule.loss == pytest.approx(float(loss.detach()), rel=1e-4)


def test_kto(step, policy, answers):
    beta, kl = 0.2, 0.4
    good = np.array([True, False, True, True, False, False])
    sums, reference = step.logprobs(answers).sum(1), step.logprobs(answers, adapter=False).sum(1)
    rule = kto_weights(sums, reference, good, kl, beta, desirable_weight=1.5, undesirable_weight=0.7)
    weights = spread(rule.weights, answers["labels"].numpy(), answers["attention_mask"].numpy())
    found = gradients_of(step, answers, weights)

    ratio = torch_logprobs(policy, answers).sum(1) - torch.from_numpy(reference)
    desirable = 1.5 * (1 - torch.sigmoid(beta * (ratio - kl)))
    undesirable = 0.7 * (1 - torch.sigmoid(beta * (kl - ratio)))
    loss = torch.where(torch.from_numpy(good), desirable, undesirable).mean()
    assert_same_gradients(found, policy, loss)
    assert rule.loss == pytest.approx(float(loss.detach()), rel=1e-4)


def test_reinforce(step, policy, answers):
    gain = np.array([1.0, -0.5, 0.3, 0.0, 2.0, -1.0])
    labels, mask = answers["labels"].numpy(), answers["attention_mask"].numpy()
    rule = policy_gradient_weights(gain, step.logprobs(answers), labels, mask)
    found = gradients_of(step, answers, rule.weights)
    count = int((labels != -100).sum())
    loss = -(torch.from_numpy(gain).float()[:, None] * torch_logprobs(policy, answers)).sum() / count
    assert_same_gradients(found, policy, loss)
    assert rule.loss == pytest.approx(float(loss.detach()), rel=1e-4)


def test_ppo_clips_on_both_sides(step, policy, answers):
    labels, mask = answers["labels"].numpy(), answers["attention_mask"].numpy()
    now = step.logprobs(answers)
    old = now + np.random.default_rng(0).normal(0, 0.4, now.shape)  # ratios far beyond the clip, both ways
    gain = np.array([1.0, -0.5, 0.3, -0.2, 2.0, -1.0])
    rule = policy_gradient_weights(gain, now, labels, mask, old_logprobs=old, clip=0.2)
    trained = labels != -100
    assert 0 < int((rule.weights[trained] == 0).sum()) < int(trained.sum())  # some are clipped, some are not
    found = gradients_of(step, answers, rule.weights)

    ratio = torch.exp(torch_logprobs(policy, answers) - torch.from_numpy(old[:, 1:]).float())
    advantage = torch.from_numpy(gain).float()[:, None]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    loss = -torch.where(answers["labels"][:, 1:] != -100, surrogate, 0.0).sum() / int(trained.sum())
    assert_same_gradients(found, policy, loss)
    assert rule.loss == pytest.approx(float(loss.detach()), rel=1e-4)


def test_extreme_margins_stay_finite():
    low, high = np.array([-5000.0]), np.array([-1.0])
    for chosen, rejected in ((low, high), (high, low)):
        rule = dpo_weights(chosen, rejected, high, high, beta=1.0)
        assert np.isfinite([rule.loss, *rule.chosen, *rule.rejected]).all()
    sure = orpo_weights(np.array([0.0]), low, np.array([3.0]), np.array([3.0]))
    assert np.isfinite([sure.loss, *sure.chosen, *sure.rejected]).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dpo_weights([1.0], [1.0, 2.0], [1.0], [1.0]), "one length"),
        (lambda: dpo_weights([], [], [], []), "one length"),
        (lambda: dpo_weights([np.nan], [1.0], [1.0], [1.0]), "policy_chosen hold NaN"),
        (lambda: orpo_weights([-1.0], [-1.0], [0], [2]), "no trained token"),
        (lambda: spread([1.0], np.ones((2, 3), int)), "one per row"),
        (lambda: spread([[1.0]], np.ones((1, 3), int)), "dimensions"),
        (lambda: policy_gradient_weights([1.0], np.zeros((1, 4)), np.ones((1, 3), int)), "must agree"),
        (lambda: policy_gradient_weights([1.0], np.zeros((1, 3)), np.full((1, 3), -100)), "masked"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(InputError, match=words):
        call()

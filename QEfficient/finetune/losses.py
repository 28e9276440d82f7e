"""Losses beyond cross entropy as weights of log-probabilities: run the step forward, weigh, run it with the weights.

A compiled step returns the gradient of ``-sum(weights * log p)``. For any loss L that is a function of the labels'
log-probabilities, the chain rule makes that the gradient of L when ``weights = -dL/d(log p)`` at the current
parameters. Each rule below is that derivative, in numpy; the step's own loss value is then not L, which the rule
returns beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from QEfficient.errors import InputError
from QEfficient.finetune.step_session import trained_places


@dataclass(frozen=True)
class LossWeights:
    """A loss and what to weigh log-probabilities with for its gradient.

    Attributes:
        loss: the loss at these log-probabilities.
        weights: float32, of the shape the rule says.
    """

    loss: float
    weights: np.ndarray


@dataclass(frozen=True)
class PairWeights:
    """A loss over pairs of answers.

    Attributes:
        loss: the loss at these log-probabilities.
        chosen, rejected: float32 [pairs], a weight for every token of the pair's answers; see `spread`.
    """

    loss: float
    chosen: np.ndarray
    rejected: np.ndarray


def spread(values: np.ndarray, labels: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
    """A value per sequence -> weights of its trained tokens, float32 [batch, seq], 0 elsewhere.

    Args:
        values: [batch].
        labels: int64 [batch, seq], -100 where nothing is trained.
        attention_mask: [batch, seq]; None means that there is no padding. One sequence per row, so not packed.

    Raises:
        InputError: shapes that do not fit each other.
    """
    values = _floats("values", values, 1)
    places = _places(labels, attention_mask)
    if values.shape[0] != places.shape[0]:
        raise InputError(f"there are {values.shape[0]} values for {places.shape[0]} rows: pass one per row.")
    return np.where(places, values[:, None], 0).astype(np.float32)


def sft_weights(
    labels: np.ndarray, attention_mask: np.ndarray | None = None, trained_tokens: int | None = None
) -> np.ndarray:
    """Cross entropy: weights 1/N on the N trained tokens, float32 [batch, seq].

    Args:
        trained_tokens: N, where the batch is a part of a larger one; None counts this batch's.

    Raises:
        InputError: nothing is trained.
    """
    places = _places(labels, attention_mask)
    count = int(places.sum()) if trained_tokens is None else trained_tokens
    if count < 1:
        raise InputError("every label is masked (-100): there is nothing to train on.")
    return (places / count).astype(np.float32)


def dpo_weights(
    policy_chosen: np.ndarray,
    policy_rejected: np.ndarray,
    ref_chosen: np.ndarray,
    ref_rejected: np.ndarray,
    beta: float = 0.1,
) -> PairWeights:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    With ``z = beta * [(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)]`` and n pairs::

        L = mean(-log sigmoid(z)),   weights = +beta * sigmoid(-z) / n on chosen, the negative on rejected tokens

    Args:
        policy_chosen, policy_rejected: log-probabilities of whole answers (sums over their tokens), [pairs].
        ref_chosen, ref_rejected: the same under the reference model, such as the base without its adapter.
        beta: how strongly the policy is held to the reference.

    Raises:
        InputError: arrays of different lengths, not-a-number, or no pairs.
    """
    chosen, rejected, ref_c, ref_r = _same(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    z = beta * ((chosen - ref_c) - (rejected - ref_r))
    weights = beta * _sigmoid(-z) / z.size
    return PairWeights(float(-_log_sigmoid(z).mean()), *_float32(weights, -weights))


def reward_weights(chosen: np.ndarray, rejected: np.ndarray) -> PairWeights:
    """The Bradley-Terry loss of a reward model (Ouyang et al. 2022, arXiv:2203.02155, equation 1).

    With n pairs of scores::

        L = mean(-log sigmoid(chosen - rejected)),   weights = sigmoid(rejected - chosen) / n on chosen, the negative on
        rejected scores

    Args:
        chosen, rejected: scores, [pairs].

    Raises:
        InputError: arrays of different lengths, not-a-number, or no pairs.
    """
    better, worse = _same(chosen=chosen, rejected=rejected)
    weights = _sigmoid(worse - better) / better.size
    return PairWeights(float(-_log_sigmoid(better - worse).mean()), *_float32(weights, -weights))


def orpo_weights(
    chosen: np.ndarray,
    rejected: np.ndarray,
    chosen_lengths: np.ndarray,
    rejected_lengths: np.ndarray,
    beta: float = 0.1,
) -> PairWeights:
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, equations 4 to 7); needs no reference.

    With ``a`` the mean log-probability of an answer's tokens, ``odds(a) = a - log(1 - exp(a))``, ``z = odds(a_chosen) -
    odds(a_rejected)``, n pairs and N trained tokens in all chosen answers::

        L = -sum(log p of chosen)/N + beta * mean(-log sigmoid(z))

    Args:
        chosen, rejected: log-probabilities of whole answers, [pairs].
        chosen_lengths, rejected_lengths: their trained tokens, [pairs].

    Raises:
        InputError: arrays of different lengths, not-a-number, or an answer without trained tokens.
    """
    sums_c, sums_r, size_c, size_r = _same(
        chosen=chosen, rejected=rejected, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    )
    if min(size_c.min(), size_r.min()) < 1:
        raise InputError("an answer of a pair has no trained token: leave the pair out.")
    # A mean of exactly 0 has infinite odds; the largest number below it has not.
    mean_c, mean_r = (np.minimum(s / n, -1e-12) for s, n in ((sums_c, size_c), (sums_r, size_r)))
    not_c, not_r = -np.expm1(mean_c), -np.expm1(mean_r)  # 1 - exp(a)
    z = (mean_c - np.log(not_c)) - (mean_r - np.log(not_r))
    pull = beta * _sigmoid(-z) / z.size
    loss = -sums_c.sum() / size_c.sum() - beta * _log_sigmoid(z).mean()
    return PairWeights(float(loss), *_float32(1 / size_c.sum() + pull / (not_c * size_c), -pull / (not_r * size_r)))


def kto_weights(
    policy: np.ndarray,
    reference: np.ndarray,
    desirable: np.ndarray,
    kl: float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossWeights:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8): answers need no partner.

    With ``r = policy - reference`` and n answers::

        L = mean(weight * (1 - sigmoid(s * beta * (r - kl)))),   s = +1 where desirable, else -1

    Args:
        policy, reference: log-probabilities of whole answers, [answers].
        desirable: bool [answers].
        kl: the paper's z0, an estimate of the divergence of policy and reference that no gradient passes through: the
            mean of ``r`` over answers paired with other prompts, at least 0.

    Returns:
        weights [answers]; see `spread`.

    Raises:
        InputError: arrays of different lengths, or not-a-number.
    """
    own, ref, good = _same(policy=policy, reference=reference, desirable=np.asarray(desirable, np.float64))
    sign, scale = np.where(good != 0, 1.0, -1.0), np.where(good != 0, desirable_weight, undesirable_weight)
    value = _sigmoid(sign * beta * (own - ref - kl))
    weights = scale * beta * sign * value * (1 - value) / own.size
    return LossWeights(float((scale * (1 - value)).mean()), *_float32(weights))


def policy_gradient_weights(
    advantages: np.ndarray,
    logprobs: np.ndarray,
    labels: np.ndarray,
    attention_mask: np.ndarray | None = None,
    old_logprobs: np.ndarray | None = None,
    clip: float = 0.2,
) -> LossWeights:
    """Policy gradient over sampled tokens: REINFORCE, or PPO's clipped surrogate where the samples are older.

    With N trained tokens, advantage A of each and ``ratio = exp(log p - old log p)``::

        REINFORCE (Williams 1992):                      L = -sum(A * log p) / N,   weights = A / N
        PPO (Schulman et al. 2017, arXiv:1707.06347):   L = -sum(min(ratio * A, clipped(ratio) * A)) / N,
            clipped to [1 - clip, 1 + clip]; weights = ratio * A / N, and 0 where the clipped value is the smaller one

    GRPO's advantages, (reward - mean of the group) / standard deviation of the group, go in as they are.

    Args:
        advantages: float [batch] or [batch, seq].
        logprobs: float [batch, seq] of the labels, as `CompiledStep.logprobs` returns them.
        old_logprobs: those of the policy that sampled the tokens; None means REINFORCE.

    Returns:
        weights [batch, seq].

    Raises:
        InputError: shapes that do not fit each other, not-a-number, or nothing trained.
    """
    places = _places(labels, attention_mask)
    count = int(places.sum())
    if count == 0:
        raise InputError("every label is masked (-100): there is nothing to train on.")
    now = _floats("logprobs", logprobs, 2)
    gain = np.asarray(advantages, np.float64)
    gain = _floats("advantages", gain[:, None] * np.ones(places.shape) if gain.ndim == 1 else gain, 2)
    before = None if old_logprobs is None else _floats("old_logprobs", old_logprobs, 2)
    for name, array in (("logprobs", now), ("advantages", gain), ("old_logprobs", now if before is None else before)):
        if array.shape != places.shape:
            raise InputError(f"{name} have shape {array.shape}, the labels {places.shape}: they must agree.")
    if before is None:
        loss, weights = -(gain * now)[places].sum() / count, gain / count
    else:
        ratio = np.exp(np.where(places, now - before, 0))
        plain, clipped = ratio * gain, np.clip(ratio, 1 - clip, 1 + clip) * gain
        loss, weights = -np.minimum(plain, clipped)[places].sum() / count, np.where(plain <= clipped, plain, 0) / count
    return LossWeights(float(loss), *_float32(np.where(places, weights, 0)))


def _places(labels: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
    """bool [batch, seq]: the labels that count."""
    labels = np.asarray(labels)
    mask = np.ones_like(labels) if attention_mask is None else np.asarray(attention_mask)
    if labels.ndim != 2 or mask.shape != labels.shape:
        raise InputError(f"labels {labels.shape} and attention_mask {mask.shape} must have one shape [batch, seq].")
    return trained_places(labels, mask)


def _same(**arrays: np.ndarray) -> list[np.ndarray]:
    found = [_floats(name, array, 1) for name, array in arrays.items()]
    if len({array.shape for array in found}) > 1 or found[0].size == 0:
        shapes = ", ".join(f"{name} {np.shape(array)}" for name, array in arrays.items())
        raise InputError(f"these must be of one length of at least 1: {shapes}.")
    return found


def _floats(name: str, value: np.ndarray, rank: int) -> np.ndarray:
    array = np.asarray(value, np.float64)
    if array.ndim != rank:
        raise InputError(f"{name} must have {rank} dimensions, got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise InputError(f"{name} hold NaN or infinity.")
    return array


def _float32(*arrays: np.ndarray) -> list[np.ndarray]:
    return [array.astype(np.float32) for array in arrays]


def _log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(_log_sigmoid(x))

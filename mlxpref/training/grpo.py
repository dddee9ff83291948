"""Group relative policy optimisation: advantages and losses as pure functions of arrays.

Sources: GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783; DAPO, arXiv 2503.14476; sequence-level ratios (GSPO),
arXiv 2507.18071. Departures from TRL, on purpose:
- Losses are normalised over the whole step, so the result does not depend on micro-batches. Of what depends on lengths,
  TRL does so for `dapo` only: its `bnpo` divides by the tokens of each micro-batch and takes the mean of these, so a
  token among short completions weighs more. With one micro-batch a step, or one length of all completions, both are
  equal.
- The answer position of `soft` and `brier` gets the exact gradient of its reward instead of a sampled token's.

Letters: R rows (rollouts of all groups), T completion tokens.
"""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.config import Level, LossType

Floats = NDArray[np.float64]


def group_advantages(rewards: Floats) -> Floats:
    """Return each reward minus its group's mean, over its group's standard deviation (n - 1), as GRPO defines it.

    (P, G) -> (P, G), G at least 2. The row of a group with equal rewards is zero.
    """
    difference: Floats = rewards - rewards.mean(axis=1, keepdims=True)
    deviation: Floats = rewards.std(axis=1, ddof=1, keepdims=True)
    return difference / (deviation + 1e-4)


def leave_one_out_advantages(rewards: Floats) -> Floats:
    """Return each reward minus the mean of the other rewards of its group: (P, G) -> (P, G), 0 where G is 1.

    The baseline does not depend on the rollout itself, so the gradient is unbiased (RLOO, arXiv 2402.14740).
    """
    size = rewards.shape[1]
    mean: Floats = rewards.mean(axis=1, keepdims=True)
    advantages: Floats = (rewards - mean) * (size / max(size - 1, 1))
    return advantages


def token_weights(mask: NDArray[np.bool_], loss_type: LossType, max_tokens: int) -> Floats:
    """Return each token's weight in the step's loss: (R, T) -> (R, T), zero outside the mask.

    `grpo`: equal weights of rollouts, which their tokens share; `bnpo` and `dapo`: equal weights of the step's tokens
    (TRL's dapo counts tokens over all processes, bnpo over the local batch; over a whole step they are equal);
    `dr_grpo`: every token 1 / (R max_tokens). Empty rollouts count, too.
    """
    weights: Floats = mask.astype(np.float64)
    if loss_type == "grpo":
        lengths: Floats = weights.sum(axis=1, keepdims=True)
        return weights / np.maximum(lengths, 1) / len(mask)
    if loss_type == "dr_grpo":
        return weights / (len(mask) * max_tokens)
    return weights / max(float(weights.sum()), 1.0)


def policy_objective(
    logprobs: mx.array,
    old: mx.array,
    advantages: mx.array,
    mask: mx.array,
    level: Level = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[mx.array, mx.array]:
    """Return the clipped surrogate of every token, to be maximised, and whether clipping took its gradient away.

    (R, T), (R, T), (R,), (R, T) -> (R, T), (R, T). `old` are the sampling policy's log-probabilities from the scoring
    pass; for the first update pass `mx.stop_gradient(logprobs)`: the ratio is then exactly 1. `level` "sequence" uses
    one ratio a rollout, the geometric mean over its tokens.
    """
    difference = logprobs - old
    if level == "sequence":
        weights = mask.astype(difference.dtype)
        lengths = mx.maximum(weights.sum(axis=1, keepdims=True), 1)
        difference = (difference * weights).sum(axis=1, keepdims=True) / lengths  # (R, 1)
    ratio = mx.exp(difference)
    clipped = mx.clip(ratio, 1 - clip_low, 1 + clip_high)
    advantage = advantages[:, None]
    objective = mx.minimum(ratio * advantage, clipped * advantage)
    is_clipped = ((ratio < 1 - clip_low) & (advantage < 0)) | ((ratio > 1 + clip_high) & (advantage > 0))
    return mx.broadcast_to(objective, logprobs.shape), mx.broadcast_to(is_clipped, logprobs.shape)


def kl_to_reference(logprobs: mx.array, reference: mx.array) -> mx.array:
    """Return the k3 estimate of the divergence from the reference a token: exp(r - l) - (r - l) - 1, never negative.

    (R, T), (R, T) -> (R, T). Schulman, "Approximating KL divergence", 2020. Exactly 0 where both are equal.
    """
    difference = reference - logprobs
    return mx.expm1(difference) - difference

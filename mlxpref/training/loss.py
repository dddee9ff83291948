"""The loss of a training step, as a pure function of log-probabilities and `LossInputs`.

Letters: P prompts of this process's groups in the loss, R = P G rollouts of theirs, T completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.config import TrainSettings
from mlxpref.engine.logprobs import Completions, Logprobs
from mlxpref.engine.vlm import ComparisonInput
from mlxpref.training.group_rewards import GroupRewards
from mlxpref.training.grpo import kl_to_reference, policy_objective, token_weights
from mlxpref.training.rewards import RewardMix
from mlxpref.training.rollouts import RolloutGroup


@dataclass(frozen=True)
class LossInputs:
    """The inputs of a step's loss, apart from the policy.

    `prompts` (P) and `completions` (R, T) are to be scored, `mix` the rewards. `mask`, `weights` (R, T): the tokens in
    the loss, and their weights; `answer_weights` (R,): the answer position's weight, 0 if it was not reached or is not
    integrated out; `advantages`, `y` (R,). Log-probabilities (R, T): `reference` without the adapter, None without a
    divergence; `old` before the step's first update, None at that update; `sampled` from sampling. `sampled` and
    `step_tokens`, the tokens of all processes in the loss, serve only measurements.
    """

    prompts: Sequence[ComparisonInput]
    completions: Completions
    mix: RewardMix
    mask: mx.array
    weights: mx.array
    answer_weights: mx.array
    advantages: mx.array
    y: mx.array
    reference: mx.array | None = None
    old: mx.array | None = None
    sampled: NDArray[np.float64] | None = None
    step_tokens: int = 1

    def part(self, prompts: slice, rows: slice) -> "LossInputs":
        """Return the inputs of some prompts and rows, cut to their longest completion."""
        completions = self.completions.part(rows)
        columns = completions.tokens.shape[1]
        by_token = {
            name: value[rows, :columns]
            for name in ("mask", "weights", "reference", "old")
            if (value := getattr(self, name)) is not None
        }
        by_row = {name: getattr(self, name)[rows] for name in ("answer_weights", "advantages", "y")}
        return replace(self, prompts=self.prompts[prompts], completions=completions, **by_token, **by_row)


def loss_inputs(
    groups: Sequence[RolloutGroup], rewards: GroupRewards, settings: TrainSettings, mix: RewardMix
) -> LossInputs:
    """Return this process's part of a step: the groups that it wrote and that have a gradient.

    Weights are those of the whole step, including groups that are left out here. An answer position counts as one more
    token of its rollout. Rollouts outside the loss count as empty: their tokens weigh nothing, and the step's others
    weigh more where tokens share a weight.
    """
    size = rewards.advantages.shape[1]
    lengths = np.array([len(rollout.tokens) for group in groups for rollout in group.rollouts])  # (P G,) of the step
    answered, in_loss = rewards.answered.reshape(-1), rewards.in_loss.reshape(-1)  # (P, G) -> (P G,)
    columns = np.arange(int(lengths.max(initial=0)) + 1)  # one more for the answer position
    token_mask = (columns < (lengths + answered)[:, None]) & in_loss[:, None]  # (P G, T + 1)
    weights = token_weights(token_mask, settings.loss_type, settings.max_tokens + mix.exact)

    mine = [i for i, group in enumerate(groups) if group.input is not None and rewards.has_gradient[i]]
    rows = (np.array(mine, int)[:, None] * size + np.arange(size)).reshape(-1)  # (R,)
    rollouts = [rollout for i in mine for rollout in groups[i].rollouts]
    completions = Completions.of([rollout.tokens for rollout in rollouts])
    mask = completions.mask & in_loss[rows][:, None]  # (R, T)
    sampled = np.zeros(mask.shape)
    for row, rollout in enumerate(rollouts):
        sampled[row, : len(rollout.tokens)] = rollout.logprobs
    y = np.array([group.comparison.y for group in groups])
    return LossInputs(
        prompts=[prompt for i in mine if (prompt := groups[i].input)],
        completions=completions,
        mix=mix,
        mask=mx.array(mask),
        weights=_float32(weights[rows][:, : mask.shape[1]] * mask),
        answer_weights=_float32(weights[rows, lengths[rows]] * answered[rows]),
        advantages=_float32(rewards.advantages.reshape(-1)[rows]),  # (P, G) -> (P G,) -> (R,)
        y=_float32(np.repeat(y, size)[rows]),
        sampled=sampled,
        step_tokens=max(int(lengths.reshape(-1, size)[rewards.has_gradient].sum()), 1),
    )


def step_loss(logprobs: Logprobs, inputs: LossInputs, settings: TrainSettings) -> tuple[mx.array, mx.array]:
    """Return the loss of one update, and the number of tokens without a gradient by clipping; both sum over rows.

    At a step's first update the rollouts are the policy's own and importance ratios are exactly 1. Reasoning tokens:
    the policy gradient, and the divergence from the reference. Answer positions: minus the rewards that are functions
    of the labels' probabilities, so that their gradient is exact.
    """
    surrogate, clipped = policy_objective(  # (R, T), (R, T)
        logprobs.logprobs,
        mx.stop_gradient(logprobs.logprobs) if inputs.old is None else inputs.old,
        inputs.advantages,
        inputs.mask,
        settings.level,
        settings.clip_low,
        settings.clip_high,
    )
    loss = -_weighted_sum(surrogate, inputs.weights)
    if inputs.reference is not None:
        divergence = kl_to_reference(logprobs.logprobs, inputs.reference)  # (R, T)
        loss = loss + settings.kl * _weighted_sum(divergence, inputs.weights)
    if inputs.mix.exact:
        # Safe values where no answer counts: factors of 0 must be finite, in the backward pass, too.
        labels = mx.where(inputs.answer_weights[:, None] > 0, logprobs.label_logprobs, -1.0)  # (R, 2)
        p1, p2 = mx.exp(labels[:, 0]), mx.exp(labels[:, 1])
        reward = inputs.mix.integrated(p1, p2, inputs.y, settings.format_weight)  # (R,)
        loss = loss - _weighted_sum(reward, inputs.answer_weights)
    return loss, (clipped & inputs.mask).sum()


def _weighted_sum(values: mx.array, weights: mx.array) -> mx.array:
    """The weighted sum of finite values."""
    return mx.where(weights > 0, values * weights, 0).sum()


def _float32(values: NDArray[np.float64]) -> mx.array:
    return mx.array(values.astype(np.float32))

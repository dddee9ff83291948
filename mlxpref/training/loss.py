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
from mlxpref.training.agreement import agreement, other_order
from mlxpref.training.group_rewards import GroupRewards
from mlxpref.training.grpo import kl_to_reference, policy_objective, token_weights
from mlxpref.training.rewards import RewardMix
from mlxpref.training.rollouts import RolloutGroup


@dataclass(frozen=True)
class LossInputs:
    """The inputs of a step's loss, apart from the policy.

    `prompts` (P) and `completions` (R, T) are to be scored, `mix` the rewards. `mask`, `weights` (R, T): the tokens in
    the loss, and their weights; `answer_weights` (R,): the answer position's weight, 0 if it was not reached or is not
    integrated out; `advantages`, `y`, and `form` (R,), the reward of a right form. Log-probabilities (R, T):
    `reference` without the adapter, None without a divergence; `old` before the step's first update, None at that
    update; `sampled` from sampling. `reference_states` (R, D) are those of the answer positions without the adapter,
    `other_order` (R, 3) what `agreement` takes from the pair's other order, None where that is not rewarded.
    `read` are the answers to the same prompts that are read at once, one row each; `is_read` marks them. `sampled`,
    `step_tokens` and `step_positions`, the tokens of all processes in the loss without and with answer positions, serve
    only measurements.
    """

    prompts: Sequence[ComparisonInput]
    completions: Completions
    mix: RewardMix
    mask: mx.array
    weights: mx.array
    answer_weights: mx.array
    advantages: mx.array
    y: mx.array
    form: mx.array
    reference: mx.array | None = None
    reference_states: mx.array | None = None
    other_order: mx.array | None = None
    old: mx.array | None = None
    sampled: NDArray[np.float64] | None = None
    step_tokens: int = 0
    step_positions: int = 0
    read: "LossInputs | None" = None
    is_read: bool = False

    def part(self, prompts: slice, rows: slice) -> "LossInputs":
        """Return the inputs of some prompts and rows, cut to their longest completion."""
        completions = self.completions.part(rows)
        columns = completions.tokens.shape[1]
        by_token = {
            name: value[rows, :columns]
            for name in ("mask", "weights", "reference", "old")
            if (value := getattr(self, name)) is not None
        }
        by_row = {
            name: value[rows]
            for name in ("answer_weights", "advantages", "y", "form", "reference_states", "other_order")
            if (value := getattr(self, name)) is not None
        }
        read = self.read and self.read.part(prompts, prompts)
        return replace(self, prompts=self.prompts[prompts], completions=completions, read=read, **by_token, **by_row)

    def pieces(self, size: int) -> list["LossInputs"]:
        """Return what runs behind the prompts at a time: the completions, `size` at most, and the answers read at once.

        More than `size` completions must be those of one prompt.
        """
        rows, prompts = len(self.completions.lengths), slice(None)
        pieces = [self.part(prompts, slice(start, min(start + size, rows))) for start in range(0, rows, size)]
        return [*(replace(piece, read=None) for piece in pieces), *([self.read] if self.read else [])]


def reading_of(settings: TrainSettings, mix: RewardMix) -> RewardMix | None:
    """Return the rewards of the answer read at once, if training with thinking teaches it, too."""
    return mix.reading if settings.think and settings.read_weight else None


def loss_inputs(
    groups: Sequence[RolloutGroup],
    rewards: GroupRewards,
    settings: TrainSettings,
    mix: RewardMix,
    at_once: Sequence[int] = (),
    lead: Sequence[int] = (),
) -> LossInputs:
    """Return this process's part of a step: the groups that it wrote and that have a gradient.

    Weights are those of the whole step, including groups that are left out here. An answer position counts as one more
    token of its rollout. Rollouts outside the loss count as empty: their tokens weigh nothing, and the step's others
    weigh more where tokens share a weight.

    The tokens `lead` stand between each completion and its answer, without being written: a tie may come before them.

    The tokens `at_once` lead from a prompt to the answer read at once. It weighs `read_weight` times the answer
    positions of a whole group, so that the expected rewards of both ways to answer stand in that proportion, however
    long the reasons. Groups without any other gradient are in the loss for it alone, their completions empty.
    """
    size = rewards.advantages.shape[1]
    lengths = np.array([len(rollout.tokens) for group in groups for rollout in group.rollouts])  # (P G,) of the step
    answered, in_loss = rewards.answered.reshape(-1), rewards.in_loss.reshape(-1)  # (P, G) -> (P G,)
    columns = np.arange(int(lengths.max(initial=0)) + 1)  # one more for the answer position
    token_mask = (columns < (lengths + answered)[:, None]) & in_loss[:, None]  # (P G, T + 1)
    weights = token_weights(token_mask, settings.loss_type, settings.max_tokens + mix.exact)

    reading, active = reading_of(settings, mix), rewards.has_gradient
    mine = [i for i, group in enumerate(groups) if group.input is not None and (active[i] or reading)]
    rows = (np.array(mine, int)[:, None] * size + np.arange(size)).reshape(-1)  # (R,)
    rollouts = [rollout if active[i] else None for i in mine for rollout in groups[i].rollouts]
    tokens_of = [rollout.tokens if rollout else () for rollout in rollouts]
    completions = Completions.of(tokens_of, lead, [rollout.experts if rollout else None for rollout in rollouts])
    mask = completions.mask & in_loss[rows][:, None]  # (R, T)
    sampled = np.zeros(mask.shape)
    for row, rollout in enumerate(rollouts):
        if rollout:
            sampled[row, : len(rollout.tokens)] = rollout.logprobs
    y = np.array([group.comparison.y for group in groups])
    prompts = [prompt for i in mine if (prompt := groups[i].input)]
    answers = answered & np.repeat(active, size)
    moments = np.repeat(other_order(groups), size, axis=0)[rows] if settings.agreement else None
    tokens = int(lengths.reshape(-1, size)[active].sum())
    read = None
    if reading:
        weight = settings.read_weight * size * float(weights.sum()) / max(int(token_mask.sum()), 1)
        read = _read_inputs(prompts, at_once, reading, weight, y[mine], settings.format_weight)
    return LossInputs(
        prompts=prompts,
        completions=completions,
        mix=mix,
        mask=mx.array(mask),
        weights=_float32(np.where(mask, _columns(weights[rows], mask.shape[1]), 0)),
        answer_weights=_float32(weights[rows, lengths[rows]] * answers[rows]),
        advantages=_float32(rewards.advantages.reshape(-1)[rows]),  # (P, G) -> (P G,) -> (R,)
        y=_float32(np.repeat(y, size)[rows]),
        form=_float32(settings.format_weight * rewards.well_formed.reshape(-1)[rows]),
        other_order=None if moments is None else _float32(moments),
        sampled=sampled,
        step_tokens=tokens,
        step_positions=tokens + int(answers.sum()) + (len(groups) if reading else 0),
        read=read,
    )


def _read_inputs(
    prompts: Sequence[ComparisonInput],
    at_once: Sequence[int],
    mix: RewardMix,
    weight: float,
    y: NDArray[np.float64],
    form: float,
) -> LossInputs:
    """The inputs of the answers read at once, P rows: no token weighs anything, and the form is always right."""
    completions = Completions.of([()] * len(prompts), at_once)
    nothing = np.zeros(completions.tokens.shape)
    return LossInputs(
        prompts=prompts,
        completions=completions,
        mix=mix,
        mask=mx.array(nothing > 0),
        weights=_float32(nothing),
        answer_weights=_float32(np.full(len(prompts), weight)),
        advantages=_float32(np.zeros(len(prompts))),
        y=_float32(y),
        form=_float32(np.full(len(prompts), form)),
        is_read=True,
    )


def p_first_of(labels: mx.array) -> mx.array:
    """Return the preference for the first image (R,) from log-probabilities of labels (R, 2), or (R, 3) with a tie."""
    if labels.shape[1] > 2:
        shares = mx.softmax(labels, axis=1)
        return shares[:, 0] + shares[:, 2] / 2
    return mx.sigmoid(labels[:, 0] - labels[:, 1])


def step_loss(logprobs: Logprobs, inputs: LossInputs, settings: TrainSettings) -> tuple[mx.array, mx.array]:
    """Return the loss of one update, and measurements (4,); all are sums over rows.

    At a step's first update the rollouts are the policy's own and importance ratios are exactly 1. Reasoning tokens:
    the policy gradient, and the estimated divergence from the reference. Answer positions: minus the rewards that are
    functions of the labels' probabilities, and the divergence of the distribution there; both gradients are exact. The
    measurements are the tokens without a gradient by clipping, the divergence, the answers read at once that lean to
    the majority's side, and the experts that the tokens were given and the update would not have chosen.
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
    loss, divergence, right = -_weighted_sum(surrogate, inputs.weights), mx.array(0.0), mx.array(0.0)
    if inputs.reference is not None:
        of_tokens = kl_to_reference(logprobs.logprobs, inputs.reference)  # (R, T)
        loss = loss + settings.kl * _weighted_sum(of_tokens, inputs.weights)
        divergence = mx.where(inputs.mask, of_tokens, 0).sum()
    if inputs.mix.exact:
        # Safe values where no answer counts: factors of 0 must be finite, in the backward pass, too.
        counts = inputs.answer_weights > 0
        labels = mx.where(counts[:, None], logprobs.label_logprobs, -1.0)  # (R, 2), or (R, 3) with a tie
        p_first = p_first_of(labels)
        reward = inputs.mix.integrated(mx.exp(labels).sum(axis=1), p_first, inputs.y, inputs.form)  # (R,)
        if inputs.other_order is not None:
            reward = reward + settings.agreement * agreement(p_first, inputs.other_order)
        loss = loss - _weighted_sum(reward, inputs.answer_weights)
        if logprobs.answer_kl is not None:
            loss = loss + settings.kl * _weighted_sum(logprobs.answer_kl, inputs.answer_weights)
            divergence = divergence + mx.where(counts, logprobs.answer_kl, 0).sum()
        if inputs.is_read:
            lean = labels[:, 0] - labels[:, 1]
            right = (mx.sign(lean) == mx.sign(inputs.y - 0.5)).astype(mx.float32).sum()
    others = mx.array(0.0) if logprobs.other_experts is None else logprobs.other_experts
    return loss, mx.stack([(clipped & inputs.mask).sum().astype(mx.float32), divergence, right, others])


def _columns(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The first `count` columns of values (R, T), with zeros behind them where there are fewer."""
    return np.pad(values[:, :count], ((0, 0), (0, max(0, count - values.shape[1]))))


def _weighted_sum(values: mx.array, weights: mx.array) -> mx.array:
    """The weighted sum of finite values."""
    return mx.where(weights > 0, values * weights, 0).sum()


def _float32(values: NDArray[np.float64]) -> mx.array:
    return mx.array(values.astype(np.float32))

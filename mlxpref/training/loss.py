"""The loss of a training step: scores of rollouts and what they should become, as pure functions of arrays.

R rows are the rollouts of the groups that teach something, T their completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxpref.config import TrainSettings
from mlxpref.engine.logprobs import Logprobs
from mlxpref.training.grpo import kl_to_reference, policy_objective, token_weights
from mlxpref.training.rewards import reward_mix

__all__ = ["LossInputs", "loss_inputs", "step_loss"]


@dataclass(frozen=True)
class LossInputs:
    """What the loss of a step needs beside the scores.

    `mask` and `weights` (R, T): where a token was written, and what it counts; `answer_weights` (R,): what the answer
    position counts, 0 where it was not reached or its gradient is not taken exactly; `advantages` and `y` (R,);
    `reference` (R, T): log-probabilities without the adapter; `old` (R, T): those before the step's first update, None
    at that update.
    """

    mask: mx.array
    weights: mx.array
    answer_weights: mx.array
    advantages: mx.array
    y: mx.array
    reference: mx.array | None = None
    old: mx.array | None = None

    def part(self, rows: slice, columns: int) -> "LossInputs":
        """Those of some rows, as far as their completions reach."""
        across = {
            name: value[rows, :columns]
            for name in ("mask", "weights", "reference", "old")
            if (value := getattr(self, name)) is not None
        }
        along = {name: getattr(self, name)[rows] for name in ("answer_weights", "advantages", "y")}
        return replace(self, **across, **along)


def loss_inputs(
    lengths: Sequence[Sequence[int]],
    answered: NDArray[np.bool_],
    advantages: NDArray[np.float64],
    y: NDArray[np.float64],
    chosen: Sequence[int],
    settings: TrainSettings,
    counted: NDArray[np.bool_] | None = None,
) -> LossInputs:
    """The targets of the chosen groups of a step.

    `lengths`, `answered`, `advantages` (P, G) and `y` (P,) are those of the whole step: groups that are left out stay
    in the count of what a token weighs. An answer position counts as one more token of its rollout. Rollouts that are
    not `counted` (P, G) count as empty ones: their tokens weigh nothing, and the others of the step weigh more where
    tokens share a weight.
    """
    group = advantages.shape[1]
    written, ends = np.array(lengths).reshape(-1), answered.reshape(-1)
    columns = np.arange(int(written.max(initial=0)) + 1)
    exact = reward_mix(settings.reward).exact
    kept = np.ones_like(ends) if counted is None else counted.reshape(-1)
    weighing = (columns < (written + ends)[:, None]) & kept[:, None]
    weights = token_weights(weighing, settings.loss_type, settings.max_tokens + exact)
    rows = np.isin(np.repeat(np.arange(len(answered)), group), chosen)
    written, ends, weights = written[rows], ends[rows], weights[rows]
    mask = (np.arange(int(written.max(initial=0))) < written[:, None]) & kept[rows][:, None]
    return LossInputs(
        mask=mx.array(mask),
        weights=_floats(weights[:, : mask.shape[1]] * mask),
        answer_weights=_floats(weights[np.arange(len(written)), written] * ends),
        advantages=_floats(advantages.reshape(-1)[rows]),
        y=_floats(np.repeat(y, group)[rows]),
    )


def step_loss(scores: Logprobs, targets: LossInputs, settings: TrainSettings) -> tuple[mx.array, mx.array]:
    """The loss of one update, and how many tokens had their gradient taken away by clipping; both add up over rows.

    At a step's first update the rollouts are the policy's own and importance ratios are exactly 1. Reasoning tokens:
    the policy gradient, and the divergence from the reference. Answer positions: minus the rewards that are functions
    of the labels' probabilities, so that their gradient is exact.
    """
    surrogate, clipped = policy_objective(
        scores.logprobs,
        mx.stop_gradient(scores.logprobs) if targets.old is None else targets.old,
        targets.advantages,
        targets.mask,
        settings.level,
        settings.clip_low,
        settings.clip_high,
    )
    loss = -_weighted(surrogate, targets.weights)
    if targets.reference is not None:
        loss = loss + settings.kl * _weighted(kl_to_reference(scores.logprobs, targets.reference), targets.weights)
    if (mix := reward_mix(settings.reward)).exact:
        # Where no answer counts, safe values: what is multiplied by 0 must be finite in the backward pass, too.
        labels = mx.where(targets.answer_weights[:, None] > 0, scores.label_logprobs, -1.0)
        p1, p2 = mx.exp(labels[:, 0]), mx.exp(labels[:, 1])
        earned = mix.integrated(p1, p2, targets.y, settings.format_weight)
        loss = loss - _weighted(earned, targets.answer_weights)
    return loss, (clipped & targets.mask).sum()


def _weighted(values: mx.array, weights: mx.array) -> mx.array:
    """The weighted sum of finite values."""
    return mx.where(weights > 0, values * weights, 0).sum()


def _floats(values: NDArray[np.float64]) -> mx.array:
    return mx.array(values.astype(np.float32))

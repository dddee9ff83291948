"""The rewards and advantages of a step's rollouts: P groups of G rollouts, as arrays (P, G)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from mlx.utils import tree_map
from numpy.typing import NDArray

from mlxpref.config import TrainSettings
from mlxpref.distributed import SINGLE_PROCESS, ProcessGroup
from mlxpref.training.agreement import agreement, other_order
from mlxpref.training.grpo import group_advantages, leave_one_out_advantages
from mlxpref.training.rejection import kept_completions
from mlxpref.training.rewards import EXACT_REWARDS, RewardMix, RewardPart, agreement_reward, length_reward
from mlxpref.training.rollouts import RolloutGroup
from mlxpref.verdict import Verdict

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class GroupRewards:
    """The rewards and advantages of P groups of G rollouts, and their parts.

    `rewards`, `advantages` (P, G); `components` (P, G) each: the unweighted parts of the reward by name; `correct` (P,
    G): whether a rollout leans to the majority's side; `well_formed` (P, G): whether its form is right; `answered` (P,
    G): whether its answer position has a gradient of its own; `in_loss` (P, G): whether its tokens are in the loss;
    `has_advantage` (P,): whether its rewards give a group a gradient, through advantages or answers; `has_gradient`
    (P,): whether it has any gradient, with that of the divergence from the reference.
    """

    rewards: Floats
    components: dict[str, Floats]
    advantages: Floats
    correct: Bools
    well_formed: Bools
    answered: Bools
    in_loss: Bools
    has_advantage: Bools
    has_gradient: Bools

    def __add__(self, others: "GroupRewards") -> "GroupRewards":
        """Return the rewards of these groups, followed by those of others."""
        return GroupRewards(**tree_map(lambda one, other: np.concatenate([one, other]), vars(self), vars(others)))

    def select(self, groups: Sequence[int]) -> "GroupRewards":
        """Return the rewards of some groups, by index."""
        return GroupRewards(**tree_map(lambda values: values[groups], vars(self)))


def reward_groups(
    groups: Sequence[RolloutGroup], settings: TrainSettings, mix: RewardMix, processes: ProcessGroup = SINGLE_PROCESS
) -> GroupRewards:
    """Return the rewards of groups of rollouts.

    Every process computes all rewards from the same rollouts, but custom ones, which may be slow or random, only for
    its share. A truncated completion keeps its reward and its place in its group, as in TRL; `mask_truncated` takes it
    out of the loss.
    """
    p1, p2 = _array(groups, lambda v: v.p_label_first), _array(groups, lambda v: v.p_label_second)  # (P, G) each
    tie = _array(groups, lambda v: v.p_label_tie)
    y = np.broadcast_to(np.array([[group.comparison.y] for group in groups]), p1.shape)
    mass = p1 + p2 + tie
    reached = mass > 0
    p_first = (p1 + tie / 2) / np.where(reached, mass, 1.0)
    lean = p1 - p2 if mix.exact else _array(groups, _written_lean)
    well_formed = _array(groups, lambda v: v.well_formed) > 0
    form: Floats = settings.format_weight * well_formed.astype(np.float64)

    def component(part: RewardPart) -> Floats:
        if part.function:
            mine = [part.function(groups[i].comparison, groups[i].verdicts) for i in processes.shard(len(groups))]
            return np.array([values for each in processes.all_gather(mine) for values in each])
        if part.name in EXACT_REWARDS:
            return np.asarray(EXACT_REWARDS[part.name](mass, p_first, y, form))
        return agreement_reward(lean, y, form)

    components = {part.name: component(part) for part in mix.parts}
    rewards = np.asarray(sum(part.weight * components[part.name] for part in mix.parts))
    for name, weight, values in _further_parts(groups, reached, p_first, settings):
        components[name] = values
        rewards = rewards + weight * values
    correct = np.sign(lean) == np.sign(y - 0.5)
    if settings.method == "rejection":
        advantages: Floats = kept_completions(groups, correct & well_formed).astype(np.float64)
    else:
        advantages = leave_one_out_advantages(rewards) if mix.exact else group_advantages(rewards)
    truncated = np.array([group.truncated for group in groups])
    in_loss = ~truncated if settings.mask_truncated else np.ones_like(truncated)
    answered = reached & mix.exact
    # A certain label has no gradient.
    uncertain = p1 * (1 - p1) + p2 * (1 - p2) + tie * (1 - tie) > _NEGLIGIBLE
    has_advantage = np.any((np.abs(advantages) > _NEGLIGIBLE) & in_loss | answered & uncertain, axis=1)
    return GroupRewards(
        rewards=rewards,
        components=components,
        advantages=advantages,
        correct=correct,
        well_formed=well_formed,
        answered=answered,
        in_loss=in_loss,
        has_advantage=has_advantage,
        has_gradient=has_advantage | np.bool_(settings.kl > 0),
    )


def _further_parts(
    groups: Sequence[RolloutGroup], reached: Bools, p_first: Floats, settings: TrainSettings
) -> Iterator[tuple[str, float, Floats]]:
    """The parts of the reward beside the mix that the settings ask for: name, weight, and values (P, G)."""
    if settings.length_budget:
        tokens = _array(groups, lambda v: v.tokens)
        yield "length", 1.0, length_reward(tokens, settings.length_budget, settings.max_tokens)
    if settings.agreement:
        yield "agreement", settings.agreement, reached * agreement(p_first, other_order(groups)[:, None])
    if settings.listener_weight:
        yield "listener", settings.listener_weight, np.array([group.heard for group in groups])


def _array(groups: Sequence[RolloutGroup], value: Callable[[Verdict], float]) -> Floats:
    """One number a verdict, (P, G)."""
    return np.array([[value(verdict) for verdict in group.verdicts] for group in groups], np.float64)


def _written_lean(verdict: Verdict) -> float:
    """Above 0 where the written answer prefers the first image, below 0 for the second, NaN if unreadable."""
    return math.nan if verdict.written is None else verdict.written - 0.5

"""What the rollouts of a step earn, and what they teach: P groups of G rollouts, as arrays (P, G)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlxpref.config import TrainSettings
from mlxpref.grpo import group_advantages, leave_one_out_advantages
from mlxpref.own_reward import OwnReward
from mlxpref.pairs import Comparison
from mlxpref.rewards import EXACT_REWARDS, hard_reward, score_reward
from mlxpref.template import Form
from mlxpref.verdict import Verdict, is_well_formed, written_answer, written_scores

__all__ = ["Earnings", "Lesson", "earn", "form_of"]

Floats = NDArray[np.float64]
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Lesson:
    """One comparison of a step: as it is shown, the share of people for its first image, and its random key."""

    comparison: Comparison
    y: float
    key: tuple[int, ...]


@dataclass(frozen=True)
class Earnings:
    """Rewards and advantages (P, G), and what is said of them.

    `right`: whether a rollout leans to the majority's side; `well_formed`: whether its form is right; `answered`:
    whether its answer position has a gradient of its own; `taught` (P,): whether a group teaches anything.
    """

    rewards: Floats
    advantages: Floats
    right: NDArray[np.bool_]
    well_formed: NDArray[np.bool_]
    answered: NDArray[np.bool_]
    taught: NDArray[np.bool_]


def form_of(settings: TrainSettings) -> Form:
    """The form of answer that a reward needs."""
    return "scores" if settings.reward == "score" else "choice"


def earn(
    settings: TrainSettings,
    lessons: Sequence[Lesson],
    verdicts: Sequence[Sequence[Verdict]],
    own_reward: OwnReward | None = None,
) -> Earnings:
    """What groups of verdicts earn; `own_reward` is asked where the setting names none of ours."""
    exact = settings.reward in EXACT_REWARDS
    p1 = np.array([[v.p_label_first for v in group] for group in verdicts])
    p2 = np.array([[v.p_label_second for v in group] for group in verdicts])
    y = np.broadcast_to(np.array([[lesson.y] for lesson in lessons]), p1.shape)
    form, ending = form_of(settings), "1</answer>" if exact else ""
    formed = np.array([[is_well_formed(v.text + ending, form, settings.think) for v in group] for group in verdicts])
    reached = p1 + p2 > 0
    if exact:
        safe = np.where(reached, p1, 0.5), np.where(reached, p2, 0.5)
        earned: Floats = EXACT_REWARDS[settings.reward](*safe, y, settings.format_weight)  # type: ignore[assignment]
        rewards, lean = np.where(reached, earned, 0.0), p1 - p2
    elif settings.reward == "score":
        scores = [[written_scores(v.text) or (np.nan, np.nan) for v in group] for group in verdicts]
        lean = np.array([[first - second for first, second in group] for group in scores])
        rewards = score_reward(lean, y, formed, settings.format_weight)
    else:
        answers = np.array([[written_answer(v.text) or 0 for v in group] for group in verdicts])
        lean = np.where(answers == 0, 0, 1.5 - answers)
        if own_reward is None:
            rewards = hard_reward(answers, y, formed, settings.format_weight)
        else:
            rewards = np.array(
                [own_reward(le.comparison, le.y, group) for le, group in zip(lessons, verdicts, strict=True)]
            )
    if exact and rewards.shape[1] > 1:
        advantages = leave_one_out_advantages(rewards)
    else:
        advantages = group_advantages(rewards, divide=settings.divide_by_deviation and not exact)
    right = np.sign(lean) == np.sign(y - 0.5)
    answered = reached & exact
    # A label that is certain has no gradient left.
    signal = answered & (p1 * (1 - p1) + p2 * (1 - p2) > _NEGLIGIBLE)
    taught = (np.abs(advantages) > _NEGLIGIBLE).any(axis=1) | signal.any(axis=1) | (settings.kl > 0)
    return Earnings(rewards, advantages, right, formed, answered, taught)

"""What the rollouts of a step earn, and what they teach: P groups of G rollouts, as arrays (P, G)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxpref.config import TrainSettings
from mlxpref.engine.template import Form
from mlxpref.training.custom_reward import CustomReward
from mlxpref.training.grpo import group_advantages, leave_one_out_advantages
from mlxpref.training.rewards import EXACT_REWARDS, hard_reward, length_reward, reward_mix, score_reward
from mlxpref.training.sampler import TrainingComparison
from mlxpref.verdict import Verdict, is_well_formed, written_answer, written_scores

__all__ = ["GroupRewards", "component_names", "form_of", "reward_groups"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class GroupRewards:
    """Rewards and advantages (P, G), and what is said of them.

    `parts` (P, G, K): what each reward of the mix gives before its weight, in the order of `component_names`; `right`:
    whether a rollout leans to the majority's side; `well_formed`: whether its form is right; `truncated`: whether it
    ran out of tokens; `answered`: whether its answer position has a gradient of its own; `counted`: whether its tokens
    are learned from; `signal` (P,): whether a group's rewards teach anything; `taught` (P,): whether anything of it
    does, the divergence from the reference included.
    """

    rewards: Floats
    parts: Floats
    advantages: Floats
    right: Bools
    well_formed: Bools
    truncated: Bools
    answered: Bools
    counted: Bools
    signal: Bools
    taught: Bools

    def only(self, groups: Sequence[int]) -> "GroupRewards":
        """Those of some groups, by number."""
        return GroupRewards(**{f.name: getattr(self, f.name)[list(groups)] for f in fields(self)})

    def to_json(self) -> dict[str, Any]:
        """The arrays as lists."""
        return {f.name: getattr(self, f.name).tolist() for f in fields(self)}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "GroupRewards":
        """What `to_json` gave of at least one group."""
        return cls(**{name: np.array(value) for name, value in told.items()})

    def __add__(self, others: "GroupRewards") -> "GroupRewards":
        """These groups, and then others."""
        pairs = {f.name: (getattr(self, f.name), getattr(others, f.name)) for f in fields(self)}
        return GroupRewards(**{name: np.concatenate(pair) for name, pair in pairs.items()})


def form_of(settings: TrainSettings) -> Form:
    """The form of answer that a reward needs."""
    return "scores" if "score" in reward_mix(settings.reward).names else "choice"


def component_names(settings: TrainSettings) -> tuple[str, ...]:
    """What the rewards that are added up are called: those of the mix, and `length` where there is a budget."""
    return reward_mix(settings.reward).names + (("length",) if settings.length_budget else ())


def reward_groups(
    settings: TrainSettings,
    lessons: Sequence[TrainingComparison],
    verdicts: Sequence[Sequence[Verdict]],
    truncated: Bools,
    own: Mapping[str, CustomReward] | None = None,
) -> GroupRewards:
    """What groups of verdicts earn, of which some were `truncated` (P, G); `own` are the rewards that are not ours.

    A truncated completion keeps its reward and its place in its group, as in TRL; masking leaves out what it teaches.
    """
    mix = reward_mix(settings.reward)
    said = _Said(settings, lessons, verdicts)
    of_ours = {"score": said.score, "hard": said.hard}
    parts = []
    for name in mix.names:
        if name in mix.own:
            reward = (own or {})[name]
            parts.append(np.array([reward(le, group) for le, group in zip(lessons, verdicts, strict=True)]))
        else:
            parts.append(said.integrated(EXACT_REWARDS[name]) if name in EXACT_REWARDS else of_ours[name]())
    weights = [part.weight for part in mix.parts]
    if settings.length_budget:
        tokens = np.array([[v.tokens for v in group] for group in verdicts])
        parts.append(length_reward(tokens, settings.length_budget, settings.max_tokens))
        weights.append(1.0)
    rewards: Floats = sum((w * part for w, part in zip(weights[1:], parts[1:], strict=True)), weights[0] * parts[0])
    advantages_of = leave_one_out_advantages if mix.exact and rewards.shape[1] > 1 else group_advantages
    advantages = advantages_of(rewards)
    counted = ~truncated if settings.mask_truncated else np.ones_like(truncated)
    answered = said.reached & mix.exact
    # A label that is certain has no gradient left.
    uncertain = said.p1 * (1 - said.p1) + said.p2 * (1 - said.p2) > _NEGLIGIBLE
    teaching = (np.abs(advantages) > _NEGLIGIBLE) & counted | answered & uncertain
    signal = np.asarray(teaching.any(axis=1))
    return GroupRewards(
        rewards=rewards,
        parts=np.stack(parts, axis=-1),
        advantages=advantages,
        right=np.sign(said.lean) == np.sign(said.y - 0.5),
        well_formed=said.well_formed,
        truncated=truncated,
        answered=answered,
        counted=counted,
        signal=signal,
        taught=signal | np.bool_(settings.kl > 0),
    )


class _Said:
    """What verdicts say, as arrays (P, G), and what our own rewards give for it."""

    def __init__(
        self, settings: TrainSettings, lessons: Sequence[TrainingComparison], verdicts: Sequence[Sequence[Verdict]]
    ) -> None:
        self._verdicts, self._weight = verdicts, settings.format_weight
        self.exact = reward_mix(settings.reward).exact
        self.form = form_of(settings)
        self.p1: Floats = np.array([[v.p_label_first for v in group] for group in verdicts])
        self.p2: Floats = np.array([[v.p_label_second for v in group] for group in verdicts])
        self.y = np.broadcast_to(np.array([[lesson.y] for lesson in lessons]), self.p1.shape)
        ending = "1</answer>" if self.exact else ""
        self.well_formed = np.array(
            [[is_well_formed(v.text + ending, self.form, settings.think) for v in group] for group in verdicts]
        )
        self.reached = self.p1 + self.p2 > 0

    @cached_property
    def lean(self) -> Floats:
        """Above 0 where the first image is preferred, below where the second is; 0 or not a number for neither."""
        if self.exact:
            return self.p1 - self.p2
        if self.form == "scores":
            return self._margins
        lean: Floats = np.where(self._answers == 0, 0.0, 1.5 - self._answers)
        return lean

    @cached_property
    def _answers(self) -> NDArray[np.int64]:
        return np.array([[written_answer(v.text) or 0 for v in group] for group in self._verdicts])

    @cached_property
    def _margins(self) -> Floats:
        scores = [[written_scores(v.text) or (np.nan, np.nan) for v in group] for group in self._verdicts]
        return np.array([[first - second for first, second in group] for group in scores])

    def integrated(self, reward: Callable[..., object]) -> Floats:
        """A reward that is a function of the labels' probabilities; 0 where no answer position was reached."""
        safe = np.where(self.reached, self.p1, 0.5), np.where(self.reached, self.p2, 0.5)
        earned: Floats = reward(*safe, self.y, self._weight)  # type: ignore[assignment]
        found: Floats = np.where(self.reached, earned, 0.0)
        return found

    def hard(self) -> Floats:
        """The reward of written answers."""
        return hard_reward(self._answers, self.y, self.well_formed, self._weight)

    def score(self) -> Floats:
        """The reward of written scores."""
        return score_reward(self._margins, self.y, self.well_formed, self._weight)

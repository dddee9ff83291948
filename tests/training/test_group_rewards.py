"""Rewards of groups: mixes, truncated completions, and which groups have a gradient."""

from typing import Any

import numpy as np
import pytest

from mlxpref.config import TrainSettings
from mlxpref.engine.completion import Rollout
from mlxpref.engine.profile import Form
from mlxpref.preferences import Preference
from mlxpref.training.group_rewards import GroupRewards, reward_groups
from mlxpref.training.rewards import CustomReward, RewardMix
from mlxpref.training.rollouts import RolloutGroup
from mlxpref.training.sampler import TrainingComparison
from mlxpref.verdict import Verdict
from tests.conftest import picture, read_verdict


def group_of(verdicts: list[Verdict], truncated: list[bool] | None = None, y: float = 1.0) -> RolloutGroup:
    """Rollouts that say this."""
    first, second = picture(0), picture(1)
    comparison = TrainingComparison(first, second, "a hat", Preference("a hat", first, second, y), y, ())
    rollouts = [Rollout((1,) * v.tokens, (0.0,) * v.tokens, v) for v in verdicts]
    return RolloutGroup(comparison, None, rollouts, truncated or [False] * len(verdicts))


def mix_of(reward: str, function: CustomReward | None = None) -> RewardMix:
    """The mix with a function in the place of its custom rewards."""
    mix = RewardMix.parse(reward)
    return RewardMix(tuple(part._replace(function=function if part.name in mix.custom else None) for part in mix.parts))


def rewarded(
    verdicts: list[Verdict],
    custom: list[float] | None = None,
    truncated: list[bool] | None = None,
    y: float = 1.0,
    **settings: Any,
) -> GroupRewards:
    options = TrainSettings(**{"format_weight": 0.2} | settings)
    mix = mix_of(options.reward, (lambda *_: custom) if custom else None)  # type: ignore[arg-type, return-value]
    return reward_groups([group_of(verdicts, truncated, y)], options, mix)


def make_verdict(p1: float, p2: float, tokens: int = 10) -> Verdict:
    return read_verdict("<think>so</think><answer>", p1, p2, tokens=tokens)


def wrote(answer: str, form: Form = "choice") -> Verdict:
    return read_verdict(f"<think>so</think><answer>{answer}</answer>", 0.5, 0.5, form, tokens=10)


def test_a_mix_adds_its_parts_by_weight() -> None:
    group = [make_verdict(0.6, 0.3), make_verdict(0.1, 0.8), Verdict("<think>so")]
    result = rewarded(group, [1.0, 2.0, 3.0], reward="soft=2,brier,own.py:f=0.5")
    soft = np.array([0.2 * 0.9 + 0.6, 0.2 * 0.9 + 0.1, 0.0])
    brier = np.array([0.9 * (1.2 - (2 / 3 - 1) ** 2), 0.9 * (1.2 - (1 / 9 - 1) ** 2), 0.0])
    for name, part in {"soft": soft, "brier": brier, "own.py:f": [1.0, 2.0, 3.0]}.items():
        assert result.components[name][0] == pytest.approx(part)
    assert result.rewards[0] == pytest.approx(2 * soft + brier + 0.5 * np.array([1, 2, 3]))
    others = [result.rewards[0][[1, 2]].mean(), result.rewards[0][[0, 2]].mean(), result.rewards[0][[0, 1]].mean()]
    assert result.advantages[0] == pytest.approx(result.rewards[0] - others)
    assert result.answered[0].tolist() == [True, True, False]
    assert result.correct[0].tolist() == [True, False, False]


@pytest.mark.parametrize("reward", ["soft", "brier", "hard"])
def test_the_form_is_right_only_with_reasons(reward: str) -> None:
    """An answer without a single reason earns its side and nothing for its form, unless no reasons were asked for."""
    ending = "1</answer>" if reward == "hard" else ""
    texts = ["<think>so</think><answer>", "</think><answer>", "<think> </think><answer>", "<think></think><answer>"]
    thinking, at_once = (
        rewarded([read_verdict(text + ending, 1.0, think=think) for text in texts], reward=reward, think=think)
        for think in (True, False)
    )
    assert thinking.rewards[0] == pytest.approx([1.2, 1.0, 1.0, 1.0])
    assert thinking.advantages[0][0] > 0
    assert at_once.rewards[0] == pytest.approx([1.2, 1.0, 1.2, 1.2])


def test_written_answers_count_without_exact_reward() -> None:
    result = rewarded([wrote("1"), wrote("2"), wrote("")], [0.0, 0.0, 4.0], reward="hard,own.py:f=0.5")
    assert result.rewards[0] == pytest.approx([1.2, 0.2, 2.0])
    assert not result.answered.any()
    assert result.correct[0].tolist() == [True, False, False]
    assert result.advantages[0].sum() == pytest.approx(0)
    assert result.advantages[0].std(ddof=1) == pytest.approx(1, rel=1e-3)  # as GRPO divides


def test_scores_beside_a_custom_reward() -> None:
    result = rewarded(
        [wrote(answer, "scores") for answer in ("7 4", "1 8", "x")], [0.0, 5.0, 0.0], reward="own.py:f,score"
    )
    assert result.rewards[0] == pytest.approx([1.2, 5.2, 0.0])
    assert result.correct[0].tolist() == [True, False, False]


def test_tokens_beyond_the_budget_cost_up_to_one() -> None:
    settings: dict[str, Any] = {"reward": "soft", "length_budget": 20, "max_tokens": 60}
    result = rewarded([make_verdict(0.5, 0.5, tokens) for tokens in (1, 20, 30, 60, 68)], **settings)
    assert list(result.components) == ["soft", "length"]
    assert result.components["length"][0] == pytest.approx([0, 0, -0.25, -1, -1])
    assert result.rewards[0] == pytest.approx(0.7 + result.components["length"][0])


def test_truncated_rollouts_stay_in_their_group() -> None:
    group, truncated = (
        [make_verdict(0.6, 0.3), make_verdict(0.2, 0.7), Verdict("<think>and so on")],
        [False, False, True],
    )
    plain, masked = (rewarded(group, truncated=truncated, mask_truncated=mask) for mask in (False, True))
    assert plain.in_loss.all()
    assert masked.in_loss[0].tolist() == [True, True, False]
    assert masked.advantages.tolist() == plain.advantages.tolist()


def test_which_groups_teach() -> None:
    certain = [make_verdict(1.0, 0.0)] * 3
    assert not rewarded(certain).has_advantage.any()
    assert rewarded([make_verdict(0.7, 0.3)] * 3).has_advantage.all()  # the answer position has a gradient of its own
    assert rewarded([make_verdict(1.0, 0.0), make_verdict(0.0, 1.0)]).has_advantage.all()
    assert not rewarded([wrote("1")] * 3, reward="hard").has_advantage.any()
    unread, truncated = [Verdict("<think>on"), Verdict("<think>and on")], [True, True]
    assert rewarded(unread, [0.0, 1.0], truncated, reward="own.py:f").has_advantage.all()
    assert not rewarded(unread, [0.0, 1.0], truncated, reward="own.py:f", mask_truncated=True).has_advantage.any()
    divergence = rewarded(certain, kl=0.1)
    assert not divergence.has_advantage.any()
    assert divergence.has_gradient.all()


def test_groups_can_be_joined_and_selected() -> None:
    verdicts = [make_verdict(0.6, 0.3), make_verdict(0.1, 0.8)], [make_verdict(0.5, 0.3), make_verdict(0.1, 0.2)]
    one, two = (rewarded(group, y=y) for group, y in zip(verdicts, (1.0, 0.0), strict=True))
    both = one + two
    assert both.rewards.shape == (2, 2)
    assert both.select([1]).rewards.tolist() == two.rewards.tolist()
    assert both.select([1, 0]).has_advantage.shape == (2,)
    assert both.select([1]).components["soft"].tolist() == two.components["soft"].tolist()
    groups = [group_of(verdicts[0]), group_of(verdicts[1], y=0.0)]
    assert reward_groups(groups, TrainSettings(), mix_of("soft")).rewards.tolist() == both.rewards.tolist()

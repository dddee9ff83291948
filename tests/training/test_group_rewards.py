"""What rollouts earn: mixes of rewards, what is truncated, and which groups teach something."""

from typing import Any

import numpy as np
import pytest

from mlxpref.config import TrainSettings
from mlxpref.preferences import Comparison, Preference
from mlxpref.training.group_rewards import GroupRewards, component_names, form_of, reward_groups
from mlxpref.training.sampler import TrainingComparison
from mlxpref.verdict import Verdict
from tests.conftest import picture


def lesson(y: float = 1.0) -> TrainingComparison:
    first, second = picture(0), picture(1)
    return TrainingComparison(Preference("a hat", first, second, y), Comparison(first, second, "a hat"), y, (1, 0))


def thought(p1: float, p2: float, tokens: int = 10) -> Verdict:
    return Verdict("<think>so</think><answer>", p1, p2, tokens=tokens)


def wrote(answer: str, tokens: int = 10) -> Verdict:
    return Verdict(f"<think>so</think><answer>{answer}</answer>", 0.5, 0.5, tokens=tokens)


def earned(
    verdicts: list[Verdict], own: Any = None, truncated: list[bool] | None = None, y: float = 1.0, **settings: Any
) -> GroupRewards:
    chosen = TrainSettings(**{"format_weight": 0.2} | settings)
    return reward_groups(chosen, [lesson(y)], [verdicts], np.array([truncated or [False] * len(verdicts)]), own)


def test_a_mix_adds_its_parts_by_weight() -> None:
    group = [thought(0.6, 0.3), thought(0.1, 0.8), Verdict("<think>so")]
    found = earned(group, {"own.py:f": lambda *_: [1.0, 2.0, 3.0]}, reward="soft=2,brier,own.py:f=0.5")
    soft = np.array([0.2 * 0.9 + 0.6, 0.2 * 0.9 + 0.1, 0.0])
    brier = np.array([0.9 * (1.2 - (2 / 3 - 1) ** 2), 0.9 * (1.2 - (1 / 9 - 1) ** 2), 0.0])
    for number, part in enumerate((soft, brier, [1.0, 2.0, 3.0])):
        assert found.parts[0, :, number] == pytest.approx(part)
    assert found.rewards[0] == pytest.approx(2 * soft + brier + 0.5 * np.array([1, 2, 3]))
    others = [found.rewards[0][[1, 2]].mean(), found.rewards[0][[0, 2]].mean(), found.rewards[0][[0, 1]].mean()]
    assert found.advantages[0] == pytest.approx(found.rewards[0] - others)
    assert found.answered[0].tolist() == [True, True, False]
    assert found.right[0].tolist() == [True, False, False]


def test_a_mix_without_an_exact_reward_reads_what_was_written() -> None:
    group = [wrote("1"), wrote("2"), wrote("")]
    found = earned(group, {"own.py:f": lambda *_: [0.0, 0.0, 4.0]}, reward="hard,own.py:f=0.5")
    assert found.rewards[0] == pytest.approx([1.2, 0.2, 2.0])
    assert not found.answered.any()
    assert found.advantages[0].sum() == pytest.approx(0)
    assert found.advantages[0].std(ddof=1) == pytest.approx(1, rel=1e-3)  # as GRPO divides


def test_scores_may_stand_beside_a_reward_of_ones_own() -> None:
    settings = TrainSettings(reward="own.py:f,score")
    assert form_of(settings) == "scores"
    found = earned([wrote("7 4"), wrote("1 8")], {"own.py:f": lambda *_: [0.0, 5.0]}, reward=settings.reward)
    assert found.rewards[0] == pytest.approx([1.2, 5.2])
    assert found.right[0].tolist() == [True, False]


def test_what_is_beyond_the_budget_costs_up_to_one() -> None:
    settings = {"reward": "soft", "length_budget": 20, "max_tokens": 60}
    assert component_names(TrainSettings(**settings)) == ("soft", "length")  # type: ignore[arg-type]
    found = earned([thought(0.5, 0.5, tokens) for tokens in (1, 20, 30, 60, 68)], **settings)
    assert found.parts[0, :, 1] == pytest.approx([0, 0, -0.25, -1, -1])
    assert found.rewards[0] == pytest.approx(0.7 + found.parts[0, :, 1])
    assert component_names(TrainSettings(reward="soft")) == ("soft",)


def test_truncated_rollouts_are_left_out_only_on_request_and_stay_in_their_group() -> None:
    group = [thought(0.6, 0.3), thought(0.2, 0.7), Verdict("<think>and so on")]
    flags = [False, False, True]
    plain, masked = (earned(group, truncated=flags, mask_truncated=mask) for mask in (False, True))
    assert plain.counted.all()
    assert masked.counted[0].tolist() == [True, True, False]
    assert masked.truncated[0].tolist() == plain.truncated[0].tolist() == flags
    assert masked.advantages.tolist() == plain.advantages.tolist()


def test_a_group_has_a_signal_where_something_is_learned_from_it() -> None:
    sure = [thought(1.0, 0.0)] * 3
    assert not earned(sure).signal.any()
    assert earned([thought(0.7, 0.3)] * 3).signal.all()  # the answer position has a gradient of its own
    assert earned([thought(1.0, 0.0), thought(0.0, 1.0)]).signal.all()
    assert not earned([wrote("1")] * 3, reward="hard").signal.any()
    unread = [Verdict("<think>on"), Verdict("<think>and on")]
    own = {"own.py:f": lambda *_: [0.0, 1.0]}
    flags = [True, True]
    assert earned(unread, own, flags, reward="own.py:f").signal.all()
    assert not earned(unread, own, flags, reward="own.py:f", mask_truncated=True).signal.any()
    divergence = earned(sure, kl=0.1)
    assert not divergence.signal.any()
    assert divergence.taught.all()


def test_earnings_can_be_parted_and_joined() -> None:
    one, two = earned([thought(0.6, 0.3), thought(0.1, 0.8)]), earned([thought(0.5, 0.3), thought(0.1, 0.2)], y=0.0)
    both = one + two
    assert both.rewards.shape == (2, 2)
    assert both.only([1]).rewards.tolist() == two.rewards.tolist()
    assert both.only([1, 0]).signal.shape == (2,)

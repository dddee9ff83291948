"""Rewards by groups: places on the scale of one ranking, and a reason instead of a number where there is none."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlxpref.config import JudgeSettings
from mlxpref.demo.pictures import PictureSpec, render
from mlxpref.errors import ConfigError, DataError
from mlxpref.judge import judge as judge_module
from mlxpref.judge.judge import Judge
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.rank import rank_pairs
from mlxpref.judge.verdict_source import judge_by_model
from mlxpref.preferences import Pair
from mlxpref.reward.group import ImageReward, RewardSettings, reward_images, rewards_of
from mlxpref.verdict import Verdict
from tests.conftest import picture, tiny_model
from tests.engine.profile_models import asked_by

MakeJudge = Callable[..., Judge]
CIRCLE, CROSS = "a red circle, a blue square, a green triangle", "a yellow cross, a red square, a blue triangle"
NUMBERS = ("reward", "strength", "wins", "low", "high", "p_best")


def demo_pictures(best: PictureSpec, first: str) -> list[Image.Image]:
    """The best picture for its prompt, the same one spoiled, and one in whose first shape there is another colour."""
    wrong = best._replace(**{first: "purple"}, quality="blurry")
    specs = (best, best._replace(quality="blurry"), wrong)
    return [render(spec, np.random.default_rng(seed)) for seed, spec in enumerate(specs)]


CIRCLES = demo_pictures(PictureSpec("red", "blue", "green", "orange"), "circle")
CROSSES = demo_pictures(PictureSpec("green", "red", "blue", "yellow"), "cross")


@pytest.fixture
def judge(demo_judge: MakeJudge) -> Judge:
    """A judge who is sure of most of its answers; at once it would find all even."""
    return demo_judge(max_tokens=80)


def rewarded(*arguments: Any, **named: Any) -> list[ImageReward]:
    """Rewards of images that all have one."""
    results = reward_images(*arguments, **named)
    for result in results:
        assert isinstance(result, ImageReward), result
    return results  # type: ignore[return-value]


def numbers(rewards: list[ImageReward]) -> np.ndarray:
    return np.array([[getattr(each, name) for name in NUMBERS] for each in rewards])


def test_the_best_image_of_each_prompt_is_found(judge: Judge) -> None:
    rewards = rewarded(judge, [*CIRCLES, *CROSSES], [CIRCLE] * 3 + [CROSS] * 3)
    assert [np.argmax([each.reward for each in group]) for group in (rewards[:3], rewards[3:])] == [0, 0]
    for group in (rewards[:3], rewards[3:]):
        assert sorted(each.rank for each in group) == [1, 2, 3]
        assert [each.rank for each in sorted(group, key=lambda each: -each.reward)] == [1, 2, 3]
        assert sum(each.p_best for each in group) == pytest.approx(1, abs=1e-6)
        assert all(each.low < each.strength < each.high for each in group)


def test_values_are_centred_in_their_group(judge: Judge) -> None:
    rewards = rewarded(judge, [*CIRCLES, *CROSSES], [CIRCLE] * 3 + [CROSS] * 3)
    for group in (rewards[:3], rewards[3:]):
        assert sum(each.strength for each in group) == pytest.approx(0, abs=1e-9)
        assert np.mean([each.wins for each in group]) == pytest.approx(0.5)
        assert all(0 < each.wins < 1 for each in group)
    wins = rewarded(judge, CIRCLES, [CIRCLE] * 3, RewardSettings("wins"))
    assert [each.reward for each in wins] == [each.wins for each in wins] == [each.wins for each in rewards[:3]]
    assert [each.reward for each in rewards] == [each.strength for each in rewards]


def test_groups_do_not_touch_each_other(judge: Judge) -> None:
    mixed = [image for pair in zip(CIRCLES, CROSSES, strict=True) for image in pair]
    rewards = rewarded(judge, mixed, [CIRCLE, CROSS] * 3)
    for group, alone in ((rewards[::2], (CIRCLES, CIRCLE)), (rewards[1::2], (CROSSES, CROSS))):
        assert numbers(group) == pytest.approx(numbers(rewarded(judge, alone[0], [alone[1]] * 3)), abs=1e-4)


def test_groups_by_name_divide_a_prompt(judge: Judge) -> None:
    images = [*CIRCLES[:2], CIRCLES[0], CROSSES[0]]
    rewards = rewarded(judge, images, [CIRCLE] * 4, groups=["a", "a", "b", "b"])
    for group, alone in ((rewards[:2], images[:2]), (rewards[2:], images[2:])):
        assert numbers(group) == pytest.approx(numbers(rewarded(judge, alone, [CIRCLE] * 2)), abs=1e-4)


def test_another_order_of_the_images_permutes_the_rewards(judge: Judge) -> None:
    order = [2, 0, 1]
    rewards = numbers(rewarded(judge, CIRCLES, [CIRCLE] * 3))
    permuted = numbers(rewarded(judge, [CIRCLES[place] for place in order], [CIRCLE] * 3))
    assert permuted == pytest.approx(rewards[order], abs=1e-3)


def test_equal_images_have_equal_rewards(judge: Judge) -> None:
    rewards = rewarded(judge, [CIRCLES[0], CIRCLES[2], CIRCLES[0].copy()], [CIRCLE] * 3)
    assert rewards[0].reward == pytest.approx(rewards[2].reward, abs=1e-3)
    assert rewards[0].reward > rewards[1].reward


@pytest.mark.parametrize(("each", "comparisons"), [(1, 14), (2.0, 16), (4, 32), (100, 56)])
def test_the_budget_is_counted_in_comparisons(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, each: float, comparisons: int
) -> None:
    counts, rank = [], Judge.rank

    def counted(*arguments: Any, **named: Any) -> Any:
        counts.append((ranking := rank(*arguments, **named)).comparisons)
        return ranking

    monkeypatch.setattr(Judge, "rank", counted)
    rewarded(judge, [picture(seed) for seed in range(8)], [CIRCLE] * 8, RewardSettings(comparisons_per_image=each))
    assert counts == [comparisons]


def test_a_lone_image_has_no_reward(judge: Judge) -> None:
    *rewards, alone = reward_images(judge, [*CIRCLES[:2], CROSSES[0]], [CIRCLE, CIRCLE, CROSS])
    assert [isinstance(each, ImageReward) for each in rewards] == [True, True]
    assert isinstance(alone, DataError)
    assert re.search(rf"only readable image of the prompt “{CROSS}”.*give all of a prompt in one call", str(alone))


def test_an_unreadable_image_keeps_its_error(judge: Judge) -> None:
    damaged = DataError("is damaged")
    first, error, second = reward_images(judge, [CIRCLES[0], damaged, CIRCLES[1]], [CIRCLE] * 3)
    assert error is damaged
    expected = numbers(rewarded(judge, CIRCLES[:2], [CIRCLE] * 2))
    assert numbers([first, second]) == pytest.approx(expected, abs=1e-4)  # type: ignore[list-item]
    lone = reward_images(judge, [CIRCLES[0], damaged], [CIRCLE] * 2)[0]
    assert "only readable image" in str(lone)


def test_an_unreadable_answer_is_no_reward(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*arguments: Any) -> Any:
        for batch in judge_by_model(*arguments):
            yield [replace(each, verdicts=(Verdict("?"),)) for each in batch]

    monkeypatch.setattr(judge_module, "judge_by_model", unreadable)
    for result in reward_images(judge, CIRCLES, [CIRCLE] * 3):
        assert isinstance(result, DataError)
        assert "no readable answer" in str(result)


@pytest.mark.parametrize(
    ("readable", "without"), [(("01", "12"), [3, 4]), (("01", "23"), [0, 1, 2, 3, 4]), (("01", "12", "34"), [3, 4])]
)
def test_no_answer_leads_from_one_part_of_a_group_to_another(readable: tuple[str, ...], without: list[int]) -> None:
    def compare(pairs: Iterable[Pair], think: bool, orders: int) -> Iterator[PairVerdict]:
        for pair in pairs:
            is_readable = f"{Path(str(pair.a)).stem}{Path(str(pair.b)).stem}" in readable
            shown = (Verdict("<answer>1</answer>", 0.8, 0.2) if is_readable else Verdict("?"),)
            yield PairVerdict(shown, shown)

    rewards = rewards_of(rank_pairs([Path(f"{number}.png") for number in range(5)], CIRCLE, compare, pairs="all"))
    assert [place for place, each in enumerate(rewards) if isinstance(each, DataError)] == without


def test_an_error_of_a_group_is_that_of_its_images(judge: Judge) -> None:
    *circles, no_text, no_text_either = reward_images(judge, [*CIRCLES, *CROSSES[:2]], [CIRCLE] * 3 + [" ", " "])
    assert all(isinstance(each, ImageReward) for each in circles)
    assert [str(each) for each in (no_text, no_text_either)] == [str(no_text)] * 2
    assert "the prompt is empty" in str(no_text)


def test_reasons_name_the_images_of_the_call(demo_judge: MakeJudge) -> None:
    mixed = [image for pair in zip(CIRCLES, CROSSES, strict=True) for image in pair]
    rewards = rewarded(demo_judge(max_tokens=16), mixed, [CIRCLE, CROSS] * 3)
    for place, each in enumerate(rewards):
        shown = re.match(r"as image [12] beside number (\d): .", str(each.reason))
        assert shown, each.reason
        other = int(shown[1])
        assert other != place
        assert other % 2 == place % 2, "an image of the other prompt"


def test_a_judge_of_single_images_rewards_by_its_scores() -> None:
    judge = Judge(asked_by(tiny_model("qwen3_vl"), "rationalrewards"), JudgeSettings(max_tokens=6))
    images = [picture(seed) for seed in range(6)]
    scores = {entry.index: entry.score for entry in judge.rank(images, CIRCLE)}
    rewards = [each.reward for each in rewarded(judge, images, [CIRCLE] * 6)]
    values = np.array([scores[place] for place in range(6)])
    assert np.ptp(values) > 0
    assert rewards == pytest.approx(values - values.mean(), abs=1e-5)


def test_what_is_no_setting(judge: Judge) -> None:
    for number in (0, -1, np.nan, np.inf, True, "4", None):
        with pytest.raises(ConfigError, match=r"comparisons_per_image .*above 0"):
            RewardSettings(comparisons_per_image=number)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give 'strength' or 'wins'"):
        RewardSettings("elo")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="3 images and 2 prompts"):
        reward_images(judge, CIRCLES, [CIRCLE] * 2)

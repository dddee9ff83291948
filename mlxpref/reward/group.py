"""Rewards of images by groups: the images of one prompt are ranked, and each gets its place on the ranking's scale.

A judge of pairs has no scale that holds across prompts, so a group is the unit: rewards compare within it only.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from numbers import Real
from typing import Literal, get_args

import numpy as np

from mlxpref.errors import ConfigError, DataError
from mlxpref.judge.judge import Judge
from mlxpref.judge.ranking_result import Ranking, RankingEntry
from mlxpref.preferences import ImageLike
from mlxpref.ranking.log_odds import probability
from mlxpref.ranking.outcomes import components
from mlxpref.text import shorten

Value = Literal["strength", "wins"]
"""What a reward is: the strength in nats without the group's mean, or the share of wins that the strengths predict."""
COMPARISONS_PER_IMAGE = 4.0
_ALONE = "a judge compares the images of one prompt with each other, so give all of a prompt in one call"


@dataclass(frozen=True)
class RewardSettings:
    """What a reward is, and how many comparisons an image of a group is worth, both orders of a pair being two.

    ConfigError for what is no choice.
    """

    value: Value = "strength"
    comparisons_per_image: float = COMPARISONS_PER_IMAGE

    def __post_init__(self) -> None:
        if self.value not in get_args(Value):
            raise ConfigError(f"value {self.value!r}: give {' or '.join(map(repr, get_args(Value)))}")
        number = self.comparisons_per_image
        if not isinstance(number, Real) or isinstance(number, bool) or not 0 < number < math.inf:
            raise ConfigError(f"comparisons_per_image {number!r}: give a number above 0, such as 4")

    def pairs(self, count: int) -> int:
        """The pairs to judge of `count` images: so many that all of them are connected, at least."""
        return max(count - 1, math.ceil(count * min(self.comparisons_per_image, count) / 2))


@dataclass(frozen=True)
class ImageReward:
    """An image's reward and its place in its group; `low` and `high` bound the strength's 95 % interval.

    `wins` is the mean probability to win against the others of the group: all of them average 0.5.
    """

    reward: float
    strength: float
    wins: float
    low: float
    high: float
    rank: int
    p_best: float
    reason: str | None


INFO = ("strength", "wins", "low", "high", "rank", "p_best", "reason")
"""What there is of an image besides its reward."""


def reward_images(
    judge: Judge,
    images: Sequence[ImageLike | DataError],
    prompts: Sequence[str],
    settings: RewardSettings | None = None,
    groups: Sequence[str] = (),
) -> list[ImageReward | DataError]:
    """The rewards of images by their prompts, in their order, or the reason why one has none.

    Where there are names of `groups`, one an image, those of one prompt in one group are compared.

    It has none if it could not be read, if its group has no other image, or if the judge gave no readable answer about
    it: a number in its place would be made up. ConfigError if there is not one prompt an image.
    """
    if len(images) != len(prompts):
        raise ConfigError(f"{len(images)} images and {len(prompts)} prompts: give one prompt for each image")
    settings = settings or RewardSettings()
    rewards: dict[int, ImageReward | DataError] = {}
    for (prompt, _), members in _places(zip(prompts, groups or repeat(""), strict=False)).items():
        group = {place: image for place in members if not isinstance(image := images[place], DataError)}
        rewards |= _reward_group(judge, group, prompt, settings)
    return [image if isinstance(image, DataError) else rewards[place] for place, image in enumerate(images)]


def _reward_group(
    judge: Judge, images: Mapping[int, ImageLike], prompt: str, settings: RewardSettings
) -> dict[int, ImageReward | DataError]:
    """The rewards of the readable images of one prompt, by their places."""
    if len(images) < 2:
        alone = DataError(f"it is the only readable image of the prompt “{shorten(prompt, 60)}”: {_ALONE}")
        return dict.fromkeys(images, alone)
    try:
        ranking = judge.rank(list(images.values()), prompt, pairs=settings.pairs(len(images)))
    except DataError as error:  # such as a prompt that is too long for the model
        return dict.fromkeys(images, error)
    return dict(zip(images, rewards_of(ranking, settings.value, list(images)), strict=True))


def _places(keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[int]]:
    """The places of equal keys, in the order of their first ones."""
    places: dict[tuple[str, str], list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


def rewards_of(
    ranking: Ranking, value: Value = "strength", places: Sequence[int] | None = None
) -> list[ImageReward | DataError]:
    """The rewards of a ranking's images, in the order in which they were given.

    `places` are the numbers by which reasons name the images, by default those in the ranking.
    """
    strengths = np.zeros(len(ranking))  # (N,)
    for entry in ranking:
        strengths[entry.index] = entry.strength
    p_win = probability(strengths[:, None] - strengths)  # (N, N), 0.5 against itself
    wins = (p_win.sum(axis=1) - 0.5) / (len(ranking) - 1)
    mean, names = float(strengths.mean()), places or range(len(ranking))
    rewards = {entry.index: _reward(entry, value, mean, float(wins[entry.index]), names) for entry in ranking}
    apart = DataError("no readable answers compare it with the others of its group, or with most of them")
    return [
        rewards[index] if is_compared or isinstance(rewards[index], DataError) else apart
        for index, is_compared in enumerate(_compared(ranking))
    ]


def _compared(ranking: Ranking) -> list[bool]:
    """Whether readable answers connect an image, also by others, with more than half of those that have any.

    Between parts of a group that no answer connects, strengths are as the fit expects them before any answer.
    """
    if ranking.is_by_scores:
        return [True] * len(ranking)
    answers = [pair for pair in (*ranking.pairs, *ranking.replaced) if pair.verdict.is_readable]
    pairs = np.array([(pair.a, pair.b) for pair in answers], np.int64).reshape(-1, 2)
    part = components(len(ranking), *pairs.T)  # (N,)
    judged = np.unique(pairs)
    sizes = np.bincount(part[judged], minlength=len(ranking))
    return [bool(2 * size > len(judged)) for size in sizes[part]]


def _reward(
    entry: RankingEntry, value: Value, mean: float, wins: float, places: Sequence[int]
) -> ImageReward | DataError:
    is_read = entry.score is not None if entry.ranking.is_by_scores else entry.pairs > 0
    if not is_read:
        return DataError("the judge gave no readable answer about it: see its profile, and max_tokens")
    strength = entry.strength - mean
    return ImageReward(
        reward=strength if value == "strength" else wins,
        strength=strength,
        wins=wins,
        low=entry.low - mean,
        high=entry.high - mean,
        rank=entry.rank,
        p_best=entry.p_best,
        reason=reason_for(entry, places),
    )


def reason_for(entry: RankingEntry, places: Sequence[int]) -> str | None:
    """The reason for an image's place, in which the other image has its number of `places`; None without reasoning."""
    return entry.reason_beside(lambda other: f"number {places[other]}")

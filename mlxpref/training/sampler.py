"""Which comparisons a step shows: in what order, with which image first, and what is kept out to measure with.

Everything is drawn by keys, (seed, 0, purpose, number), and nothing is remembered from step to step: any step can be
asked for by itself. Rollouts draw by (seed, step, ...) with steps counted from 1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mlxpref.config import TrainSettings
from mlxpref.errors import DataError
from mlxpref.preferences import Comparison, Pair, Preference, share_for_first, shown

__all__ = ["ComparisonSampler", "TrainingComparison", "held_out_split", "part_of", "some_of"]

_FRACTION, _ORDER, _SPARE, _HELD_OUT, _MEASURED = range(5)
"""What random numbers are drawn for."""


@dataclass(frozen=True)
class TrainingComparison:
    """One comparison of a step: as it is shown, the share of people for its first image, and its random key."""

    preference: Preference
    comparison: Comparison
    y: float
    key: tuple[int, ...]


class ComparisonSampler:
    """The comparisons of every step, `settings.comparisons` each: every preference once an epoch.

    Places alternate: of any consecutive comparisons half show a first (of an odd number, half but one), and each
    preference shows its other image first in the next epoch. So what is learned cannot depend on how the data call the
    images. The first epoch's order is random; it deals the preferences into two halves, which show a first in turn, and
    later epochs shuffle each half.
    """

    def __init__(self, preferences: Sequence[Preference], settings: TrainSettings) -> None:
        self.preferences, self.seed, self.comparisons = preferences, settings.seed, settings.comparisons
        self._first = _draw(settings.seed, _ORDER, 0).permutation(len(preferences))
        # A step lies in one epoch or reaches into the next: two orders are enough.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def of_step(self, step: int) -> list[TrainingComparison]:
        """The comparisons of a step, counted from 1."""
        return [self._lesson(step, place, number, (step, place)) for place, number in enumerate(self._numbers(step))]

    def spare(self, step: int) -> Iterator[int]:
        """The numbers of the preferences that a step does not show, in an order of its own."""
        taken = set(self._numbers(step))
        drawn = _draw(self.seed, _SPARE, step).permutation(len(self.preferences)).tolist()
        return (number for number in drawn if number not in taken)

    def instead(self, step: int, place: int, number: int, again: int) -> TrainingComparison:
        """The comparison of another preference at a place of a step, the `again`th there; its sides are the place's."""
        return self._lesson(step, place, number, (step, place, again))

    def _numbers(self, step: int) -> list[int]:
        start = (step - 1) * self.comparisons
        shown_now = (divmod(start + place, len(self.preferences)) for place in range(self.comparisons))
        return [int(self._order(epoch)[rank]) for epoch, rank in shown_now]

    def _lesson(self, step: int, place: int, number: int, key: tuple[int, ...]) -> TrainingComparison:
        preference = self.preferences[number]
        a_first = ((step - 1) * self.comparisons + place) % 2 == 0
        comparison = shown(Pair(preference.a, preference.b, preference.prompt))[0 if a_first else 1]
        return TrainingComparison(preference, comparison, share_for_first(preference.p_a, a_first), key)

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        """The order of the preferences in an epoch."""
        if epoch == 0:
            return self._first
        draw, count = _draw(self.seed, _ORDER, epoch), len(self.preferences)
        order = np.empty(count, np.int64)
        for half in range(2):
            # This half shows a first in even epochs, the other one in odd ones; a comes first at every other place.
            order[(half + epoch + epoch * count) % 2 :: 2] = draw.permutation(self._first[half::2])
        return order


def part_of(preferences: Sequence[Preference], fraction: float, seed: int) -> list[Preference]:
    """A fraction of the preferences, at least one, in their order; a smaller fraction is part of a larger one."""
    kept = _draw(seed, _FRACTION).permutation(len(preferences))[: max(1, math.ceil(fraction * len(preferences)))]
    return [preferences[i] for i in sorted(kept)]


def held_out_split(
    preferences: Sequence[Preference], share: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """The preferences to learn from, and those to measure with, both in their order.

    What a prompt or a group connects stays together: no prompt that is measured with was learned from. As many are held
    out as whole groups fit into the share, in random order, and at least the smallest one. DataError where all are
    connected.
    """
    if not share:
        return list(preferences), []
    connected = _connected(preferences)
    names, sizes = np.unique(connected, return_counts=True)
    if len(names) < 2:
        raise DataError(
            f"all {len(preferences)} preferences are of one prompt or group: none can be held out without showing what "
            "it asks for; give data of several prompts, or no --held-out"
        )
    chosen, taken = [], 0
    for i in _draw(seed, _HELD_OUT).permutation(len(names)):
        if taken + sizes[i] <= share * len(preferences):
            chosen.append(names[i])
            taken += sizes[i]
    out = np.isin(connected, chosen or [names[np.argmin(sizes)]]).tolist()
    learned_from = [p for p, is_out in zip(preferences, out, strict=True) if not is_out]
    return learned_from, [p for p, is_out in zip(preferences, out, strict=True) if is_out]


def some_of(preferences: Sequence[Preference], most: int, seed: int) -> list[Preference]:
    """At most so many of the preferences, drawn once, in their order."""
    kept = _draw(seed, _MEASURED).permutation(len(preferences))[:most]
    return [preferences[i] for i in sorted(kept)]


def _connected(preferences: Sequence[Preference]) -> list[int]:
    """A number for each preference, the same for those that prompts and groups connect, if only by way of others."""
    parents = list(range(len(preferences)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    seen: dict[tuple[str, str], int] = {}
    for i, preference in enumerate(preferences):
        for kind, name in (("prompt", preference.prompt), ("group", preference.group)):
            if name:
                parents[root(i)] = root(seen.setdefault((kind, name), i))
    return [root(i) for i in range(len(preferences))]


def _draw(seed: int, purpose: int, number: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, 0, purpose, number])

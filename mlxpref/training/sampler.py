"""The comparisons of each step, their order and their first images, and the held-out preferences.

All random numbers have keys, (seed, 0, purpose, number), without state between steps: any step is available directly.
Rollouts use the keys (seed, step, ...) with steps from 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mlxpref.config import TrainSettings
from mlxpref.errors import DataError
from mlxpref.preferences import Comparison, Preference, placed, share_for_first

_PURPOSES = ("fraction", "order", "unused", "held out", "measured")
"""The purposes of random numbers."""


@dataclass(frozen=True)
class TrainingComparison(Comparison):
    """A comparison of a step, the preference it shows, the share y of people for its first image, its random key."""

    preference: Preference
    y: float
    key: tuple[int, ...]

    @property
    def place(self) -> int:
        """Its place in the step."""
        return self.key[1]


class ComparisonSampler:
    """Gives the comparisons of every step, `settings.comparisons` each: every preference once an epoch.

    Sides alternate: half of any consecutive comparisons show a first (up to one), and each preference shows its other
    image first in the next epoch. So the result cannot depend on which image the data call a. The first epoch's random
    order deals the preferences into two halves, which show a first in turn; later epochs shuffle each half.

    With `settings.orders` of 2 a step shows half as many preferences, each with a first at an even place and then with
    b first at the next one.
    """

    def __init__(self, preferences: Sequence[Preference], settings: TrainSettings) -> None:
        self.preferences, self.seed, self.comparisons = preferences, settings.seed, settings.comparisons
        self.orders = settings.orders
        self._first_order = _generator(settings.seed, "order").permutation(len(preferences))
        # A step lies in one epoch or two: two orders are enough.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def for_step(self, step: int) -> list[TrainingComparison]:
        """Return the comparisons of a step, counted from 1."""
        indices = [index for index in self._indices(step) for _ in range(self.orders)]
        return [self._comparison(step, place, i, (step, place)) for place, i in enumerate(indices)]

    def unused(self, step: int) -> Iterator[int]:
        """Return the indices of the preferences that a step does not show, in a random order of the step's own."""
        step_indices = set(self._indices(step))  # most steps ask for none: the order is drawn with the first one
        for index in _generator(self.seed, "unused", step).permutation(len(self.preferences)):
            if index not in step_indices:
                yield int(index)

    def replacements(
        self, step: int, places: Sequence[int], unused: Iterator[int], attempt: int
    ) -> list[TrainingComparison]:
        """Return comparisons of unused preferences, while there are any, at places of a step.

        With both orders a preference takes both places of another one.
        """
        firsts = sorted({place - place % self.orders for place in places})
        # `unused` comes second, so that the end of `firsts` consumes none of it.
        return [
            self.replacement(step, first + order, index, attempt)
            for first, index in zip(firsts, unused, strict=False)
            for order in range(self.orders)
        ]

    def replacement(self, step: int, place: int, index: int, attempt: int) -> TrainingComparison:
        """Return the comparison of another preference at a place of a step, the `attempt`th there.

        The place decides which side shows a, as before.
        """
        return self._comparison(step, place, index, (step, place, attempt))

    def _indices(self, step: int) -> list[int]:
        """The preferences of a step, by index."""
        count = self.comparisons // self.orders
        places = (divmod((step - 1) * count + place, len(self.preferences)) for place in range(count))
        return [int(self._order(epoch)[rank]) for epoch, rank in places]

    def _comparison(self, step: int, place: int, index: int, key: tuple[int, ...]) -> TrainingComparison:
        preference = self.preferences[index]
        a_first = ((step - 1) * self.comparisons + place) % 2 == 0
        first, second = placed(preference.a, preference.b, a_first)
        y = share_for_first(preference.p_people, a_first)
        return TrainingComparison(first, second, preference.prompt, preference, y, key)

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        """The order of the preferences in an epoch."""
        if epoch == 0:
            return self._first_order
        generator, count = _generator(self.seed, "order", epoch), len(self.preferences)
        order = np.empty(count, np.int64)
        for half in range(2):
            # This half shows a first in even epochs, the other in odd ones; a is first at every other place.
            order[(half + epoch + epoch * count) % 2 :: 2] = generator.permutation(self._first_order[half::2])
        return order


def random_subset(preferences: Sequence[Preference], count: int, seed: int, purpose: str) -> list[Preference]:
    """Return at most `count` of the preferences, drawn once for a purpose, in their order.

    A smaller subset for the same purpose is part of a larger one.
    """
    indices = _generator(seed, purpose).permutation(len(preferences))[:count]
    return [preferences[i] for i in np.sort(indices).tolist()]


def held_out_split(
    preferences: Sequence[Preference], share: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """Return the preferences to learn from, and those to measure with, both in their order.

    Preferences that a prompt or a group connects stay together, so training sees no prompt of a measurement. Whole
    groups, in random order, fill the share, with at least the smallest one. DataError if all are connected.
    """
    if not share:
        return list(preferences), []
    labels = _connected(preferences)  # (N,)
    names, sizes = np.unique(labels, return_counts=True)
    if len(names) < 2:
        raise DataError(
            f"all {len(preferences)} preferences are of one prompt or group: none can be held out without showing what "
            "it asks for; give data of several prompts, or no --held-out"
        )
    held_out, count = [], 0
    for i in _generator(seed, "held out").permutation(len(names)):
        if count + sizes[i] <= share * len(preferences):
            held_out.append(names[i])
            count += sizes[i]
    is_out = np.isin(labels, held_out or [names[np.argmin(sizes)]]).tolist()
    train, test = (list(compress(preferences, part)) for part in ([not out for out in is_out], is_out))
    return train, test


def _connected(preferences: Sequence[Preference]) -> NDArray[np.int32]:
    """A label for each preference, equal for those that prompts and groups connect, directly or through others."""
    count = size = len(preferences)
    edges = []  # from preferences to a node for each prompt and each group, behind those of the preferences
    for names in ([p.prompt for p in preferences], [p.group for p in preferences]):
        nodes: dict[str, int] = {}
        numbers = np.fromiter((nodes.setdefault(name, len(nodes)) if name else -1 for name in names), np.int64, count)
        edges.append(np.stack([np.arange(count), size + numbers])[:, numbers >= 0])  # (2, edges)
        size += len(nodes)
    rows, columns = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), (size, size))
    labels: NDArray[np.int32] = connected_components(graph, directed=False)[1][:count]
    return labels


def _generator(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, 0, _PURPOSES.index(purpose), number])

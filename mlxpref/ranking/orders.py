"""Whether the next pairs are asked in both orders or in one, and which image is shown first in one.

Both orders cancel the position bias of each pair. One order costs half: where the bias hardly varies from pair to pair,
the fit's own term absorbs it, and twice as many pairs order the images better.
"""

from collections.abc import Iterable

import numpy as np

from mlxpref.ranking.noise import Noise
from mlxpref.ranking.outcomes import all_pairs

FEW_IMAGES = 8  # up to so many images both orders are asked: their pairs are soon all asked
TRIAL_IMAGES = 4  # all pairs of so many images, in both orders, show noise and bias
TRIAL_BUDGET, MOST_TRIALS = 64, 4  # one such trial for so many comparisons, and at most so many
MOST_WORTH = 4.0  # of twice as many pairs, where they hardly connect the images: measured up to 3 to 5


def trial_pairs(count: int, comparisons: int, seed: int) -> list[tuple[int, int]]:
    """The pairs of a first round that shows noise and bias, of `count` images with a budget of comparisons.

    Only pairs that close a cycle show the noise, so it has all pairs (a, b), a < b, of four images, and of further
    fours where they are a small part of the budget. None where already the first would take more than a third of it.
    """
    if count < TRIAL_IMAGES or comparisons < 3 * TRIAL_IMAGES * (TRIAL_IMAGES - 1):
        return []
    groups = max(1, min(comparisons // TRIAL_BUDGET, MOST_TRIALS, count // TRIAL_IMAGES))
    order = np.random.default_rng([seed, count]).permutation(count)[: groups * TRIAL_IMAGES]
    chosen = [sorted(group) for group in order.reshape(groups, TRIAL_IMAGES).tolist()]
    return [(group[a], group[b]) for group in chosen for a, b in all_pairs(TRIAL_IMAGES)]


def worth_of_pairs(comparisons_an_image: float) -> float:
    """By what factor twice as many pairs lower the variance of differences, at equal noise of an answer.

    In a random regular graph of degree d two images are (d - 1) / (d (d - 2)) apart, in units of a pair's variance
    times two; both orders of M / 2 pairs of N images make d = M / N, one order of M pairs 2 M / N.
    """
    degree = comparisons_an_image
    if degree <= 2:
        return MOST_WORTH
    return min(4 * (degree - 1) ** 2 / ((degree - 2) * (2 * degree - 1)), MOST_WORTH)


def better_orders(noise: Noise, comparisons_an_image: float) -> int:
    """1 or 2: the orders of a pair that give the smaller variance of differences at equal comparisons.

    One order has the noise of the pair and that of its bias, both orders only the first; but of the same number of
    comparisons one order makes twice as many pairs.
    """
    both, bias = float(noise.of_mean(0.5)), float(noise.of_difference(0.5))
    return 1 if (both + bias) / both < worth_of_pairs(comparisons_an_image) else 2


def in_one_order(pairs: Iterable[tuple[int, int]], lead: dict[int, int]) -> list[tuple[int, int]]:
    """The pairs as (first shown, second shown), so that every image is first about as often as second.

    `lead` counts for every image how often it was first, less how often it was second, and is kept up.
    """
    shown = []
    for a, b in pairs:
        # Of equal leads the parity of the sum decides: always the smaller number would favour it.
        swap = lead.get(a, 0) > lead.get(b, 0) or (lead.get(a, 0) == lead.get(b, 0) and (a + b) % 2 == 1)
        first, second = (b, a) if swap else (a, b)
        lead[first], lead[second] = lead.get(first, 0) + 1, lead.get(second, 0) - 1
        shown.append((first, second))
    return shown

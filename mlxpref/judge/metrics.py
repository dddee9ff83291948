"""The agreement of a judge with people, and its position bias: pure functions of probabilities and votes.

A judge's preference is a probability from 0 to 1; 0.5 is undecided, NaN is unreadable.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlxpref.ranking.intervals import share_interval, widest
from mlxpref.ranking.log_odds import soft_preference

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_BOOTSTRAPS = 2000
_BINS = 10
DRAWN_TOGETHER = 1 << 21
"""Groups per bootstrap chunk: 16 MB of numbers."""


@dataclass(frozen=True)
class Metrics:
    """The results of `measure`: shares from 0 to 1, NaN where there was nothing to measure."""

    pairs: int
    ties_dropped: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    accuracy_macro: float
    both_orders_accuracy: float
    position_consistency: float
    first_choice_rate: float
    first_image_baseline: float
    brier: float
    ece: float


def measure(
    p_shown_first: Floats,
    p_shown_second: Floats,
    p_people: Floats,
    groups: Sequence[str],
    ties_dropped: int = 0,
    a_is_better: Bools | None = None,
) -> Metrics:
    """The agreement of a judge with people over N pairs, none of them a tie.

    `p_shown_first` and `p_shown_second` (N,) are the judge's preferences for a where it was shown first and second,
    `p_people` (N,) the share of people who prefer a, `a_is_better` (N,) the right side, by default the majority's. A
    pair is right if both orders, combined in log-odds, lean to that side; an even preference is wrong.

    - `accuracy_low`, `accuracy_high`: 95 % interval, by bootstrap over groups, as pairs of a prompt are not
      independent. It is never narrower than for independent pairs, because the bootstrap fails with few groups or
      nearly no errors. The same for the same input.
    - `accuracy_macro`: the mean over groups of each group's accuracy.
    - `both_orders_accuracy`: right in either order by itself.
    - `position_consistency`: the same image preferred in both orders.
    - `first_choice_rate`: how often the image on the first place is preferred; 0.5 for a judge without position bias.
    - `first_image_baseline`: how often a is better, the accuracy of "always the first in the file".
    - `brier`: mean squared distance to the share of people. `ece`: expected calibration error against it, in ten
      bins, both sides of each pair counted, so that it does not depend on which image is called a.
    """
    p = both_orders(p_shown_first, p_shown_second)
    a_is_better = p_people > 0.5 if a_is_better is None else a_is_better
    correct = agreement(p, a_is_better)
    correct_in_order = [agreement(p_order, a_is_better) for p_order in (p_shown_first, p_shown_second)]
    consistent = np.sign(p_shown_first - 0.5) * np.sign(p_shown_second - 0.5) > 0
    group = group_numbers(groups)
    total, size = np.bincount(group, correct), np.bincount(group)
    low, high = widest(interval(total, size), share_interval(int(correct.sum()), len(correct)))
    return Metrics(
        pairs=len(p),
        ties_dropped=ties_dropped,
        accuracy=float(correct.mean()),
        accuracy_low=low,
        accuracy_high=high,
        accuracy_macro=float((total / size).mean()),
        both_orders_accuracy=float((correct_in_order[0] & correct_in_order[1]).mean()),
        position_consistency=float(consistent.mean()),
        first_choice_rate=first_choice_rate(np.concatenate([p_shown_first, 1 - p_shown_second])),
        first_image_baseline=float(a_is_better.mean()),
        brier=float(((p - p_people) ** 2).mean()),
        ece=calibration_error(np.concatenate([p, 1 - p]), np.concatenate([p_people, 1 - p_people])),
    )


def both_orders(p_shown_first: Floats, p_shown_second: Floats) -> Floats:
    """The soft preferences (N,) of pairs from those of both orders (N,); 0.5 where neither can be read."""
    return np.nan_to_num(soft_preference(p_shown_first, p_shown_second), nan=0.5)


def agreement(p: Floats, a_is_better: Bools) -> Bools:
    """Whether preferences for a (N,) lean to the better side; even or unreadable ones do not."""
    return np.where(a_is_better, p > 0.5, p < 0.5)


def first_choice_rate(p_first: Floats) -> float:
    """The share of decided comparisons (N,) that prefer the image on the first place.

    Over both orders of the same pairs this measures position bias; over one order only if the better image is first in
    half of the pairs. NaN if nothing is decided.
    """
    first, second = int((p_first > 0.5).sum()), int((p_first < 0.5).sum())
    return first / (first + second) if first + second else math.nan


def human_agreement(p_people: Floats, votes: ArrayLike) -> float:
    """The probability that two people agree on a pair: a ceiling for a judge.

    Of n votes, k are for a: (k (k-1) + (n-k) (n-k-1)) / (n (n-1)) of the pairs of voters agree. The mean over the
    pairs with two votes or more; NaN where there is none.
    """
    count = np.asarray(votes, np.float64)
    several = count >= 2
    n = count[several]
    if not len(n):
        return math.nan
    k = np.rint(p_people[several] * n)
    return float(((k * (k - 1) + (n - k) * (n - k - 1)) / (n * (n - 1))).mean())


def calibration_bins(p: Floats, p_people: Floats) -> tuple[Floats, Floats, Floats]:
    """For equal bins of probability: the count of (N,) in each, their sum, and the sum of people's shares."""
    bin_of = np.minimum((p * _BINS).astype(int), _BINS - 1)  # 1 falls in the last one
    sums = [np.bincount(bin_of, each, _BINS).astype(np.float64) for each in (np.ones_like(p), p, p_people)]
    return sums[0], sums[1], sums[2]


def calibration_error(p: Floats, p_people: Floats) -> float:
    """The mean distance between probability and share of people, over the bins weighted by their size."""
    _, p_sum, people_sum = calibration_bins(p, p_people)
    return float(np.abs(p_sum - people_sum).sum() / len(p))


def group_numbers(groups: Sequence[str]) -> NDArray[np.intp]:
    """The groups (N,) as numbers from 0."""
    return np.asarray(np.unique(np.asarray(groups), return_inverse=True)[1], np.intp)


def interval(total: ArrayLike, size: ArrayLike) -> tuple[float, float]:
    """The 95 % bootstrap interval of sum(total) / sum(size), both (groups,), groups drawn with replacement.

    It fails with few groups (one has no width at all) and nearly no errors: combine it with that of independent pairs.

    The same for the same input. For a mean over groups, each group's mean is its total and 1 its size.
    """
    totals, sizes = np.asarray(total, np.float64), np.asarray(size, np.float64)
    random, count = np.random.default_rng(0), len(sizes)
    shares: list[Floats] = []
    at_a_time = max(1, DRAWN_TOGETHER // count)
    for start in range(0, _BOOTSTRAPS, at_a_time):
        samples = random.integers(count, size=(min(at_a_time, _BOOTSTRAPS - start), count))
        shares.append(totals[samples].sum(axis=1) / sizes[samples].sum(axis=1))
    low, high = np.quantile(np.concatenate(shares), [0.025, 0.975])
    return float(low), float(high)

"""The choice of the next pairs, and of when to stop. Images are numbers, strengths are log-odds in nats.

The gain of a pair is a product: the doubt which image is stronger, the share of that doubt that an answer removes, and
the chance that one of them enters or leaves the top; where only the top matters, of the last two. `next_round` picks
the largest; each pick lowers the gains of other pairs with its images.

Choosing by earlier answers has a price: the best so far owe some of their lead to luck. `fit_strengths` fits the
deviation of the strengths to the answers, which takes most of that back (scripts/ranking_coverage.py measures it).
"""

import math
from collections.abc import Collection
from typing import Literal

import numpy as np
from scipy.special import expit, ndtr

from mlxpref.errors import ConfigError
from mlxpref.ranking.bradley_terry import PRIOR_DEVIATION, Instrument, StrengthFit
from mlxpref.ranking.noise import ONE_ANSWER, Noise
from mlxpref.ranking.outcomes import Array, Indices, PairOutcome, all_pairs, components
from mlxpref.ranking.posterior import normal_draws
from mlxpref.ranking.threads import one_thread

REACH = 16  # candidates are at most this far apart in the current order, so that a round is linear in N
MAX_PAIRS = 2  # of one image in a round: an answer may make further pairs needless
SETTLED = 0.95  # the probability at which a top is settled
SETTLED_DRAWS = 4000  # know it to 0.003


def pair_budget(count: int, pairs: int | Literal["all"] | None = None) -> int:
    """How many pairs of `count` images to ask: `pairs`, "all", or by default two an image; at most all that exist."""
    total = count * (count - 1) // 2
    return total if pairs == "all" else min(2 * count if pairs is None else pairs, total)


def default_round(count: int) -> int:
    """The pairs asked between two fits: one for three images, at least 3.

    Smaller rounds use their answers better; larger ones fill a judge's batches and need fewer fits.
    """
    return max(3, count // 3)


@one_thread()
def next_round(
    count: int,
    asked: Collection[tuple[int, int]],
    fit: StrengthFit | None,
    size: int,
    seed: int = 0,
    top: int | None = None,
    orders: int = 2,
    instrument: int = 0,
) -> list[tuple[int, int]]:
    """The next `size` pairs (a, b), a < b, to ask of `count` images, or all that are left if they are no more.

    `asked` are the pairs of earlier rounds, either image first; none of them is asked again. `fit` is the fit to their
    answers, None before the first. Until the pairs connect all images, it picks only pairs that connect, count - 1 in
    all. An image is in at most `MAX_PAIRS` of a round, unless that leaves the round short. `top`: how many of the best
    matter most, by default 1. The pairs will be asked in one or both `orders`, by `instrument`. `seed` orders equal
    images; nothing else is random. ConfigError: fewer than two images, a size or a top below 1.
    """
    if count < 2 or size < 1 or (top is not None and top < 1):
        raise ConfigError(f"a round needs at least two images, one pair and top 1, not {count}, {size} and {top}")
    past_pairs = {(min(pair), max(pair)) for pair in asked}
    if size >= count * (count - 1) // 2 - len(past_pairs):
        return [pair for pair in all_pairs(count) if pair not in past_pairs]
    fit = fit or _prior_fit(count)
    permutation = np.random.default_rng([seed, len(past_pairs)]).permutation(count)
    order = permutation[np.argsort(-np.round(fit.strengths[permutation], 9), kind="stable")]  # (N,) best first
    gain = _InformationGain(fit, order, top, size, orders, instrument)
    island = components(count, *np.array(sorted(past_pairs), np.int64).reshape(-1, 2).T)
    uses = np.zeros(count, np.int64)
    max_pairs, reach = MAX_PAIRS, REACH
    a, b = _candidates(order, past_pairs, reach)
    value = gain.of(a, b)
    pairs: list[tuple[int, int]] = []
    while len(pairs) < size:
        connects = island[a] != island[b] if island.any() else np.ones(len(a), np.bool_)
        free = (uses[a] < max_pairs) & (uses[b] < max_pairs) & connects
        if not free.any():
            # Neighbours in the order from different islands never met: only the limits can exclude them.
            if len(a) and max_pairs < count:
                max_pairs += 1
            else:
                reach *= 2
                a, b = _candidates(order, past_pairs, reach)
                value = gain.of(a, b)
            continue
        best = int(np.argmax(np.where(free, value, -1.0)))
        x, y = int(a[best]), int(b[best])
        pairs.append((min(x, y), max(x, y)))
        past_pairs.add(pairs[-1])
        gain.add(x, y)
        uses[[x, y]] += 1
        low, high = sorted((island[x], island[y]))
        island[island == high] = low
        a, b, value = np.delete(a, best), np.delete(b, best), np.delete(value, best)
        neighbours = np.flatnonzero((a == x) | (a == y) | (b == x) | (b == y))
        value[neighbours] = gain.of(a[neighbours], b[neighbours])
    return pairs


@one_thread()
def is_settled(
    fit: StrengthFit,
    top: int,
    outcomes: Collection[PairOutcome],
    members: Collection[int] | None = None,
    orders: int = 2,
    instrument: int = 0,
) -> bool:
    """Whether all that could still be asked would leave the `top` strongest images the same, with 95 %.

    `outcomes` are those of the fit; what could still be asked is every pair of the `members` (by default of all images)
    in its missing `orders`, by `instrument`. The set is meant, in any order. It says nothing of a judge whom more
    answers would not make surer: his top may be settled and not known well, as intervals and ties show. It does not
    promise that 95 % of the runs that stop at the first True are right: frequent looks find lucky answers
    (scripts/ranking_top.py measures it). A `top` of all images or more is settled. ConfigError: a top below 1.
    """
    if top < 1:
        raise ConfigError(f"the top {top} cannot be settled: 1 is the least")
    if top >= len(fit.strengths):
        return True
    change = change_by_the_rest(fit, outcomes, members, orders, instrument)
    order = np.argsort(-fit.strengths, kind="stable")
    strengths = (fit.strengths + normal_draws(change, SETTLED_DRAWS, np.random.default_rng(0)))[:, order]
    same = strengths[:, :top].min(axis=1) > strengths[:, top:].max(axis=1)
    return float(same.mean()) >= SETTLED


def change_by_the_rest(
    fit: StrengthFit, outcomes: Collection[PairOutcome], members: Collection[int] | None, orders: int, instrument: int
) -> Array:
    """(N, N): the covariance of the change of strengths once all is asked: what that will take from the fit's own."""
    count = len(fit.strengths)
    asked = np.zeros((count, count), np.int64)
    for pair in outcomes:
        if pair.instrument == instrument:
            one, other = sorted((pair.a, pair.b))
            asked[one, other] = (pair.p_a_shown_first is not None) + (pair.p_a_shown_second is not None)
    a, b = np.triu_indices(count, 1)  # (K,)
    judged = fit.instrument(instrument)
    p_model = expit(judged.scale * (fit.strengths[a] - fit.strengths[b]))  # (K,)
    asked_precision = (1 / judged.answer_variance(p_model, number) for number in (1, 2))
    precision = np.stack([np.zeros_like(p_model), *asked_precision])  # (3, K) by the number of orders
    gain = np.maximum(precision[orders] - precision[asked[a, b], np.arange(len(a))], 0)
    if members is not None:
        gain = np.where(np.isin(a, list(members)) & np.isin(b, list(members)), gain, 0.0)
    information = np.zeros((count, count))
    np.add.at(
        information,
        (np.concatenate([a, b, a, b]), np.concatenate([a, b, b, a])),
        np.outer([1, 1, -1, -1], gain).ravel(),
    )
    before = np.linalg.pinv(fit.covariance, rcond=1e-9, hermitian=True)
    after = np.linalg.pinv(before + information / fit.widening**2, rcond=1e-9, hermitian=True)
    return np.asarray(fit.covariance - after)


class _InformationGain:
    """The information gain of pairs, given a fit and the pairs already in the round.

    The product of the doubt who is stronger, exp(-d^2 / 2v) for a difference of mean d and variance v (the normal
    density at 0 against that at d), the share of v that an answer takes away, and 1 plus the doubt whether the two are
    in the top. With a `top` only the last two count. The gain only falls as the round grows.
    """

    def __init__(
        self, fit: StrengthFit, order: Indices, top: int | None, size: int, orders: int, instrument: int
    ) -> None:
        self.fit, self.orders, self.only_top = fit, orders, top is not None
        self.asked = fit.instrument(instrument)
        self.explained = np.zeros((len(order), size))  # (N, size), column i: what pick i's answer says of every image
        self.pair_count = 0
        top = min(top or 1, len(order) - 1)
        rival = np.full(len(order), order[top - 1])
        rival[order[:top]] = order[top]
        behind = np.abs(fit.strengths - fit.strengths[rival])
        own, covariance = np.diag(fit.covariance), fit.covariance[np.arange(len(order)), rival]
        self.contention = 2 * _below_zero(behind, own + own[rival] - 2 * covariance)

    def of(self, a: Indices, b: Indices) -> Array:
        """(K,), (K,) images -> (K,) gains of their pairs, above 0."""
        difference, variance, noise = self._difference(a, b)
        known, contention = variance / (variance + noise), self.contention[a] + self.contention[b]
        if self.only_top:
            return np.asarray(known * (1e-3 + contention))
        doubt = np.exp(-np.minimum(difference**2 / (2 * variance), 600.0))
        return np.asarray(doubt * known * (1 + contention))

    def add(self, x: int, y: int) -> None:
        """Add a pair to the round: its answer will lower the variance of differences (not their means)."""
        before = self.explained[:, : self.pair_count]
        _, variance, noise = self._difference(np.array([x]), np.array([y]))
        change = self.fit.covariance[:, x] - self.fit.covariance[:, y] - before @ (before[x] - before[y])
        self.explained[:, self.pair_count] = change / np.sqrt(variance + noise)
        self.pair_count += 1

    def _difference(self, a: Indices, b: Indices) -> tuple[Array, Array, Array]:
        """Mean and variance of differences, and the variance that an answer would have, each (K,)."""
        covariance, before = self.fit.covariance, self.explained[:, : self.pair_count]
        difference = self.fit.strengths[a] - self.fit.strengths[b]
        variance = covariance[a, a] + covariance[b, b] - 2 * covariance[a, b]
        variance = np.maximum(variance - ((before[a] - before[b]) ** 2).sum(axis=1), 1e-9)
        # The logistic of a normal variable has about this mean (MacKay 1992).
        p_model = expit(self.asked.scale * difference / np.sqrt(1 + math.pi / 8 * self.asked.scale**2 * variance))
        return difference, variance, self.asked.answer_variance(p_model, self.orders)


def _prior_fit(count: int) -> StrengthFit:
    """The fit before the first answer: the prior of `fit_strengths`."""
    covariance = PRIOR_DEVIATION**2 * (np.eye(count) - 1 / count)
    return StrengthFit(np.zeros(count), covariance, (Instrument(1.0, 0.0, PRIOR_DEVIATION, Noise(ONE_ANSWER, 0.0)),))


def _candidates(order: Indices, met: Collection[tuple[int, int]], reach: int) -> tuple[Indices, Indices]:
    """Both images of every pair that was not asked and whose places in the order are at most `reach` apart."""
    count = len(order)
    gaps = range(1, min(reach, count - 1) + 1)
    a = np.concatenate([order[: count - gap] for gap in gaps])
    b = np.concatenate([order[gap:] for gap in gaps])
    past_pairs = np.array([low * count + high for low, high in met], np.int64)
    new = ~np.isin(np.minimum(a, b) * count + np.maximum(a, b), past_pairs)
    return a[new], b[new]


def _below_zero(mean: Array, variance: Array) -> Array:
    """(K,), (K,) -> the probability that a normal variable is below 0."""
    return np.asarray(ndtr(-mean / np.sqrt(np.maximum(variance, 1e-18))))

"""Soft Bradley-Terry: judged pairs become strengths with their uncertainty, an order, and ties.

Images are numbers from 0 to count - 1, strengths are log-odds in nats. The model, for N images:

    logit P(first preferred) = strength of the first - strength of the second + position bias

An interval says how precisely the pairs so far tell this judge's own full ranking, not what people think. It stays wide
after all pairs, because a pair is one draw of the judge's possible answers.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, stdtrit

from mlxpref.errors import DataError
from mlxpref.ranking.log_odds import combine_orders
from mlxpref.ranking.posterior import best_probabilities, difference_variance
from mlxpref.ranking.threads import one_thread

Array = NDArray[np.float64]

PRIOR_DEVIATION = 3.0  # nats; of the position bias, and of strengths as expected before any answer
PRIOR_DOUBT = 1.0  # of the log deviation of strengths: a factor of e either way
MAX_UPDATES = 12  # of noise and deviation; 2 to 5 suffice; with many saturated answers more change little
SPREAD_CAUTION = 3.0  # the fitted deviation's variance over its inverse Fisher information, see fit_strengths
MIN_DISPERSION = 1e-4  # however well the model fits, a comparison never counts for more than 10,000 votes
Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class PairOutcome:
    """The judge's answers about images a and b: P(a preferred) with a shown first, and with a shown second.

    None or NaN is a missing order. List each pair once: a pair that is listed twice counts twice.
    """

    a: int
    b: int
    p_a_shown_first: float | None
    p_a_shown_second: float | None

    @property
    def p_a(self) -> float | None:
        """The soft preference for a, see `combine_orders`."""
        return combine_orders(self.p_a_shown_first, self.p_a_shown_second)


@dataclass(frozen=True)
class StrengthFit:
    """The normal posterior of strengths and position bias.

    `strengths` (N,) have mean 0, `covariance` (N, N) is that of the centred strengths, `position_bias` is above 0 if
    the judge favours the first image, `dispersion` is the noise of a comparison against that of one vote (1/3: as good
    as three votes), `degrees_of_freedom` are those of its estimate, `deviation` is that of the strengths' prior.
    """

    strengths: Array
    covariance: Array
    position_bias: float
    position_bias_stderr: float
    dispersion: float
    degrees_of_freedom: float
    deviation: float = PRIOR_DEVIATION


@dataclass(frozen=True)
class RankedImage:
    """One image's place.

    `rank` is 1 + the number of stronger images; `low` and `high` bound a 95 % interval (see the top of this module);
    `p_best` is the probability to be the strongest; `wins` of its `pairs` had a soft preference above 0.5 for it;
    `tied_with`: images whose difference from this one is not resolved at 95 %.
    """

    index: int
    rank: int
    strength: float
    stderr: float
    low: float
    high: float
    p_best: float
    wins: int
    pairs: int
    tied_with: tuple[int, ...]


@dataclass(frozen=True)
class StrengthRanking:
    """Images best first (equal strengths by index), how far the judge favours the first place, and the fit."""

    images: tuple[RankedImage, ...]
    position_bias: float
    position_bias_stderr: float
    fit: StrengthFit


def all_pairs(count: int) -> Iterator[tuple[int, int]]:
    """Every pair (a, b) with a < b of `count` images: the round robin, count (count - 1) / 2 pairs."""
    return ((a, b) for a in range(count) for b in range(a + 1, count))


@one_thread()
def rank_images(count: int, outcomes: Iterable[PairOutcome], default_dispersion: float = 1.0) -> StrengthRanking:
    """Rank `count` images from the pairs judged so far; any subset of pairs and orders will do.

    Permuting the images permutes the ranking. `default_dispersion` and errors as in `fit_strengths`.
    """
    preferences = [(pair, p_a) for pair in outcomes if (p_a := pair.p_a) is not None]
    fit = fit_strengths(count, [pair for pair, _ in preferences], default_dispersion)
    wins, pairs = [0] * count, [0] * count
    for pair, p_a in preferences:
        for index, won in ((pair.a, p_a > 0.5), (pair.b, p_a < 0.5)):
            wins[index] += won
            pairs[index] += 1
    strengths = np.round(fit.strengths, 9)  # strengths that differ by rounding only share a rank
    rank = 1 + count - np.searchsorted(np.sort(strengths), strengths, side="right")
    error = np.sqrt(np.diag(fit.covariance))
    bounds = fit.strengths - Z95 * error, fit.strengths + Z95 * error
    p_best = best_probabilities(fit.strengths, fit.covariance)
    difference = np.abs(fit.strengths[:, None] - fit.strengths)  # (N, N)
    tied = difference <= Z95 * np.sqrt(difference_variance(fit.covariance))
    np.fill_diagonal(tied, False)
    numbers = [column.tolist() for column in (rank, fit.strengths, error, *bounds, p_best)]
    ties = [tuple(np.flatnonzero(row).tolist()) for row in tied]
    rows = list(zip(range(count), *numbers, wins, pairs, ties, strict=True))
    images = tuple(RankedImage(*rows[i]) for i in np.argsort(rank, kind="stable"))
    return StrengthRanking(images, fit.position_bias, fit.position_bias_stderr, fit)


@one_thread()
def fit_strengths(count: int, outcomes: Sequence[PairOutcome], default_dispersion: float = 1.0) -> StrengthFit:
    """Strengths by soft Bradley-Terry with a position bias, maximum a posteriori, and their covariance.

    Strengths and position bias have normal priors of mean 0. Probabilities are fractional outcomes of a
    quasi-likelihood (Papke & Wooldridge 1996) with variance dispersion * p (1 - p), so data count 1 / dispersion
    times: covariance = inverse (Hessian / dispersion + prior). How the dispersion is measured: `_measure_noise`; how
    the deviation of the strengths' prior follows from the data: `_fit_prior_width`.

    Both are estimates, which widens the covariance: by Student's quantile over the normal one, squared, as few pairs
    estimate their noise badly; and along d strengths / d log deviation by `SPREAD_CAUTION` times its inverse
    information, which takes noise as known and answers as normal: with 1 instead, 95 % intervals after adaptive pairs
    cover 91 to 92 %, now 92 to 95 %. The bias has a noise of its own, from the differences between the two orders of a
    pair.

    Below two degrees of freedom (two images, a tree of pairs, only saturated answers) the noise cannot be measured and
    `default_dispersion` replaces it: with 1 a comparison counts as one vote. Callers may pass the dispersion of the
    judge's other pairs.

    DataError: fewer than two images, an index outside them, a pair of one image, a probability outside 0 to 1.
    """
    data = _Comparisons(count, outcomes)
    parameters, inverse, noise, freedom = _measure_noise(data, default_dispersion)
    parameters, noise, log_deviation, information = _fit_prior_width(
        data, parameters, inverse, noise, freedom, default_dispersion
    )
    penalty = _penalty(count, noise, log_deviation)
    parameters, inverse = _newton(data, parameters, penalty)

    dispersion = _widen(noise, freedom, default_dispersion)
    order_noise, order_freedom = _dispersion(*data.order_errors(parameters, inverse), dispersion)
    bias_variance = _widen(order_noise, order_freedom, dispersion) * float(inverse[count, count])
    inverse = inverse[:count, :count]
    drift = inverse @ (2 * penalty * parameters)[:count]  # (N,) d strengths / d log deviation
    return StrengthFit(
        strengths=parameters[:count] - parameters[:count].mean(),
        covariance=_centre(dispersion * inverse + SPREAD_CAUTION / information * np.outer(drift, drift)),
        position_bias=float(parameters[count]),
        position_bias_stderr=math.sqrt(bias_variance),
        dispersion=dispersion,
        degrees_of_freedom=freedom,
        deviation=math.exp(log_deviation),
    )


def _measure_noise(data: "_Comparisons", default: float) -> tuple[Array, Array, float, float]:
    """Parameters (N + 1,), their inverse Hessian, the dispersion of comparisons and its degrees of freedom.

    The dispersion comes from pairs, as the two orders of a pair share one error: sum of squared pair residuals / sum
    of w (1 - h), w the pair's information, h its leverage; unlike Pearson's X2 (McCullagh & Nelder 1989, chapter 9)
    one upset of a very sure judge cannot swamp it. The first fit has nearly no prior, so that shrinkage is not taken
    for noise; the second measures noise without the first one's overshoot.
    """
    parameters, noise = np.zeros(data.size), 0.01
    for _ in range(2):
        parameters, inverse = _newton(data, parameters, noise / PRIOR_DEVIATION**2)
        noise, freedom = _dispersion(*data.pair_errors(parameters, inverse), default)
    return parameters, inverse, noise, freedom


def _fit_prior_width(
    data: "_Comparisons", parameters: Array, inverse: Array, noise: float, freedom: float, default: float
) -> tuple[Array, float, float, float]:
    """Parameters, noise, the log deviation of the strengths' prior, and the data's information on it.

    Empirical Bayes: where earlier answers choose the pairs, the best so far owe some of their lead to luck, and only a
    prior of the right width takes that back. The deviation maximises the marginal likelihood under Laplace's
    approximation, times a log-normal prior (median `PRIOR_DEVIATION`, deviation of the logarithm `PRIOR_DOUBT`) that
    decides where data say little and keeps it from 0 and infinity. Each update measures the noise again.
    """
    count = data.size - 1
    mean_variance = noise * float(np.trace(_centre(inverse[:count, :count]))) / count
    excess = float(np.var(parameters[:count])) - mean_variance
    log_deviation = math.log(max(excess, (PRIOR_DEVIATION / 10) ** 2)) / 2  # a first guess
    for _ in range(MAX_UPDATES):
        parameters, inverse = _newton(data, parameters, _penalty(count, noise, log_deviation), max_steps=1)
        step, information = _deviation_step(parameters[:count], noise * inverse[:count, :count], log_deviation)
        log_deviation += step
        new_noise, new_freedom = _dispersion(*data.pair_errors(parameters, inverse), default)
        noise = new_noise if min(freedom, new_freedom) >= 2 else noise
        if abs(step) < 1e-3:
            break
    return parameters, noise, log_deviation, information


class _Comparisons:
    """The outcomes over K pairs: a, b (K,) and p (2, K), P(a) shown first and shown second, NaN if missing."""

    def __init__(self, count: int, outcomes: Sequence[PairOutcome]) -> None:
        if count < 2:
            raise DataError(f"a ranking needs at least two images, not {count}")
        rows = [(o.a, o.b, o.p_a_shown_first, o.p_a_shown_second) for o in outcomes]
        columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T  # (4, K); None becomes NaN
        self.size = count + 1  # parameters: the strengths, then the position bias
        self.p = columns[2:]
        self.a, self.b = a, b = columns[:2].astype(np.int64)
        bad = (np.minimum(a, b) < 0) | (np.maximum(a, b) >= count) | (a == b)
        bad |= ((self.p < 0) | (self.p > 1)).any(axis=0)
        if bad.any():
            raise DataError(
                f"{bad.sum()} of {len(rows)} pairs cannot be ranked, first {outcomes[int(bad.argmax())]}: a and b "
                f"must be two different images from 0 to {count - 1}, probabilities must lie between 0 and 1"
            )

    def log_odds(self, parameters: Array) -> Array:
        """(N + 1,) strengths and bias -> (2, K) log-odds of a, shown first and shown second."""
        difference, bias = parameters[self.a] - parameters[self.b], parameters[-1]
        return np.stack([difference + bias, difference - bias])

    def residuals(self, parameters: Array) -> tuple[Array, Array]:
        """(N + 1,) -> p - P(a) and its Bernoulli variance for every comparison, (2, K) each, 0 where missing."""
        p_model = expit(self.log_odds(parameters))
        return np.nan_to_num(self.p - p_model), np.where(np.isnan(self.p), 0.0, p_model * (1 - p_model))

    def loss(self, parameters: Array, penalty: float | Array) -> float:
        """Minus the log quasi-likelihood, plus the prior's term; `penalty` of every parameter, or one for all."""
        eta = self.log_odds(parameters)
        return float(np.nansum(np.logaddexp(0, eta) - self.p * eta) + (penalty * parameters**2).sum() / 2)

    def derivatives(self, parameters: Array, penalty: float | Array) -> tuple[Array, Array]:
        """The gradient (N + 1,) of minus the loss and the Hessian (N + 1, N + 1) of the loss."""
        residual, variance = self.residuals(parameters)
        total, change = residual.sum(axis=0), residual[0] - residual[1]
        weight, shift = variance.sum(axis=0), variance[0] - variance[1]
        a, b, size = self.a, self.b, self.size
        bias = np.full_like(a, size - 1)
        values = np.concatenate([total, -total, change])  # (3 K,)
        gradient: Array = np.bincount(np.concatenate([a, b, bias]), values, size) - penalty * parameters
        rows = np.concatenate([a, b, a, b, a, bias, b, bias, bias])  # (9 K,) places in the Hessian
        columns = np.concatenate([a, b, b, a, bias, a, bias, b, bias])
        values = np.concatenate([weight, weight, -weight, -weight, shift, shift, -shift, -shift, weight])
        hessian = np.bincount(rows * size + columns, values, size * size).reshape(size, size)
        prior: Array = np.diag(np.full(size, penalty))
        return gradient, hessian + prior

    def pair_errors(self, parameters: Array, inverse: Array) -> tuple[Array, Array, Array]:
        """Residual, information and leverage of every pair over both orders, (K,) each."""
        residual, variance = self.residuals(parameters)
        weight, a, b = variance.sum(axis=0), self.a, self.b
        return residual.sum(axis=0), weight, weight * (inverse[a, a] + inverse[b, b] - 2 * inverse[a, b])

    def order_errors(self, parameters: Array, inverse: Array) -> tuple[Array, Array, Array]:
        """As `pair_errors`, of the difference between the orders, for pairs that have both."""
        both = ~np.isnan(self.p).any(axis=0)
        residual, variance = (each[:, both] for each in self.residuals(parameters))
        weight = variance.sum(axis=0)
        return residual[0] - residual[1], weight, weight * inverse[-1, -1]


def _newton(data: _Comparisons, parameters: Array, penalty: float | Array, max_steps: int = 100) -> tuple[Array, Array]:
    """Newton's method with step halving from (N + 1,) -> the optimum (N + 1,) and the inverse Hessian there.

    The loss is strictly convex, so every Newton step descends and halving ends.
    """
    loss = data.loss(parameters, penalty)
    for _ in range(max_steps):
        gradient, hessian = data.derivatives(parameters, penalty)
        step = np.linalg.solve(hessian, gradient)
        decrease, bound = 0.1 * float(gradient @ step), loss + 1e-13 * (1 + abs(loss))  # what rounding hides
        while (loss := data.loss(parameters + step, penalty)) > bound - decrease:
            step, decrease = step / 2, decrease / 2
        parameters = parameters + step
        if np.abs(step).max() < 1e-7:  # quadratic convergence: the rest is rounding
            break
    return parameters, np.linalg.inv(data.derivatives(parameters, penalty)[1]).astype(np.float64, copy=False)


def _penalty(count: int, noise: float, log_deviation: float) -> Array:
    """The priors' diagonal (N + 1,) of the Hessian, in units in which a comparison counts once."""
    return noise * np.append(np.full(count, math.exp(-2 * log_deviation)), PRIOR_DEVIATION**-2.0)


def _deviation_step(strengths: Array, covariance: Array, log_deviation: float) -> tuple[float, float]:
    """A step of Fisher scoring of the log deviation of the strengths' prior, at most 1, and the information."""
    free, precision = len(strengths) - 1, math.exp(-2 * log_deviation)  # one degree of freedom is the mean's
    covariance = _centre(covariance) * precision
    trace = float(np.trace(covariance))
    doubt = (log_deviation - math.log(PRIOR_DEVIATION)) / PRIOR_DOUBT**2
    slope = precision * float(strengths @ strengths) + trace - free - doubt
    # 2 |I - covariance / deviation^2|^2, the share of every direction that the data know; plus the log-normal's.
    information = 2 * (free - 2 * trace + float((covariance**2).sum())) + PRIOR_DOUBT**-2.0
    return min(max(slope / information, -1.0), 1.0), information


def _centre(covariance: Array) -> Array:
    """(N, N) covariance -> that of the differences from the mean."""
    result: Array = covariance - covariance.mean(axis=0) - covariance.mean(axis=1)[:, None] + covariance.mean()
    return result


def _dispersion(residual: Array, weight: Array, leverage: Array, default: float) -> tuple[float, float]:
    """Residual variance over its expectation, from (K,) each, and its degrees of freedom (Satterthwaite's).

    The default below two degrees.
    """
    free = weight * np.maximum(1 - leverage, 0)
    freedom = float(free.sum() ** 2 / max((weight * free).sum(), 1e-300))
    estimate = default if freedom < 2 else float((residual**2).sum() / free.sum())
    return max(estimate, MIN_DISPERSION), freedom


def _widen(estimate: float, freedom: float, default: float) -> float:
    """A dispersion times Student's over the normal 97.5 % quantile, squared, but not beyond the default."""
    if freedom < 2:
        return estimate
    return min(estimate * float(stdtrit(freedom, 0.975) / Z95) ** 2, max(default, estimate))

"""The noise of answers: what of an answer is not strength, and how much of it there is.

An answer's log-odds have noise of the pair (both orders share it) and a bias of the pair (opposite in the two orders).
Both variances are estimated from what a fit leaves over: the first from the means of both orders, the second from their
differences. Vote shares have the noise of votes instead of the first.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from mlxpref.ranking.log_odds import PROBABILITY_MARGIN, log_odds
from mlxpref.ranking.outcomes import Array, Outcomes

FLOOR = 1e-6  # the dispersion of probabilities: those nearer to 0 or 1 are not told apart
SMALLEST = 1e-10  # of a variance
ONE_ANSWER = 2.9  # nats^2: a normal noise with which the sign of log-odds x is right with nearly 1 / (1 + exp(-x))
THREE_VOTES = 1 / 3  # the dispersion of votes before a cycle of pairs shows it
SHARE, DOUBT = 0.12, 1.3  # of the mean square log-odds that is noise, before any answer; and of its logarithm
BIAS, BIAS_DOUBT = 0.25, 2.0  # nats^2 of a pair's bias before any answer, and the doubt of its logarithm
VOTED_BIAS, VOTED_BIAS_DOUBT = 0.1, 1.0  # the same of votes, which hardly show it


@dataclass(frozen=True)
class Noise:
    """The noise of an instrument: the variances of a pair, and of its bias beyond that of all pairs, in nats^2.

    Of `votes` the first is a dispersion instead: the variance of a share p is dispersion * p (1 - p), 1/3 for three
    votes. `freedom` and `bias_freedom` are the degrees of freedom of the estimates, 0 where nothing shows them.
    `floor` is the dispersion of probabilities that are no votes, `expected` the median of the first one's prior,
    `opposite` the share of the votes' noise that differs between the orders (0: both orders have the same votes).
    """

    pair: float
    bias: float
    freedom: float = 0.0
    bias_freedom: float = 0.0
    votes: bool = False
    floor: float = FLOOR
    expected: float = ONE_ANSWER
    opposite: float = 1.0

    @property
    def pair_variance(self) -> float:
        """In nats^2."""
        return SMALLEST if self.votes else self.pair

    @property
    def dispersion(self) -> float:
        """Of probabilities."""
        return self.pair if self.votes else self.floor

    @property
    def margin(self) -> float:
        """How far from 0 and 1 the search for the log-odds behind a probability begins."""
        return 0.15 if self.votes else max(self.floor / 2, PROBABILITY_MARGIN)

    def of_mean(self, p_model: ArrayLike) -> Array:
        """Expected probabilities -> the variance of the mean log-odds of an answer in both orders, any shape."""
        return self.pair_variance + self._of_votes(p_model)

    def of_difference(self, p_model: ArrayLike) -> Array:
        """The same of half the difference of the orders. One order's log-odds have the sum of both variances."""
        return self.bias + self.opposite * self._of_votes(p_model)

    def _of_votes(self, p_model: ArrayLike) -> Array:
        """The part of the dispersion in the variance of a mean."""
        weight = np.maximum(np.multiply(p_model, np.subtract(1, p_model)), 1e-9)
        return np.asarray(self.dispersion / (2 * weight))


class WorkingAnswers:
    """Answers as normal responses: the quasi-likelihood's second order around the latent log-odds z (2, K).

    With t the responses of both orders and V their covariance, a pair's V^-1 is kept by its effect on the lead (the
    mean over orders) and on the bias: `lead_precision`, `bias_precision`, `cross_precision`, `response_lead`,
    `response_bias` (K,). An order that is missing has no precision.
    """

    def __init__(self, data: Outcomes, z: Array, noises: list[Noise]) -> None:
        of_pair = np.array([[n.pair_variance, n.bias, n.dispersion] for n in noises])[data.instrument].T  # (3, K)
        self.pair_variance, self.bias_variance, dispersion = np.maximum(of_pair, SMALLEST)
        p_model = expit(z)
        weight = np.maximum(p_model * (1 - p_model), 1e-12)
        response = z + (np.nan_to_num(data.p, nan=0.5) - p_model) / weight  # (2, K)
        variance = dispersion / weight + self.pair_variance + self.bias_variance
        shared = np.where(data.known.all(axis=0), self.pair_variance - self.bias_variance, 0.0)
        determinant = variance[0] * variance[1] - shared**2
        own = np.where(data.known, variance[::-1] / determinant, 0.0)  # (2, K) the diagonal of V^-1
        cross = np.where(data.known.all(axis=0), -shared / determinant, 0.0)  # (K,)
        self.lead_precision: Array = own.sum(axis=0) + 2 * cross
        self.bias_precision: Array = own.sum(axis=0) - 2 * cross
        self.cross_precision: Array = own[0] - own[1]
        first, second = (own + cross) * response
        self.response_lead: Array = first + second
        first, second = (own - cross) * response
        self.response_bias: Array = first - second

    def fit_to(self, lead: Array, bias: Array) -> None:
        """Set what (K,) leads and biases leave over: `left_lead` and `left_bias` (K,), the slopes of the likelihood."""
        self.left_lead = self.response_lead - self.lead_precision * lead - self.cross_precision * bias
        self.left_bias = self.response_bias - self.cross_precision * lead - self.bias_precision * bias

    def latent(self, lead: Array, bias: Array) -> Array:
        """(2, K): the log-odds behind the answers, between what they say and what the fit expects."""
        of_pair, of_bias = lead + self.pair_variance * self.left_lead, bias + self.bias_variance * self.left_bias
        return np.stack([of_pair + of_bias, of_pair - of_bias])


class ScoringSteps:
    """The steps of Fisher scoring of a logarithm, at most `longest`.

    A step that turns back is at most half of the one before: whole ones may jump to and fro around the optimum.
    """

    def __init__(self, longest: float) -> None:
        self.longest = self.limit = longest
        self.last = 0.0

    def next(self, slope: float, information: float) -> float:
        """The next step, from the slope of the log-likelihood and its information."""
        turns = slope * self.last < 0
        self.limit = abs(self.last) / 2 if turns else min(1.5 * self.limit, self.longest)
        self.last = min(max(slope / information, -self.limit), self.limit)
        return self.last


class NoiseSearch:
    """The search for an instrument's noise: `noise` is the best so far.

    The priors are log-normal: what is `known`, as sure as its degrees of freedom, else a wide one. What no cycle of
    pairs shows stays as it began. Of pairs in one order only the sum of the variances shows; they keep their ratio.
    """

    def __init__(self, data: Outcomes, instrument: int, known: Noise | None) -> None:
        self.own = own = data.instrument == instrument  # (K,)
        self.both = data.known[:, own].all(axis=0)  # of its own pairs
        self.cycles = data.cycles(instrument)
        votes = data.are_votes(instrument)
        self.known = known if known is not None and known.votes == votes else None
        self.only_sum_shows = self.known is None and not votes and self.both.sum() < 2
        self.pair_steps, self.bias_steps = ScoringSteps(1.5), ScoringSteps(1.5)
        known_orders, first = data.known[:, own], np.array([[1.0], [-1.0]])
        size = np.where(known_orders, np.clip(log_odds(data.p[:, own]), -9, 9), 0.0)  # (2, K)
        bias = (first * size).sum() / max(known_orders.sum(), 1)
        size = np.where(known_orders, size - first * bias, 0.0).sum(axis=0) / np.maximum(known_orders.sum(axis=0), 1)
        square = max(float((size**2).mean()), 1e-6) if size.size else 1.0
        if self.known is not None:
            start = self.known
        elif not self.cycles:
            start = Noise(THREE_VOTES if votes else ONE_ANSWER, _bias_prior(votes)[0], votes=votes)
        elif votes:
            start = Noise(0.3, 0.05, votes=True, expected=1.0)
        else:
            start = Noise(0.3 * square, 0.1 * square, expected=SHARE * square)
        self.noise = replace(start, floor=FLOOR * min(1, square))

    def update(self, working: WorkingAnswers, leverage: tuple[Array, Array, Array]) -> float:
        """A step of Fisher scoring of both log variances; the larger step.

        `leverage` (K,) are the posterior variances of leads, their covariances with the biases, the variances of
        biases. Squares of what is left over are compared with their expectation, given the leverage.
        """
        lead, cross, bias = (each[self.own] for each in leverage)
        a, b, c = (each[self.own] for each in (working.lead_precision, working.cross_precision, working.bias_precision))
        change = 0.0
        if self.cycles:
            expected = a - (a**2 * lead + 2 * a * b * cross + b**2 * bias)
            change = self._update_pair(working.left_lead[self.own] ** 2, expected, a)
        both = self.both & (c > 0)
        if both.sum() > 1:
            expected = c - (b**2 * lead + 2 * b * c * cross + c**2 * bias)
            left = working.left_bias[self.own] ** 2
            change = max(change, self._update_bias(left[both], expected[both], c[both]))
        return change

    def _update_pair(self, square: Array, expected: Array, precision: Array) -> float:
        """(K,) squares of what is left over of leads, their expectation, the leads' precision -> the step."""
        noise = self.noise
        variance = noise.pair + noise.bias * self.only_sum_shows
        share = np.ones_like(precision) if noise.votes else np.minimum(variance * precision, 1.0)
        # Votes count by their information: one upset of a very sure judge cannot swamp the others.
        weight = share if noise.votes else share / np.maximum(precision, 1e-300)
        centre, doubt = (self.known.pair, self.known.freedom) if self.known else (noise.expected, 2 / DOUBT**2)
        slope, information, freedom = _score(square, expected, precision, weight, share, noise.pair / centre, doubt)
        step = self.pair_steps.next(slope, information)
        pair = max(noise.pair * math.exp(step), 1e-4 if noise.votes else SMALLEST)
        bias = noise.bias * (pair / noise.pair if self.only_sum_shows else 1.0)
        self.noise = replace(noise, pair=pair, bias=bias, freedom=min(freedom, self.cycles) + doubt)
        return abs(math.log(pair / noise.pair))

    def _update_bias(self, square: Array, expected: Array, precision: Array) -> float:
        """The same of biases, of the pairs with both orders."""
        noise = self.noise
        share = np.minimum(noise.bias * precision, 1.0)
        centre, doubt = (self.known.bias, self.known.bias_freedom) if self.known else _bias_prior(noise.votes)
        weight = share / precision
        slope, information, freedom = _score(square, expected, precision, weight, share, noise.bias / centre, doubt)
        step = self.bias_steps.next(slope, information)
        self.noise = replace(
            noise,
            bias=max(noise.bias * math.exp(step), SMALLEST),
            bias_freedom=min(freedom, len(square) - 1.0) + doubt,
            opposite=min(float(square.sum() / expected.sum()), 1.0) if noise.votes else 1.0,
        )
        return abs(step) * float(share.max() > 1e-3)  # below, it no longer matters


def without_prior(noise: Noise) -> Noise:
    """A noise with the degrees of freedom that answers gave it, found without a known one."""
    return replace(
        noise,
        freedom=max(noise.freedom - 2 / DOUBT**2, 0.0),
        bias_freedom=max(noise.bias_freedom - _bias_prior(noise.votes)[1], 0.0),
    )


def _score(
    square: Array, expected: Array, precision: Array, weight: Array, share: Array, ratio: float, doubt: float
) -> tuple[float, float, float]:
    """The slope of the likelihood in a log variance, its information, and the degrees of freedom of the estimate.

    (K,) squares of what is left over, their expectation, the precision of what they are squares of, weights, and the
    share of the variance in what the pair leaves over. `ratio` is the variance over its prior's median, `doubt` the
    prior's degrees of freedom.
    """
    total = max(float((weight * expected).sum()), 1e-300)
    freedom = total**2 / max(float((weight**2 * precision * np.maximum(expected, 0)).sum()), 1e-300)
    excess = float((weight * square).sum()) / total - 1
    sensitivity = float((weight * expected * share).sum()) / total
    slope = freedom / 2 * excess - doubt / 2 * math.log(ratio)
    return slope, freedom / 2 * sensitivity + doubt / 2, freedom


def _bias_prior(votes: bool) -> tuple[float, float]:
    """The median of a pair's bias variance before any answer, and the prior's degrees of freedom."""
    return (VOTED_BIAS, 2 / VOTED_BIAS_DOUBT**2) if votes else (BIAS, 2 / BIAS_DOUBT**2)

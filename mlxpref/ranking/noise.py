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
        weight = np.maximum(np.multiply(p_model, np.subtract(1, p_model)), 1e-9)
        return np.asarray(self.pair_variance + self.dispersion / (2 * weight))

    def of_difference(self, p_model: ArrayLike) -> Array:
        """The same of half the difference of the orders. One order's log-odds have the sum of both variances."""
        weight = np.maximum(np.multiply(p_model, np.subtract(1, p_model)), 1e-9)
        return np.asarray(self.bias + self.opposite * self.dispersion / (2 * weight))


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


def starting_noise(data: Outcomes, instrument: int, known: Noise | None) -> Noise:
    """What the search for an instrument's noise begins with."""
    own = data.instrument == instrument
    votes, both = data.are_votes(instrument), data.known[:, own].all(axis=0)
    size = np.clip(log_odds(data.p[:, own]), -9, 9)  # (2, K)
    size = np.where(both, size.sum(axis=0) / 2, np.nan_to_num(size).sum(axis=0))
    square = max(float((size**2).mean()), 1e-6) if size.size else 1.0
    if known is not None and known.votes == votes:
        return replace(known, floor=FLOOR * min(1, square))
    if data.cycles(instrument) < 1:
        return Noise(1.0 if votes else ONE_ANSWER, _bias_prior(votes)[0], votes=votes, floor=FLOOR * min(1, square))
    if votes:
        return Noise(0.3, 0.05, votes=True, expected=1.0)
    return Noise(0.3 * square, 0.1 * square, floor=FLOOR * min(1, square), expected=SHARE * square)


def updated_noise(
    data: Outcomes,
    instrument: int,
    noise: Noise,
    working: WorkingAnswers,
    leverage: tuple[Array, Array, Array],
    known: Noise | None,
) -> tuple[Noise, float]:
    """An instrument's noise after a step of Fisher scoring of both log variances, and the larger step.

    `leverage` (K,) are the posterior variances of leads, their covariances with the biases, the variances of biases.
    Squares of what is left over are compared with their expectation, given the leverage. The priors are log-normal:
    what is `known`, as sure as its degrees of freedom, else a wide one. What no cycle of pairs shows stays as it began.
    """
    own = data.instrument == instrument
    lead, cross, bias = (each[own] for each in leverage)
    a, b, c = (each[own] for each in (working.lead_precision, working.cross_precision, working.bias_precision))
    known = known if known is not None and known.votes == noise.votes else None
    change = 0.0
    cycles = data.cycles(instrument)
    if cycles:
        expected = a - (a**2 * lead + 2 * a * b * cross + b**2 * bias)
        # Votes count by their information: one upset of a very sure judge cannot swamp the others.
        weight = np.ones_like(a) if noise.votes else 1 / np.maximum(a, 1e-300)
        share = np.ones_like(a) if noise.votes else np.minimum(noise.pair * a, 1.0)
        centre, doubt = (known.pair, known.freedom) if known else (noise.expected, 2 / DOUBT**2)
        step, freedom = _step(
            working.left_lead[own] ** 2, expected, a, weight * share, share, noise.pair / centre, doubt
        )
        freedom = min(freedom, cycles) + doubt
        noise = replace(
            noise, pair=max(noise.pair * math.exp(step), 1e-4 if noise.votes else SMALLEST), freedom=freedom
        )
        change = abs(step) if noise.pair > SMALLEST else 0.0
    both = data.known[:, own].all(axis=0) & (c > 0)
    if both.sum() > 1:
        expected = (c - (b**2 * lead + 2 * b * c * cross + c**2 * bias))[both]
        share = np.minimum(noise.bias * c[both], 1.0)
        centre, doubt = (known.bias, known.bias_freedom) if known else _bias_prior(noise.votes)
        left = working.left_bias[own][both] ** 2
        step, freedom = _step(left, expected, c[both], share / c[both], share, noise.bias / centre, doubt)
        freedom = min(freedom, both.sum() - 1.0) + doubt
        opposite = min(float(left.sum() / expected.sum()), 1.0) if noise.votes else 1.0
        bias = max(noise.bias * math.exp(step), SMALLEST)
        noise = replace(noise, bias=bias, bias_freedom=freedom, opposite=opposite)
        change = max(change, abs(step) * (share.max() > 1e-3))  # below, it no longer matters
    return noise, change


def without_prior(noise: Noise) -> Noise:
    """A noise with the degrees of freedom that answers gave it, found without a known one."""
    return replace(
        noise,
        freedom=max(noise.freedom - 2 / DOUBT**2, 0.0),
        bias_freedom=max(noise.bias_freedom - _bias_prior(noise.votes)[1], 0.0),
    )


def _step(
    square: Array, expected: Array, precision: Array, weight: Array, share: Array, ratio: float, doubt: float
) -> tuple[float, float]:
    """The step of a log variance, at most 1.5, and the degrees of freedom of its estimate.

    (K,) squares of what is left over, their expectation, the precision of what they are squares of, weights, and the
    share of the variance in what the pair leaves over. `ratio` is the variance over its prior's median, `doubt` the
    prior's degrees of freedom.
    """
    total = max(float((weight * expected).sum()), 1e-300)
    freedom = total**2 / max(float((weight**2 * precision * np.maximum(expected, 0)).sum()), 1e-300)
    excess = float((weight * square).sum()) / total - 1
    sensitivity = float((weight * expected * share).sum()) / total
    slope = freedom / 2 * excess - doubt / 2 * math.log(ratio)
    return min(max(slope / (freedom / 2 * sensitivity + doubt / 2), -1.5), 1.5), freedom


def _bias_prior(votes: bool) -> tuple[float, float]:
    """The median of a pair's bias variance before any answer, and the prior's degrees of freedom."""
    return (VOTED_BIAS, 2 / VOTED_BIAS_DOUBT**2) if votes else (BIAS, 2 / BIAS_DOUBT**2)

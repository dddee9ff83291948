"""What the answers to pairs would tell, given a fit and the pairs already in a round."""

import math
from typing import Protocol

import numpy as np
from scipy.special import expit, ndtr

from mlxpref.ranking.bradley_terry import StrengthFit
from mlxpref.ranking.covariance import DenseCovariance, SparseCovariance
from mlxpref.ranking.outcomes import Array, Indices


class InformationGain:
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
        covariance = fit.covariance
        self.variances: _Variances
        if isinstance(covariance, SparseCovariance):
            self.variances = _DrawnVariances(covariance)
        else:
            self.variances = _ExactVariances(DenseCovariance(covariance.block()), size)
        self.contention = contention(fit, order, top or 1)

    def of(self, a: Indices, b: Indices) -> Array:
        """(K,), (K,) images -> (K,) gains of their pairs, above 0."""
        difference, variance, noise = self._difference(a, b)
        known, at_edge = variance / (variance + noise), self.contention[a] + self.contention[b]
        if self.only_top:
            return np.asarray(known * (1e-3 + at_edge))
        doubt = np.exp(-np.minimum(difference**2 / (2 * variance), 600.0))
        return np.asarray(doubt * known * (1 + at_edge))

    def add(self, x: int, y: int) -> None:
        """Add a pair to the round: its answer will lower the variance of differences (not their means)."""
        _, variance, noise = self._difference(np.array([x]), np.array([y]))
        self.variances.add(x, y, float(variance[0] + noise[0]))

    def _difference(self, a: Indices, b: Indices) -> tuple[Array, Array, Array]:
        """Mean and variance of differences, and the variance that an answer would have, each (K,)."""
        difference = self.fit.strengths[a] - self.fit.strengths[b]
        variance = np.maximum(self.variances.of(a, b), 1e-9)
        # The logistic of a normal variable has about this mean (MacKay 1992).
        p_model = expit(self.asked.scale * difference / np.sqrt(1 + math.pi / 8 * self.asked.scale**2 * variance))
        return difference, variance, self.asked.answer_variance(p_model, self.orders)


class _Variances(Protocol):
    """The variances of differences once the pairs that were added are answered."""

    def of(self, a: Indices, b: Indices) -> Array:
        """(K,), (K,) images -> (K,)."""

    def add(self, x: int, y: int, variance: float) -> None:
        """A pair whose answer, of this variance, will be known."""


class _ExactVariances:
    """By the matrix."""

    def __init__(self, covariance: DenseCovariance, size: int) -> None:
        self.covariance = covariance
        self.explained = np.zeros((len(covariance), size))  # (N, size), column i: what pick i says of every image
        self.pair_count = 0

    def of(self, a: Indices, b: Indices) -> Array:
        before = self.explained[:, : self.pair_count]
        return np.asarray(self.covariance.of_differences(a, b) - ((before[a] - before[b]) ** 2).sum(axis=1))

    def add(self, x: int, y: int, variance: float) -> None:
        before, matrix = self.explained[:, : self.pair_count], self.covariance.matrix
        change = matrix[:, x] - matrix[:, y] - before @ (before[x] - before[y])
        self.explained[:, self.pair_count] = change / math.sqrt(variance)
        self.pair_count += 1


class _DrawnVariances:
    """Of many images: a pair counts for the differences that share an image with it, by the draws, and for no other."""

    def __init__(self, covariance: SparseCovariance) -> None:
        self.covariance = covariance
        self.pairs_of: dict[int, list[int]] = {}
        self.directions: list[Array] = []  # (D,) each

    def of(self, a: Indices, b: Indices) -> Array:
        variance = self.covariance.of_differences(a, b)
        pairs_of, images = self.pairs_of, zip(a.tolist(), b.tolist(), strict=True)
        touching = [(k, p) for k, (x, y) in enumerate(images) for p in {*pairs_of.get(x, ()), *pairs_of.get(y, ())}]
        if touching:
            rows, pairs = np.array(touching).T
            directions = np.array([self.directions[pair] for pair in pairs])
            shared = (self.covariance.directions(a[rows], b[rows]) * directions).sum(axis=1)
            variance = variance - np.bincount(rows, shared**2, len(a))
        return variance

    def add(self, x: int, y: int, variance: float) -> None:
        for image in (x, y):
            self.pairs_of.setdefault(image, []).append(len(self.directions))
        self.directions.append(self.covariance.directions(np.array([x]), np.array([y]))[0] / math.sqrt(variance))


def contention(fit: StrengthFit, order: Indices, top: int) -> Array:
    """(N,): the doubt whether an image is in the top, 0 to 1, by its rival at the top's edge; `order` is best first."""
    top = min(top, len(order) - 1)
    rival = np.full(len(order), order[top - 1])
    rival[order[:top]] = order[top]
    behind = np.abs(fit.strengths - fit.strengths[rival])
    return 2 * _below_zero(behind, fit.covariance.of_differences(np.arange(len(order)), rival))


def _below_zero(mean: Array, variance: Array) -> Array:
    """(K,), (K,) -> the probability that a normal variable is below 0."""
    return np.asarray(ndtr(-mean / np.sqrt(np.maximum(variance, 1e-18))))

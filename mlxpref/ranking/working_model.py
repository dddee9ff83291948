"""The normal working model of a fit: its equations solved, and the variances that the fit's other steps need.

Up to `DENSE_IMAGES` images by matrices. Beyond, the Hessian is sparse: solved by conjugate gradients, while sums of
variances are means over draws from the posterior, with the same random numbers in every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlxpref.ranking.conjugate_gradients import ConjugateGradients
from mlxpref.ranking.covariance import DENSE_IMAGES, Covariance, DenseCovariance, SparseCovariance, SparsePosterior
from mlxpref.ranking.outcomes import Array, Indices

STEP_NUMBERS = 256_000  # of all draws in a step together: its sums are over all images
NUMBERS = 512_000  # of all draws in the end, which say the variance of every image
LEAST_DRAWS = 32, 128  # of both
AT_ONCE = 64  # of the draws in the end, which limits memory
Doubts = Sequence[tuple[Array, float]]
"""Vectors (N,) along which strengths may be elsewhere, and the variance of that."""


@dataclass(frozen=True)
class Design:
    """How leads and biases of K pairs follow from P parameters, the strengths of `count` images first.

    A lead is the sum of `values` (2, K) times the parameters in `columns` (2, K); `bias` (K,) is the parameter of the
    bias. `lead`, `cross` and `bias_precision` (K,): precisions of both, `prior` (P,) those of the parameters.
    """

    count: int
    columns: Indices
    values: Array
    bias: Indices
    lead: Array
    cross: Array
    bias_precision: Array
    prior: Array


class WorkingModel(Protocol):
    """What a step of a fit needs of the Hessian (P, P)."""

    def solve(self, right: Array, near: Array | None = None) -> Array:
        """(P,) -> (P,): the Hessian's inverse times a vector; `near` is what it may be near to."""

    def leverage(self) -> tuple[Array, Array, Array]:
        """(K,) each: the posterior variance of a pair's lead, its covariance with the bias, the bias's variance."""

    def bias_variance(self, bias: int) -> float:
        """The posterior variance of the bias that is this parameter."""

    def known(self) -> tuple[float, float]:
        """Trace and squared norm of I - covariance * prior, of centred strengths: what the data know of each."""

    def covariance(self, doubts: Doubts, factor: float) -> Covariance:
        """The covariance of the centred strengths with `doubts`, times a factor."""


def working_model(design: Design, before: WorkingModel | None) -> WorkingModel:
    """The model of a step; `before` is that of the step before."""
    if design.count <= DENSE_IMAGES:
        return DenseModel(design)
    return SparseModel(design, before if isinstance(before, SparseModel) else None)


class DenseModel:
    """By matrices (P, P)."""

    def __init__(self, design: Design) -> None:
        self.design = design
        size, columns, bias, values = len(design.prior), design.columns, design.bias, design.values
        cross = values * design.cross
        places: list[Indices] = [
            columns[:, None] * size + columns,
            columns * size + bias,
            bias * size + columns,
            bias * size + bias,
        ]
        weights = [values[:, None] * values * design.lead, cross, cross, design.bias_precision]
        place, weight = (np.concatenate([each.ravel() for each in both]) for both in (places, weights))
        self.hessian: Array = np.zeros((size, size))
        self.hessian += np.bincount(place, weight, size * size).reshape(size, size)
        self.hessian += np.diag(design.prior)
        self.inverse: Array = np.linalg.inv(self.hessian).astype(np.float64, copy=False)

    def solve(self, right: Array, near: Array | None = None) -> Array:
        return np.linalg.solve(self.hessian, right).astype(np.float64, copy=False)

    def leverage(self) -> tuple[Array, Array, Array]:
        inverse, columns, values, bias = self.inverse, self.design.columns, self.design.values, self.design.bias
        lead = (values[:, None] * values * inverse[columns[:, None], columns]).sum(axis=(0, 1))
        return lead, (values * inverse[columns, bias]).sum(axis=0), inverse[bias, bias]

    def bias_variance(self, bias: int) -> float:
        return float(self.inverse[bias, bias])

    def known(self) -> tuple[float, float]:
        count = self.design.count
        covariance = self._centred() * self.design.prior[0]
        trace, free = float(np.trace(covariance)), count - 1  # one degree of freedom is the mean's
        return free - trace, free - 2 * trace + float((covariance**2).sum())

    def covariance(self, doubts: Doubts, factor: float) -> DenseCovariance:
        covariance = self._centred()
        for drift, variance in doubts:
            covariance = covariance + variance * np.outer(drift, drift)
        return DenseCovariance(covariance * factor)

    def _centred(self) -> Array:
        """(N, N): the covariance of the strengths' differences from their mean."""
        covariance = self.inverse[: self.design.count, : self.design.count]
        result: Array = covariance - covariance.mean(axis=0) - covariance.mean(axis=1)[:, None] + covariance.mean()
        return result


class SparseModel:
    """By conjugate gradients and draws; each step begins with the solutions of the one before."""

    def __init__(self, design: Design, before: "SparseModel | None") -> None:
        from scipy.sparse import csr_array, diags_array

        self.design, size, pairs = design, len(design.prior), len(design.bias)
        lead = np.sqrt(design.lead)
        mixed = design.cross / np.maximum(lead, 1e-150)
        bias = np.sqrt(np.maximum(design.bias_precision - mixed**2, 0))
        # The root of the pairs' precisions, times how leads and biases follow from the parameters: (2 K, P).
        weights = np.concatenate([np.stack([*(lead * design.values), mixed], axis=1).ravel(), bias])
        places = np.concatenate([np.stack([*design.columns, design.bias], axis=1).ravel(), design.bias])
        ends = np.concatenate([3 * np.arange(pairs), 3 * pairs + np.arange(pairs + 1)])
        self.root = csr_array((weights, places, ends), shape=(2 * pairs, size)).T
        self.hessian = (self.root @ self.root.T + diags_array(design.prior)).tocsr()
        self.solver = ConjugateGradients(self.hessian)
        self.random: Array = (
            before.random if before else self._random(max(STEP_NUMBERS // design.count, LEAST_DRAWS[0]), 0)
        )
        self.draws: Array = self.solver.solve(
            self._noise(self.random), 1e-4, before.draws if before else None
        )  # (P, D)
        unit = np.eye(size - design.count, size, design.count).T  # (P, M)
        self.of_bias: Array = self.solver.solve(unit, 1e-8, before.of_bias if before else None)

    def _random(self, draws: int, seed: int) -> Array:
        """(2 K + P, D) independent normal draws."""
        return np.random.default_rng(seed).normal(size=(self.root.shape[1] + len(self.design.prior), draws))

    def _noise(self, random: Array) -> Array:
        """(2 K + P, D) independent normal draws -> (P, D) draws whose covariance is the Hessian."""
        pairs = self.root.shape[1]
        noise = self.root @ random[:pairs] + np.sqrt(self.design.prior)[:, None] * random[pairs:]
        return np.asarray(noise, np.float64)

    def solve(self, right: Array, near: Array | None = None) -> Array:
        return self.solver.solve(right[:, None], 1e-10, None if near is None else near[:, None])[:, 0]

    def leverage(self) -> tuple[Array, Array, Array]:
        design = self.design
        (a, b), own = design.columns, design.bias - design.count  # own (K,): the instrument
        one, other = design.values
        lead = one[:, None] * self.draws[a] + other[:, None] * self.draws[b]  # (K, D)
        cross = one * self.of_bias[a, own] + other * self.of_bias[b, own]
        return (lead**2).mean(axis=1), cross, self.of_bias[design.bias, own]

    def bias_variance(self, bias: int) -> float:
        return float(self.of_bias[bias, bias - self.design.count])

    def known(self) -> tuple[float, float]:
        count, pairs = self.design.count, self.root.shape[1]
        # What the prior's own draw has beyond the posterior's has the covariance I - covariance * prior.
        known = self.random[pairs : pairs + count] - np.sqrt(self.design.prior[0]) * self.draws[:count]
        known = known - known.mean(axis=0)  # (N, D)
        products = known.T @ known  # (D, D)
        draws = len(products)
        own = np.diag(products)
        return float(own.mean()), float(((products**2).sum() - (own**2).sum()) / (draws * (draws - 1)))

    def covariance(self, doubts: Doubts, factor: float) -> SparseCovariance:
        parts = -(-max(NUMBERS // self.design.count, LEAST_DRAWS[1]) // AT_ONCE)
        noise = np.concatenate([self._noise(self._random(AT_ONCE, 1 + part)) for part in range(parts)], axis=1)
        return SparseCovariance(SparsePosterior(self.hessian, noise, self.design.count), tuple(doubts), factor)

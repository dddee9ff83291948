"""The covariance of the strengths' posterior: a matrix for few images, what decisions need of it for many.

Of many images the matrix would be too large. There the precision H is sparse; draws from the posterior say the
variances, and solves the exact covariance of a few images.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from mlxpref.ranking.conjugate_gradients import ConjugateGradients
from mlxpref.ranking.outcomes import Array, Indices

if TYPE_CHECKING:
    from scipy.sparse import csr_array

DENSE_IMAGES = 500  # up to so many images everything is exact
_TOLERANCE = 1e-6  # of solves
_AT_ONCE = 64  # columns to solve for
_NUMBERS_AT_ONCE = 1_000_000  # of the draws of pairs: both limit memory


class Covariance(Protocol):
    """The covariance of the centred strengths of N images."""

    def __len__(self) -> int: ...

    def variances(self) -> Array:
        """(N,): the variance of every strength."""

    def of_differences(self, a: Indices, b: Indices) -> Array:
        """(K,), (K,) images -> (K,) variances of the differences of their strengths."""

    def row(self, image: int) -> Array:
        """(N,): the variances of the differences of all strengths from one; of many images to some 3 %."""

    def block(self, images: Indices | None = None) -> Array:
        """(n,) images, or all of them -> (n, n), exact."""

    def part(self, images: Indices) -> "Covariance":
        """The covariance of some of the images, which become numbers 0 to n - 1."""

    def scaled(self, factor: float) -> Self:
        """The covariance times a factor."""


@dataclass(frozen=True, eq=False)
class DenseCovariance:
    """The matrix itself (N, N)."""

    matrix: Array

    def __len__(self) -> int:
        return len(self.matrix)

    def variances(self) -> Array:
        return np.diag(self.matrix).copy()

    def of_differences(self, a: Indices, b: Indices) -> Array:
        own = np.diag(self.matrix)
        return np.asarray(np.maximum(own[a] + own[b] - 2 * self.matrix[a, b], 0.0))

    def row(self, image: int) -> Array:
        return self.of_differences(np.full(len(self), image), np.arange(len(self)))

    def block(self, images: Indices | None = None) -> Array:
        return self.matrix if images is None else self.matrix[np.ix_(images, images)]

    def part(self, images: Indices) -> "DenseCovariance":
        return DenseCovariance(self.block(images))

    def scaled(self, factor: float) -> "DenseCovariance":
        return DenseCovariance(self.matrix * factor)


class SparsePosterior:
    """A normal variable by its sparse precision (P, P); the first `count` parameters are the strengths.

    `noise` (P, D) are draws of a normal variable whose covariance is the precision, so that the solutions are draws of
    the posterior. What an image, or a pair, does beyond what all others say of it is exact (Rao-Blackwell; Sidén et al.
    2018, "Efficient covariance approximations for large sparse precision matrices").
    """

    def __init__(self, precision: "csr_array", noise: Array, count: int) -> None:
        self.precision, self.noise, self.count = precision, noise, count
        self.given_others: Array = np.asarray(precision.diagonal())  # (P,) precisions, given all others
        self._solver = ConjugateGradients(precision)

    @cached_property
    def draws(self) -> Array:
        """(N, D) centred strengths."""
        parts = range(0, self.noise.shape[1], _AT_ONCE)
        solved = [self._solver.solve(self.noise[:, at : at + _AT_ONCE], 1e-4)[: self.count] for at in parts]
        draws = np.concatenate(solved, axis=1)
        return np.asarray(draws - draws.mean(axis=0))

    @cached_property
    def drawn_variances(self) -> Array:
        """(N,): those of the draws themselves."""
        return np.asarray(np.einsum("nd,nd->n", self.draws, self.draws) / self.draws.shape[1])

    @cached_property
    def variances(self) -> Array:
        """(N,): those of the centred strengths."""
        own = 1 / self.given_others[: self.count]
        share = 1 - 1 / self.count  # of an image in its own distance from the mean
        expected = self.draws - share * own[:, None] * self.noise[: self.count]
        return np.asarray((expected**2).mean(axis=1) + share**2 * own)

    def of_differences(self, a: Indices, b: Indices) -> Array:
        """(K,), (K,) images -> (K,) variances of the differences of their strengths."""
        one, other, between = self.given_others[a], self.given_others[b], np.asarray(self.precision[a, b])
        determinant = np.where(a == b, 1.0, one * other - between**2)
        of_a, of_b = (other + between) / determinant, -(one + between) / determinant  # (K,) H_ab^-1 (1, -1)
        expected = self.draws[a] - self.draws[b] - of_a[:, None] * self.noise[a] - of_b[:, None] * self.noise[b]
        return np.asarray(np.where(a == b, 0.0, (expected**2).mean(axis=1) + of_a - of_b))

    def columns(self, images: Indices) -> Array:
        """(n,) -> (N, n): covariances of all strengths, not centred, with those of some images."""
        right = np.zeros((len(self.given_others), len(images)))
        right[images, np.arange(len(images))] = 1
        return self._solver.solve(right, _TOLERANCE)[: self.count]

    @cached_property
    def with_mean(self) -> Array:
        """(N,): covariances of the strengths, not centred, with their mean."""
        right = np.zeros((len(self.given_others), 1))
        right[: self.count] = 1 / self.count
        return self._solver.solve(right, _TOLERANCE)[: self.count, 0]


@dataclass(frozen=True, eq=False)
class SparseCovariance:
    """`factor` * (the covariance of a posterior's centred strengths + `doubts`), of some `images` (n,), by default all.

    `doubts` are vectors (N,) with the variance along them.
    """

    posterior: SparsePosterior
    doubts: tuple[tuple[Array, float], ...] = ()
    factor: float = 1.0
    images: Indices | None = None

    def __len__(self) -> int:
        return self.posterior.count if self.images is None else len(self.images)

    def variances(self) -> Array:
        images = self._numbers()
        doubt = sum(size * drift[images] ** 2 for drift, size in self.doubts)
        return np.asarray(self.factor * (self.posterior.variances[images] + doubt))

    def of_differences(self, a: Indices, b: Indices) -> Array:
        first, second = self._numbers(a), self._numbers(b)
        size = _NUMBERS_AT_ONCE // self.posterior.noise.shape[1]
        parts = [slice(at, at + size) for at in range(0, len(first), size)]
        found = [self.posterior.of_differences(first[part], second[part]) for part in parts]
        doubt = sum(size * (drift[first] - drift[second]) ** 2 for drift, size in self.doubts)
        return np.asarray(self.factor * (np.concatenate([*found, np.zeros(0)]) + doubt))

    def row(self, image: int) -> Array:
        images, own, draws = self._numbers(), self.posterior.variances, self.posterior.draws
        number, drawn = images[image], self.posterior.drawn_variances
        variance = np.maximum(drawn + drawn[number] - 2 / draws.shape[1] * (draws @ draws[number]), 0.0)
        variance *= (own + own[number]) / (drawn + drawn[number])  # what is known better of both
        variance += sum(size * (drift - drift[number]) ** 2 for drift, size in self.doubts)
        variance[number] = 0
        return np.asarray(self.factor * variance[images])

    def block(self, images: Indices | None = None) -> Array:
        numbers, mean = self._numbers(images), self.posterior.with_mean
        parts = [numbers[at : at + _AT_ONCE] for at in range(0, len(numbers), _AT_ONCE)]
        columns = np.concatenate([self.posterior.columns(part)[numbers] for part in parts], axis=1)  # (n, n)
        block = (columns + columns.T) / 2 - mean[numbers] - mean[numbers, None] + mean.mean()
        block += sum(size * np.outer(drift[numbers], drift[numbers]) for drift, size in self.doubts)
        return self.factor * np.asarray(block)

    def part(self, images: Indices) -> "Covariance":
        if len(images) <= DENSE_IMAGES:
            return DenseCovariance(self.block(images))
        return replace(self, images=self._numbers(images))

    def scaled(self, factor: float) -> "SparseCovariance":
        return replace(self, factor=self.factor * factor)

    def directions(self, a: Indices, b: Indices) -> Array:
        """(K,), (K,) -> (K, D): products of two rows are covariances of differences, to some 10 % of a variance."""
        draws = self.posterior.draws
        size = np.sqrt(self.factor / draws.shape[1])
        return np.asarray(size * (draws[self._numbers(a)] - draws[self._numbers(b)]))

    def _numbers(self, images: Indices | None = None) -> Indices:
        """Images -> their numbers among the parameters."""
        own = np.arange(self.posterior.count) if self.images is None else self.images
        return own if images is None else own[images]


def independent(count: int, variance: float) -> Covariance:
    """The covariance of strengths that are independent but for being centred."""
    if count <= DENSE_IMAGES:
        return DenseCovariance(variance * (np.eye(count) - 1 / count))
    from scipy.sparse import csr_array, diags_array

    noise = np.random.default_rng(0).normal(0, variance**-0.5, (count, _AT_ONCE))
    return SparseCovariance(SparsePosterior(csr_array(diags_array(np.full(count, 1 / variance))), noise, count))

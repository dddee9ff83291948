"""The probability to be the best, from a joint posterior of strengths."""

import math

import numpy as np
from scipy.special import ndtr

from mlxpref.ranking.covariance import Covariance, DenseCovariance
from mlxpref.ranking.outcomes import Array, Indices

DRAWS = 20_000  # know a share to 0.004: their standard error
CONTENDERS = 256  # of many images those nearest to the best, or to the edge of a top, count with their covariances


def best_probabilities(strengths: Array, covariance: Covariance, freedom: float = math.inf) -> Array:
    """The probability of every image to be the strongest, under the joint posterior.

    (N,) -> (N,), sum 1. The posterior is normal, or Student's with `freedom` degrees of freedom and
    `covariance` its squared scale. It is the share of draws, in pairs that mirror each other, with fixed random numbers
    for the images in order of strength: so permuting the images permutes the result, up to the draws' error where
    strengths are equal. Of two images it is exact for the normal. Chances that add up to less than 1e-4 become 0. Of
    many images, all but the `CONTENDERS` that come nearest to the strongest are taken as independent of each other.
    """
    if isinstance(covariance, DenseCovariance):
        return _of_matrix(strengths, covariance.block(), freedom)
    return _of_many(strengths, covariance, freedom)


def contenders(strengths: Array, covariance: Covariance, image: int) -> Indices:
    """(N,) -> the `CONTENDERS` images whose strengths are nearest to that of one, in standard errors, ascending."""
    deviation = np.sqrt(np.maximum(covariance.row(image), 1e-18))
    return np.sort(np.argsort(np.abs(strengths - strengths[image]) / deviation, kind="stable")[:CONTENDERS])


def _of_many(strengths: Array, covariance: Covariance, freedom: float) -> Array:
    """`best_probabilities` of many images."""
    best, random = int(strengths.argmax()), np.random.default_rng(0)
    images = contenders(strengths, covariance, best)
    lead = (strengths - strengths[best]) / np.sqrt(np.maximum(covariance.row(best), 1e-18))
    able = np.flatnonzero((ndtr(lead) > 1e-4 / len(strengths)) | (freedom <= 30))
    others = np.setdiff1d(able, images)
    order, deviations = np.concatenate([images, others]), np.sqrt(covariance.variances()[others])
    wins = np.zeros(len(order))
    for part in np.array_split(normal_draws(covariance.block(images), DRAWS // 2, random), 100):  # (D / 200, M)
        error = np.concatenate([part, deviations * random.standard_normal((len(part), len(others)))], axis=1)
        if not math.isinf(freedom):
            error *= np.sqrt(freedom / random.chisquare(freedom, (len(part), 1)))
        for sign in (1, -1):
            wins += np.bincount((strengths[order] + sign * error).argmax(axis=1), minlength=len(order))
    result = np.zeros(len(strengths))
    result[order] = wins / wins.sum()
    return result


def _of_matrix(strengths: Array, covariance: Array, freedom: float) -> Array:
    """`best_probabilities` by the matrix (N, N)."""
    variance = difference_variance(covariance)
    np.fill_diagonal(variance, 1.0)
    lead = (strengths[:, None] - strengths) / np.sqrt(np.maximum(variance, 1e-18))  # (N, N), in standard errors
    np.fill_diagonal(lead, np.inf)
    if len(strengths) == 2 and math.isinf(freedom):
        return np.asarray(ndtr(lead.min(axis=1)))
    # Student's tails are long: with few degrees of freedom all may be the best.
    able = ndtr(lead.min(axis=1)) > 1e-4 / len(strengths) if freedom > 30 else np.ones(len(strengths), np.bool_)
    order = np.flatnonzero(able)[np.argsort(-strengths[able], kind="stable")]  # (M,)
    random = np.random.default_rng(0)
    error = normal_draws(covariance[np.ix_(order, order)], DRAWS // 2, random)  # (D / 2, M)
    if not math.isinf(freedom):
        error *= np.sqrt(freedom / random.chisquare(freedom, (DRAWS // 2, 1)))
    winners = np.concatenate([(strengths[order] + sign * error).argmax(axis=1) for sign in (1, -1)])
    result = np.zeros(len(strengths))
    result[order] = np.bincount(winners, minlength=len(order)) / len(winners)
    return result


def normal_draws(covariance: Array, count: int, random: np.random.Generator) -> Array:
    """`count` draws (count, N) of a normal variable of mean 0, from its covariance (N, N), which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))  # (N, N)
    return np.asarray(random.standard_normal((count, len(covariance))) @ root.T)


def difference_variance(covariance: Array) -> Array:
    """(N, N) covariance -> (N, N) variance of every difference."""
    variance = np.diag(covariance)
    return np.maximum(variance[:, None] + variance - 2 * covariance, 0.0)

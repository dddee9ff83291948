"""Variances of differences, and the probability to be best, from a joint posterior of strengths."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]

DRAWS = 20_000  # know a share to 0.004: their standard error


def best_probabilities(strengths: Array, covariance: Array, freedom: float = math.inf) -> Array:
    """The probability of every image to be the strongest, under the joint posterior.

    (N,), (N, N) -> (N,), sum 1. The posterior is normal, or Student's with `freedom` degrees of freedom and
    `covariance` its squared scale. It is the share of draws, in pairs that mirror each other, with fixed random numbers
    for the images in order of strength: so permuting the images permutes the result, up to the draws' error where
    strengths are equal. Of two images it is exact for the normal. Chances that add up to less than 1e-4 become 0.
    """
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

"""Variances of differences, and the probability to be best, from a joint normal posterior of strengths."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]


def best_probabilities(strengths: Array, covariance: Array) -> Array:
    """The probability of every image to be the strongest, under the joint normal posterior.

    (N,), (N, N) -> (N,), sum 1. No random numbers, so permuting the images permutes the result: an image's leads over
    the others get one common factor that matches their mean covariances (Dunnett 1955; right to 0.005 for independent
    strengths, else to about 0.04), integrated over numerically. Chances that add up to less than 1e-4 become 0.
    """
    variance = difference_variance(covariance)
    np.fill_diagonal(variance, 1.0)
    lead = (strengths[:, None] - strengths) / np.sqrt(np.maximum(variance, 1e-18))  # (N, N), in standard errors
    np.fill_diagonal(lead, np.inf)
    able = np.flatnonzero(ndtr(lead.min(axis=1)) > 1e-4 / len(strengths))  # (M,): the others cannot be the best
    lead, variance, covariance = (square[np.ix_(able, able)] for square in (lead, variance, covariance))
    behind = ndtr(-lead) + 1e-3  # (M, M): which opponents matter to each image
    np.fill_diagonal(behind, 0.0)
    total = behind.sum(axis=1, keepdims=True)
    # (M, M): mean covariance of i's lead over j with its leads over others k, C_ii - C_ij - C_ik + C_jk.
    own = np.diag(covariance)[:, None] - covariance
    shared = total * own - (behind * covariance).sum(axis=1, keepdims=True) + behind @ covariance
    shared = (shared - behind * variance) / np.maximum(total - behind, 1e-9)
    common = np.maximum((behind * shared).sum(axis=1, keepdims=True) / np.maximum(total, 1e-9), 1e-12)
    loading = np.clip(shared / np.sqrt(common), 0, 0.98 * np.sqrt(variance))  # no steeper than the grid can follow
    grid = np.arange(-6, 6.01, 0.25)  # (G,) values of the common factor
    result = np.zeros(len(strengths))
    for row, index in enumerate(able):
        ahead = (lead[row] * np.sqrt(variance[row]))[:, None] + loading[row][:, None] * grid  # (M, G)
        ahead = ahead / np.sqrt(variance[row] - loading[row] ** 2)[:, None]
        ahead[row] = np.inf
        result[index] = ndtr(ahead).prod(axis=0) @ np.exp(-(grid**2) / 2)
    probabilities: Array = result / result.sum()
    return probabilities


def difference_variance(covariance: Array) -> Array:
    """(N, N) covariance -> (N, N) variance of every difference."""
    variance = np.diag(covariance)
    return np.maximum(variance[:, None] + variance - 2 * covariance, 0.0)

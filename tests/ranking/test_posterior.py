"""The probability to be the best and the variances of differences, against integrals and many draws."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtr

from mlxpref.ranking.bradley_terry import fit_strengths
from mlxpref.ranking.covariance import DenseCovariance
from mlxpref.ranking.outcomes import all_pairs
from mlxpref.ranking.posterior import best_probabilities, difference_variance
from tests.ranking.simulation import random_pairs, thought, voted


def test_the_variance_of_differences():
    root = np.random.default_rng(0).normal(size=(5, 5))
    variance = difference_variance(root @ root.T)
    for i in range(5):
        for j in range(5):
            assert variance[i, j] == pytest.approx(((root[i] - root[j]) ** 2).sum(), abs=1e-12)


def test_the_best_of_independent_strengths():
    """Against the integral over the best one's value, for independent strengths of unlike deviations."""
    means, deviations = np.array([0.3, 0.0, -0.5, 0.1]), np.array([0.5, 1.0, 2.0, 0.2])
    values = np.linspace(-12, 12, 20_001)
    cdfs = ndtr((values - means[:, None]) / deviations[:, None])
    densities = np.exp(-(((values - means[:, None]) / deviations[:, None]) ** 2) / 2) / deviations[:, None]
    exact = [(densities[i] * np.delete(cdfs, i, axis=0).prod(axis=0)).sum() for i in range(4)]
    exact = np.array(exact) / np.sum(exact)
    np.testing.assert_allclose(best_probabilities(means, DenseCovariance(np.diag(deviations**2))), exact, atol=0.015)


@pytest.mark.parametrize("freedom", [1.0, 3.0, 12.0, math.inf])
@pytest.mark.parametrize("lead", [0.0, 0.7, 3.0])
def test_the_better_of_two(freedom, lead):
    """Two images: the distribution function of their difference, Student's or normal."""
    exact = stats.t.cdf(lead / math.sqrt(0.5), freedom)
    p_best = best_probabilities(np.array([lead, 0.0]), DenseCovariance(0.25 * np.eye(2)), freedom)
    np.testing.assert_allclose(p_best, [exact, 1 - exact], atol=0.015)


@pytest.mark.parametrize("count", [3, 10, 30, 100])
@pytest.mark.parametrize("freedom", [4.0, math.inf])
def test_best_agrees_with_posterior_draws(count, freedom):
    """Posteriors of votes on few and many pairs; 50,000 draws of the joint distribution know a share to 0.002."""
    rng = np.random.default_rng(count)
    for deviation in (0.3, 2.0):
        pairs = random_pairs(count, 4, rng) if count > 5 else list(all_pairs(count))
        fit = fit_strengths(count, voted(pairs, rng.normal(0, deviation, count), rng))
        draws = rng.multivariate_normal(
            np.zeros(count), fit.covariance.block(), 50_000, check_valid="ignore", method="eigh"
        )
        if math.isfinite(freedom):
            draws *= np.sqrt(freedom / rng.chisquare(freedom, (len(draws), 1)))
        shares = np.bincount((fit.strengths + draws).argmax(axis=1), minlength=count) / len(draws)
        p_best = best_probabilities(fit.strengths, fit.covariance, freedom)
        assert p_best.sum() == pytest.approx(1)
        np.testing.assert_allclose(p_best, shares, atol=0.02)
        assert shares[p_best == 0].sum() < 2e-3  # what is not worth counting


def test_permuted_images_have_permuted_chances():
    rng = np.random.default_rng(3)
    fit = fit_strengths(12, thought(random_pairs(12, 4, rng), rng.normal(0, 1, 12), rng))
    new = rng.permutation(12)
    moved = best_probabilities(fit.strengths[new], fit.covariance.part(new), 5.0)
    np.testing.assert_allclose(moved, best_probabilities(fit.strengths, fit.covariance, 5.0)[new], atol=0.02)

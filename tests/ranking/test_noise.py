"""The noise of answers: by linear algebra, by simulation of votes and of log-odds, and what is known of it before."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit, logit

from mlxpref.ranking.bradley_terry import fit_strengths
from mlxpref.ranking.noise import BIAS, ONE_ANSWER, Noise, WorkingAnswers, without_prior
from mlxpref.ranking.orders import better_orders
from mlxpref.ranking.outcomes import Outcomes, PairOutcome, all_pairs
from tests.ranking.simulation import one_order, outcomes_of, random_pairs, thought, voted

# By linear algebra


def test_working_answers_are_the_inverse_covariance():
    """A pair's answers have the covariance V: the precision of lead and bias is X' V^-1 X, of those with an answer."""
    rng = np.random.default_rng(0)
    outcomes = [PairOutcome(0, 1, 0.7, 0.4), PairOutcome(0, 1, 0.7, None), PairOutcome(0, 1, None, 0.9, 1)]
    noises = [Noise(0.4, 0.2, floor=0.01), Noise(0.7, 1.3, floor=0.02)]
    data, z = Outcomes(2, outcomes), rng.normal(0, 1, (2, 3))
    working = WorkingAnswers(data, z, noises)
    lead, bias = rng.normal(0, 1, (2, 3))
    working.fit_to(lead, bias)
    latent = working.latent(lead, bias)
    for k, outcome in enumerate(outcomes):
        noise, known = noises[outcome.instrument], data.known[:, k]
        slope = expit(z[:, k]) * expit(-z[:, k])
        random = noise.pair * np.ones((2, 2)) + noise.bias * np.outer([1, -1], [1, -1])
        v = np.linalg.inv((random + np.diag(noise.floor / slope))[np.ix_(known, known)])
        x = np.array([[1, 1], [1, -1]])[known]  # (orders, lead and bias)
        response = (z[:, k] + (data.p[:, k] - expit(z[:, k])) / slope)[known]
        precision = x.T @ v @ x
        found = [working.lead_precision[k], working.cross_precision[k], working.bias_precision[k]]
        np.testing.assert_allclose(found, precision[[0, 0, 1], [0, 1, 1]], rtol=1e-9)
        left = response - x @ [lead[k], bias[k]]
        np.testing.assert_allclose([working.left_lead[k], working.left_bias[k]], x.T @ v @ left, rtol=1e-9)
        expected = (np.array([[1, 1], [1, -1]]) @ [lead[k], bias[k]]) + random[:, known] @ v @ left
        np.testing.assert_allclose(latent[:, k], expected, rtol=1e-9)


def test_the_variance_of_an_answer():
    """Of votes against their draws; of log-odds the variances are those of the noise itself."""
    rng = np.random.default_rng(0)
    first, second = logit(rng.binomial(300, 0.7, (2, 20_000)) / 300)
    votes = Noise(1 / 300, 0.0, votes=True)
    assert votes.of_mean(0.7) == pytest.approx(((first + second) / 2).var(), rel=0.05)
    assert votes.of_difference(0.7) == pytest.approx(((first - second) / 2).var(), rel=0.05)
    judge = Noise(0.4, 0.3)
    assert judge.of_mean(0.5) == pytest.approx(0.4, rel=1e-4)
    assert judge.of_difference([0.5, 0.6]) == pytest.approx(0.3, rel=1e-4)


# By simulation


@pytest.mark.parametrize(("votes", "dispersion"), [(1, 1.0), (3, 1 / 3), (8, 1 / 8)])
def test_the_dispersion_of_votes(votes, dispersion):
    rng = np.random.default_rng(8)
    noise = fit_strengths(100, voted(random_pairs(100, 20, rng), rng.normal(0, 1, 100), rng, votes)).reference.noise
    assert noise.votes
    assert noise.dispersion == pytest.approx(dispersion, rel=0.12)
    assert noise.opposite > 0.8
    assert noise.bias < 0.1  # it does not vary


def test_votes_that_both_orders_share():
    """The same vote in both orders: a pair is worth one vote, dispersion 2, and the second order says nothing."""
    rng = np.random.default_rng(8)
    single = voted(random_pairs(100, 20, rng), rng.normal(0, 1, 100), rng, 1, 0)
    fit = fit_strengths(100, [replace(o, p_a_shown_second=o.p_a_shown_first) for o in single])
    noise = fit.reference.noise
    assert noise.dispersion == pytest.approx(2, rel=0.15)
    assert noise.opposite < 0.01
    assert fit.reference.position_bias == pytest.approx(0, abs=1e-6)
    assert [better_orders(noise, comparisons) for comparisons in (2, 4, 50)] == [1, 1, 1]


@pytest.mark.parametrize("deviation", [0.1, 0.5, 1.0, 2.0])
def test_the_variance_of_the_bias_is_recovered(deviation):
    """Over 10 sets of 80 pairs: `bias_freedom` says how well, the standard error of a log variance is sqrt(2 / it)."""
    errors = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        outcomes = thought(random_pairs(40, 4, rng), rng.normal(0, 1, 40), rng, each=0.05, bias_deviation=deviation)
        noise = fit_strengths(40, outcomes).reference.noise
        truth = deviation**2 + 0.05**2 / 2  # half the difference of two comparisons has half their variance
        errors.append(math.log(noise.bias / truth) / math.sqrt(2 / noise.bias_freedom))
        assert 60 < noise.bias_freedom < 82
    assert np.abs(errors).max() < 3.5
    assert 0.4 < np.sqrt(np.mean(np.square(errors))) < 1.7


def test_no_noise_is_found_where_there_is_none():
    """Strengths of deviation 3 on the default budget: neither shrinkage nor the prior is taken for noise."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        strengths = rng.normal(0, 3, 20)
        fit = fit_strengths(20, thought(random_pairs(20, 4, rng), strengths, rng, noise=0.0, each=0.0))
        assert fit.reference.noise.pair < 1e-3
        np.testing.assert_allclose(fit.strengths, strengths - strengths.mean(), atol=0.1)


# What nothing shows, and what is known


def test_without_a_cycle_the_noise_stays_as_it_began():
    tree = [PairOutcome(0, 1, 0.9, 0.8), PairOutcome(1, 2, 0.7, 0.4), PairOutcome(1, 3, 0.2, 0.3)]
    noise = fit_strengths(4, tree).reference.noise
    assert noise.pair == ONE_ANSWER
    assert noise.freedom == 0
    assert noise.bias_freedom > 0  # both orders show the bias without a cycle
    single = fit_strengths(4, one_order(tree)).reference.noise
    assert (single.bias, single.bias_freedom) == (BIAS, 0)


def test_a_known_noise_is_kept_as_sure_as_it_is():
    rng = np.random.default_rng(0)
    outcomes = thought(list(all_pairs(6)), rng.normal(0, 1, 6), rng, bias_deviation=0.5)
    own = fit_strengths(6, outcomes).reference.noise
    known = Noise(10 * own.pair, 10 * own.bias)
    pairs, biases = [own.pair], [own.bias]
    for freedom in (1, 10, 100, 1e6):
        noise = fit_strengths(6, outcomes, {0: replace(known, freedom=freedom, bias_freedom=freedom)}).reference.noise
        pairs.append(noise.pair)
        biases.append(noise.bias)
    assert pairs[1:] == sorted(pairs[1:])
    assert biases[1:] == sorted(biases[1:])
    assert [pairs[-1], biases[-1]] == pytest.approx([known.pair, known.bias], rel=1e-3)
    votes = fit_strengths(6, outcomes, {0: Noise(0.3, 0.1, 1e6, 1e6, votes=True)}).reference.noise
    assert votes == own  # a noise of votes says nothing of log-odds


def test_a_known_noise_decides_where_nothing_shows_it():
    """Three images in a tree: a judge that is known to be exact is believed, one that is known to be noisy is not."""
    tree = [PairOutcome(0, 1, 0.8, 0.8), PairOutcome(1, 2, 0.8, 0.8)]
    errors = [
        math.sqrt(fit_strengths(3, tree, {0: Noise(pair, 0.1, 50, 50)}).covariance.variances()[0])
        for pair in (0.01, 1.0, 10.0)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.2


def test_what_answers_alone_showed():
    """Two halves of a judge's answers, the second with what the first showed, are as sure as all at once."""
    rng = np.random.default_rng(1)
    outcomes = [thought(list(all_pairs(8)), rng.normal(0, 1, 8), rng, bias_deviation=0.5) for _ in range(2)]
    first, second = (without_prior(fit_strengths(8, half).reference.noise) for half in outcomes)
    assert 15 < first.freedom <= 21  # the cycles of 28 pairs of 8 images
    assert 20 < first.bias_freedom <= 27
    after = fit_strengths(8, outcomes[1], {0: first}).reference.noise
    assert after.freedom == pytest.approx(first.freedom + second.freedom, rel=0.1)
    assert min(first.pair, second.pair) < after.pair < max(first.pair, second.pair)
    nothing = without_prior(fit_strengths(2, [PairOutcome(0, 1, 0.9, 0.8)]).reference.noise)
    assert (nothing.freedom, nothing.bias_freedom) == (0, 0)


def test_a_sure_judges_one_upset_is_its_noise():
    """Answers of 3 nats and more, without noise, and with one upset."""
    pairs = list(all_pairs(4))
    lead = np.array([3.0 * (b - a) for a, b in pairs])
    calm = fit_strengths(4, outcomes_of(pairs, expit(lead + 0.3), expit(lead - 0.3))).reference.noise
    lead[0] *= -1
    upset = fit_strengths(4, outcomes_of(pairs, expit(lead + 0.3), expit(lead - 0.3))).reference.noise
    assert upset.pair > 10 * calm.pair

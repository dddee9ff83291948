"""Many images: sparse equations and draws, beside the matrices that few images have."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mlxpref.ranking import covariance, working_model
from mlxpref.ranking.bradley_terry import Z95, Instrument, StrengthFit, fit_strengths
from mlxpref.ranking.covariance import DenseCovariance, SparseCovariance, independent
from mlxpref.ranking.noise import Noise
from mlxpref.ranking.outcomes import PairOutcome
from mlxpref.ranking.pair_selection import default_round, is_settled, next_round, round_size
from mlxpref.ranking.posterior import best_probabilities
from mlxpref.ranking.strength_ranking import TIE_PLACES, ranking_of
from mlxpref.ranking.working_model import DenseModel, Design, SparseModel
from tests.ranking.simulation import one_order, random_pairs, thought, voted

COUNT = 300


@pytest.fixture
def sparse(monkeypatch):
    """Few images are fitted as many are."""

    def fit(count, outcomes, known=None):
        with monkeypatch.context() as patch:
            patch.setattr(working_model, "DENSE_IMAGES", 1)
            return fit_strengths(count, outcomes, known)

    return fit


def answers(kind, count=COUNT):
    """Outcomes of 600 pairs of one kind."""
    rng = np.random.default_rng(count)
    strengths, pairs = rng.normal(0, 1, count), random_pairs(count, 4, rng)
    if kind == "votes":
        return voted(pairs, strengths, rng)
    if kind == "one order":
        return one_order(thought(pairs, strengths, rng, bias_deviation=0.3))
    if kind == "two instruments":
        return thought(pairs[::2], strengths, rng, scale=0.5) + thought(pairs[1::2], strengths, rng, instrument=1)
    if kind == "saturated":
        return thought(pairs, 20 * strengths, rng, noise=2)
    if kind == "chain":
        near = [(i, i + step) for step in (1, 2) for i in range(count - step)]
        return thought(near, np.sort(strengths), rng)
    if kind == "islands":
        apart = [pair for pair in pairs if pair[0] % 3 == pair[1] % 3]
        return thought([*apart, (0, 3), (3, 6), (0, 6)], strengths, rng)
    return thought(pairs, strengths, rng)


def a_design(count=COUNT, instruments=2):
    """Equations of a random design with coupled leads and biases."""
    rng = np.random.default_rng(1)
    a, b = np.array(random_pairs(count, 4, rng)).T
    size = len(a)
    lead, bias = rng.uniform(0.5, 3, (2, size))
    cross = rng.uniform(-1, 1, size) * np.sqrt(lead * bias)
    own = count + np.arange(size) % instruments
    slope = rng.uniform(0.5, 2, size)
    prior = np.repeat([0.5, 0.1], [count, instruments])
    return Design(count, np.stack([a, b]), np.stack([slope, -slope]), own, lead, cross, bias, prior)


def test_both_solve_the_same_equations():
    design = a_design()
    dense, sparse = DenseModel(design), SparseModel(design, None)
    np.testing.assert_allclose(sparse.hessian.toarray(), dense.hessian, atol=1e-12)
    right = np.random.default_rng(0).normal(size=len(design.prior))
    np.testing.assert_allclose(sparse.solve(right), dense.solve(right), atol=1e-9)
    again = SparseModel(design, sparse).solve(right, sparse.solve(right))
    np.testing.assert_allclose(again, dense.solve(right), atol=1e-9)
    for bias in (COUNT, COUNT + 1):
        assert sparse.bias_variance(bias) == pytest.approx(dense.bias_variance(bias), rel=1e-6)
    assert sparse.known() == pytest.approx(dense.known(), rel=0.01)
    for one, other in zip(sparse.leverage(), dense.leverage(), strict=True):
        assert one.mean() == pytest.approx(other.mean(), rel=0.01, abs=1e-4)


def test_variances_are_known_to_a_few_percent_and_blocks_exactly():
    design = a_design()
    drift = np.random.default_rng(2).normal(size=COUNT)
    doubts = [(drift - drift.mean(), 0.01)]
    dense, sparse = (model.covariance(doubts, 1.3) for model in (DenseModel(design), SparseModel(design, None)))
    a, b = np.array(random_pairs(COUNT, 6, np.random.default_rng(3))).T  # neighbours and others
    a, b = np.concatenate([a, design.columns[0], [5]]), np.concatenate([b, design.columns[1], [5]])
    images = np.array([7, 3, 200])
    np.testing.assert_allclose(sparse.variances(), dense.variances(), rtol=0.05)
    np.testing.assert_allclose(sparse.of_differences(a, b), dense.of_differences(a, b), rtol=0.08, atol=1e-12)
    np.testing.assert_allclose(sparse.row(3), dense.row(3), rtol=0.25)
    np.testing.assert_allclose(sparse.block(images), dense.block(images), atol=1e-6)
    np.testing.assert_allclose(sparse.part(images).block(), dense.part(images).block(), atol=1e-6)
    np.testing.assert_allclose(sparse.scaled(2).block(images), 2 * dense.block(images), atol=1e-6)


def test_a_part_of_many_is_the_same_by_other_numbers(monkeypatch):
    monkeypatch.setattr(covariance, "DENSE_IMAGES", 1)
    whole = SparseModel(a_design(), None).covariance([], 1.0)
    images = np.array([7, 3, 200, 11])
    part = whole.part(images).part(np.array([1, 2]))
    assert len(part) == 2
    np.testing.assert_allclose(part.variances(), whole.variances()[[3, 200]])
    np.testing.assert_allclose(part.row(1), whole.row(200)[[3, 200]])
    np.testing.assert_allclose(part.block(), whole.block(np.array([3, 200])))
    np.testing.assert_allclose(part.of_differences([0], [1]), whole.of_differences(np.array([3]), np.array([200])))
    np.testing.assert_allclose(independent(4, 9.0).block(), 9 * (np.eye(4) - 1 / 4), atol=1e-9)


KINDS = ["log-odds", "votes", "one order", "two instruments", "saturated", "chain", "islands"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_fit_is_the_dense_one(kind, sparse):
    """Draws know the sums of variances to one in some hundred, so noise and deviation differ by as much."""
    outcomes = answers(kind)
    one, other = sparse(COUNT, outcomes), fit_strengths(COUNT, outcomes)
    assert isinstance(one.covariance, SparseCovariance)
    errors = np.sqrt(other.covariance.variances())
    assert np.abs((one.strengths - other.strengths) / errors).max() < 0.1
    np.testing.assert_allclose(np.sqrt(one.covariance.variances()), errors, rtol=0.12)
    assert np.sqrt(one.covariance.variances() / other.covariance.variances()).mean() == pytest.approx(1, abs=0.03)
    assert one.deviation == pytest.approx(other.deviation, rel=0.03)
    for mine, theirs in zip(one.instruments, other.instruments, strict=True):
        assert mine.scale == pytest.approx(theirs.scale, rel=0.01)
        assert mine.position_bias == pytest.approx(theirs.position_bias, abs=0.1 * theirs.position_bias_stderr)
        assert mine.noise.pair == pytest.approx(theirs.noise.pair, rel=0.05)


def test_where_all_noise_is_known_strengths_are_exact(sparse, monkeypatch):
    """Only the deviation of the strengths is left to find: its steps need sums of variances."""
    sure = {0: Noise(0.1, 0.01, 1e12, 1e12)}
    monkeypatch.setattr("mlxpref.ranking.bradley_terry.PRIOR_DOUBT", 1e-6)
    outcomes = answers("log-odds")
    np.testing.assert_allclose(
        sparse(COUNT, outcomes, sure).strengths, fit_strengths(COUNT, outcomes, sure).strengths, atol=1e-6
    )


def test_every_fit_of_many_is_the_same(sparse):
    outcomes = answers("votes")
    one, other = (sparse(COUNT, outcomes) for _ in range(2))
    np.testing.assert_array_equal(one.strengths, other.strengths)
    np.testing.assert_array_equal(one.covariance.variances(), other.covariance.variances())


@pytest.mark.parametrize("pairs", [[], [(0, 1)], [(0, 1), (1, 2), (0, 2)]])
def test_few_pairs_of_many_images(pairs):
    """Nearly all images were never asked about, and the answers are extreme."""
    outcomes = [PairOutcome(a, b, 1.0, 1.0) for a, b in pairs]
    ranked = ranking_of(fit_strengths(600, outcomes), outcomes)
    numbers = [[image.strength, image.stderr, image.p_best] for image in ranked.images]
    assert np.isfinite(numbers).all()
    assert (np.array(numbers)[:, 1] > 0.1).all()
    assert not pairs or ranked.images[0].index == 0


def test_coverage_of_many_images():
    """Six sets of 600 images at four pairs an image; the intervals of one set hold or miss together."""
    held = np.zeros(2)
    for seed in range(6):
        rng = np.random.default_rng([600, seed])
        strengths, pairs = rng.normal(0, 1, 600), random_pairs(600, 4, rng)
        fit = fit_strengths(600, thought(pairs, strengths, rng, bias_deviation=0.3))
        error = fit.strengths - (strengths - strengths.mean())
        a, b = rng.permutation(600), rng.permutation(600)
        held[0] += (np.abs(error) <= Z95 * np.sqrt(fit.covariance.variances())).mean() / 6
        held[1] += (np.abs(error[a] - error[b]) <= Z95 * np.sqrt(fit.covariance.of_differences(a, b))).mean() / 6
    assert (np.abs(held - 0.95) < 0.025).all()


# Decisions


@pytest.fixture(scope="module")
def many():
    """The fit of 600 images to 1,200 pairs, the same with its matrix, and the outcomes."""
    outcomes = answers("log-odds", 600)
    fit = fit_strengths(600, outcomes)
    return fit, replace(fit, covariance=DenseCovariance(fit.covariance.block())), outcomes


def test_the_best_and_the_ties_of_many(many):
    fit, exact, outcomes = many
    one, other = (ranking_of(each, outcomes) for each in (fit, exact))
    chances = [[image.p_best for image in sorted(each.images, key=lambda i: i.index)] for each in (one, other)]
    np.testing.assert_allclose(*chances, atol=0.01)
    assert sum(chances[0]) == pytest.approx(1)
    place = {image.index: at for at, image in enumerate(one.images)}
    different = 0
    for mine, theirs in zip(one.images, other.images, strict=True):
        near = {i for i in theirs.tied_with if abs(place[i] - place[mine.index]) <= TIE_PLACES}
        assert len(mine.tied_with) <= 2 * TIE_PLACES
        different += len(near.symmetric_difference(mine.tied_with))
        assert all(mine.index in one.images[place[i]].tied_with for i in mine.tied_with)
    assert different < 0.02 * 600 * 2 * TIE_PLACES


@pytest.mark.parametrize("freedom", [3.0, math.inf])
def test_all_of_many_may_be_the_best(freedom):
    """Of a thousand equal ones all share the chances; a leader beyond doubt has them all."""
    equal = independent(1000, 1.0)
    shares = best_probabilities(np.zeros(1000), equal, freedom)
    assert shares.sum() == pytest.approx(1)
    assert shares.max() < 0.005
    leading = np.eye(1000)[3] * 200
    assert best_probabilities(leading, equal, freedom)[3] > 0.999


def test_a_round_of_many_is_worth_as_much_as_the_exact_one(many):
    """By what its answers take from the variances, of all images and of those pairs, as the matrix says."""
    fit, exact, outcomes = many
    asked = [(outcome.a, outcome.b) for outcome in outcomes]
    rounds = [next_round(600, asked, each, 200) for each in (fit, exact)]
    gains, noise = [], fit.reference.noise.pair
    matrix = exact.covariance.block()
    for pairs in rounds:
        assert len(set(pairs)) == 200
        assert not {*pairs} & {*asked}
        assert np.bincount(np.ravel(pairs)).max() <= 2
        a, b = np.array(pairs).T
        change = matrix[a] - matrix[b]  # (200, N)
        known = np.linalg.solve(change[:, a] - change[:, b] + noise * np.eye(200), change)
        doubt = np.exp(-((fit.strengths[a] - fit.strengths[b]) ** 2) / 2 / exact.covariance.of_differences(a, b))
        gains.append([(change * known).sum(), doubt.sum()])
    np.testing.assert_allclose(*gains, rtol=0.03)


def test_the_first_rounds_of_many_connect_all():
    instrument = Instrument(1.0, 0.0, 0.1, Noise(0.3, 1.0))
    fit = StrengthFit(np.random.default_rng(0).normal(0, 1, 600), independent(600, 1.0), (instrument,))
    pairs = next_round(600, [], None, 200)
    pairs += next_round(600, pairs, fit, 399)
    island = np.arange(600)
    for a, b in pairs:
        island[island == island[b]] = island[a]
    assert len(set(island)) == 1


def test_with_a_top_many_images_end_early(many):
    """Rounds shrink and pick pairs of those near the edge, though most pairs among these were asked."""
    fit, _, outcomes = many
    order = np.argsort(-fit.strengths)
    size = round_size(600, fit, 5)
    assert default_round(600) == round_size(600, fit, None) > size >= 600 // 25
    asked = [(outcome.a, outcome.b) for outcome in outcomes]
    pairs = next_round(600, asked, fit, size, top=5)
    assert len({*pairs} - {*asked}) == size
    assert set(np.ravel(pairs)) <= set(order[:60].tolist())
    asked += [(int(min(a, b)), int(max(a, b))) for i, a in enumerate(order[:12]) for b in order[:i]]
    assert not {*next_round(600, asked, fit, size, top=5)} & {*asked}


def test_the_top_of_many_is_settled_by_its_rivals():
    def settled(lead, deviation, members=None):
        strengths = np.concatenate([np.full(3, lead), np.zeros(997)])
        sure = Instrument(1.0, 0.0, 0.1, Noise(1e-9, 1e-9))
        return is_settled(StrengthFit(strengths, independent(1000, deviation**2), (sure,)), 3, [], members)

    assert settled(8.0, 1.0)
    assert not settled(3.0, 1.0)
    assert settled(3.0, 0.1)
    assert settled(3.0, 1.0, members=[0])  # nothing is left to ask of them


def test_a_chain_of_sure_answers_has_an_end(sparse):
    """Images whose neighbours alone were compared: the slowest case of conjugate gradients."""
    outcomes = [PairOutcome(a, b, 0.6, 0.6) for a, b in pairwise(range(200))]
    fit = sparse(200, outcomes, {0: Noise(1e-6, 1e-6, 100, 100)})
    step = math.log(0.6 / 0.4)
    np.testing.assert_allclose(-np.diff(fit.strengths), step, atol=1e-3)

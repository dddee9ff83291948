"""The order of images: ranks, ties, intervals and chances to be the best; two, three and four images."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit

from mlxpref.errors import DataError
from mlxpref.ranking.bradley_terry import PRIOR_DEVIATION, Z95
from mlxpref.ranking.noise import Noise
from mlxpref.ranking.outcomes import PairOutcome, all_pairs
from mlxpref.ranking.strength_ranking import rank_images, unbiased_preference
from tests.ranking.simulation import judged_sets, one_order, outcomes_of, random_pairs, relaxed, thought, voted


def by_index(ranking):
    return sorted(ranking.images, key=lambda image: image.index)


def exact(strengths, bias=0.3, scale=1.0):
    """Every pair of images in both orders, as a judge without noise answers."""
    pairs = list(all_pairs(len(strengths)))
    lead = np.array([strengths[a] - strengths[b] for a, b in pairs])
    return outcomes_of(pairs, expit(scale * (lead + bias)), expit(scale * (lead - bias)))


# Invariants


@given(judged_sets(), st.randoms(use_true_random=False))
@relaxed
def test_permuting_the_images_permutes_the_ranking(judged, random):
    count, outcomes = judged
    new = list(range(count))
    random.shuffle(new)
    moved = [replace(o, a=new[o.a], b=new[o.b]) for o in outcomes]
    before, after = rank_images(count, outcomes), rank_images(count, moved)
    was, now = by_index(before), by_index(after)
    lead = np.abs(before.fit.strengths[:, None] - before.fit.strengths)
    for image in was:
        other = now[new[image.index]]
        for name in ("strength", "low", "high"):
            assert getattr(other, name) == pytest.approx(getattr(image, name), rel=0.02, abs=0.02), name
        assert other.stderr == pytest.approx(image.stderr, rel=0.02)
        assert other.p_best == pytest.approx(image.p_best, abs=0.02)  # images that are equal share their draws
        assert (other.wins, other.pairs) == (image.wins, image.pairs)
        if np.delete(lead[image.index], image.index).min() > 0.05:
            assert other.rank == image.rank


@given(judged_sets())
@relaxed
def test_every_set_gives_finite_consistent_numbers(judged):
    count, outcomes = judged
    ranked = rank_images(count, outcomes)
    images = by_index(ranked)
    assert [image.index for image in images] == list(range(count))
    numbers = [[i.strength, i.stderr, i.low, i.high, i.p_best] for i in images]
    assert np.isfinite([*np.ravel(numbers), ranked.position_bias, ranked.position_bias_stderr]).all()
    assert sum(image.strength for image in images) == pytest.approx(0, abs=1e-9)
    assert sum(image.p_best for image in images) == pytest.approx(1)
    assert all(i.low < i.strength < i.high and 0 <= i.p_best <= 1 for i in images)
    assert all(i.index in images[j].tied_with for i in images for j in i.tied_with)
    assert all(i.index not in i.tied_with and i.wins <= i.pairs for i in images)
    order = [(image.rank, image.index) for image in ranked.images]
    assert order == sorted(order)
    assert order[0][0] == 1


@pytest.mark.parametrize("factor", [0.01, 0.1, 2.0, 4.0])
def test_how_sure_a_judge_speaks_changes_no_tie(factor):
    """Log-odds times a factor: strengths and standard errors follow; ties, ranks and chances do not."""
    rng = np.random.default_rng(4)
    pairs, truth = list(all_pairs(8)), rng.normal(0, 0.6, 8)
    state = rng.bit_generator.state
    ranked = []
    for scale in (1.0, factor):
        rng.bit_generator.state = state
        ranked.append(by_index(rank_images(8, thought(pairs, truth, rng, noise=0.3, scale=scale))))
    for before, after in zip(*ranked, strict=True):
        assert after.strength / factor == pytest.approx(before.strength, abs=0.02)
        assert after.stderr / factor == pytest.approx(before.stderr, rel=0.02)
        assert after.p_best == pytest.approx(before.p_best, abs=0.02)
        assert (after.rank, after.tied_with) == (before.rank, before.tied_with)
    assert 0 < sum(len(image.tied_with) for image in ranked[0]) < 8 * 7


def test_ties_and_intervals_follow_the_covariance():
    rng = np.random.default_rng(0)
    ranked = rank_images(20, voted(random_pairs(20, 4, rng), rng.normal(0, 1, 20), rng))
    strengths, covariance = ranked.fit.strengths, ranked.fit.covariance.block()
    for image in ranked.images:
        i = image.index
        errors = [np.sqrt(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]) for j in range(20)]
        tied = [j for j in range(20) if j != i and abs(strengths[i] - strengths[j]) < Z95 * errors[j]]
        assert list(image.tied_with) == tied
        assert (image.high - image.low) / 2 == pytest.approx(Z95 * np.sqrt(covariance[i, i]))
    assert 0 < sum(len(image.tied_with) for image in ranked.images) < 20 * 19


# Two images: what the judge says of them


@pytest.mark.parametrize("bias", [-5.0, 0.0, 2.0])
def test_the_better_of_two_is_so_with_the_judges_probability(bias):
    for x in np.linspace(-30, 30, 41):
        for pair in (
            PairOutcome(0, 1, float(expit(x + bias)), float(expit(x - bias))),
            PairOutcome(1, 0, float(expit(x + bias)), float(expit(x - bias))),
        ):
            ranked = rank_images(2, [pair])
            assert by_index(ranked)[pair.a].p_best == pytest.approx(pair.p_a, abs=0.02)
            assert ranked.position_bias == pytest.approx(bias, abs=0.01) or abs(x) > 20  # beyond 1 - 1e-12


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_two_images_of_sure_or_even_answers(p):
    ranked = rank_images(2, [PairOutcome(0, 1, p, p)])
    assert by_index(ranked)[0].p_best == pytest.approx(p, abs=0.001)
    assert [image.rank for image in ranked.images] == ([1, 1] if p == 0.5 else [1, 2])


def test_two_images_by_their_fields():
    best, worst = rank_images(2, [PairOutcome(1, 0, 0.9, 0.8)]).images
    assert (best.index, best.rank, best.wins, best.pairs, worst.rank, worst.wins) == (1, 1, 1, 1, 2, 0)
    assert best.strength == -worst.strength > 0
    assert best.tied_with == (0,)


def test_one_order_of_two_images_is_less_sure_than_both():
    """The bias is not known; but what the judge showed of it before would be."""
    for x in (0.5, 2.0, 6.0):
        single = rank_images(2, [PairOutcome(0, 1, float(expit(x)), None)]).images[0]
        both = rank_images(2, [PairOutcome(0, 1, float(expit(x)), float(expit(x)))]).images[0]
        assert single.index == both.index == 0
        assert 0.5 < single.p_best < both.p_best


def test_few_answers_have_students_chances():
    """One pair judged three times: two degrees of freedom and a little of the prior."""
    ranked = rank_images(2, [PairOutcome(0, 1, p, p) for p in (0.3, 0.7, 0.75)])
    lead, error = 2 * ranked.images[0].strength, 2 * ranked.images[0].stderr / ranked.fit.widening
    assert 2 < ranked.fit.degrees_of_freedom < 4
    exact_chance = stats.t.cdf(lead / error, ranked.fit.degrees_of_freedom)
    assert ranked.images[0].p_best == pytest.approx(exact_chance, abs=0.01)


# A few images


@pytest.mark.parametrize("count", [4, 5, 6])
@pytest.mark.parametrize("gap", [0.5, 2.0, 4.0, 8.0])
def test_a_few_images_without_noise(count, gap):
    """Answers that agree with one order are noise-free, however sure or unsure: the best is known, nobody is tied."""
    ranked = rank_images(count, exact(-gap * np.arange(count)))
    assert [image.index for image in ranked.images] == list(range(count))
    assert ranked.images[0].p_best > 0.95
    assert not any(image.tied_with for image in ranked.images)
    np.testing.assert_allclose(np.diff(ranked.fit.strengths), -gap, rtol=0.1)


@pytest.mark.parametrize("count", [3, 4])
def test_a_surer_judge_is_not_less_sure(count):
    """The best is the best the more surely, the further it leads by the same noise."""
    chances, pairs = [], list(all_pairs(count))
    noise = np.random.default_rng(1).normal(0, 0.5, len(pairs))
    for gap in (0.0, 0.1, 0.3, 1.0, 3.0):
        lead = np.array([gap * (b - a) for a, b in pairs]) + noise
        ranked = rank_images(count, outcomes_of(pairs, expit(lead + 0.3), expit(lead - 0.3)))
        chances.append(by_index(ranked)[0].p_best)
    assert np.diff(chances).min() > -0.01  # the draws' error
    assert chances[-1] > 0.95


def test_three_images_with_a_known_noise():
    """Their noise shows in one cycle only; an earlier ranking's knows it: P(best) is right over 200 sets."""
    said, right = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        truth = rng.normal(0, 1, 3)
        outcomes = thought(list(all_pairs(3)), truth, rng, noise=0.8)
        best = rank_images(3, outcomes, {0: Noise(0.8**2, 0.01, 100, 100)}).images[0]
        said.append(best.p_best)
        right.append(best.index == truth.argmax())
    assert np.mean(said) == pytest.approx(np.mean(right), abs=0.08)  # standard error 0.027
    assert 0.7 < np.mean(said) < 0.95


@pytest.mark.parametrize(("judge", "orders"), [(voted, 2), (thought, 1)])
def test_the_best_is_so_as_often_as_said(judge, orders):
    """200 sets of 12 images on 36 pairs: the mean P(best) of the first, and how often it is the strongest."""
    said, right = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        truth = rng.normal(0, 1, 12)
        outcomes = judge(random_pairs(12, 6, rng), truth, rng)
        best = rank_images(12, outcomes if orders == 2 else one_order(outcomes)).images[0]
        said.append(best.p_best)
        right.append(best.index == truth.argmax())
    assert np.mean(said) == pytest.approx(np.mean(right), abs=0.09)  # standard error 0.03


# Edges


def test_all_of_an_unbroken_order_is_known():
    ranked = rank_images(4, [PairOutcome(a, b, 1.0, 1.0) for a, b in all_pairs(4)])
    assert [image.index for image in ranked.images] == [0, 1, 2, 3]
    assert [image.wins for image in ranked.images] == [3, 2, 1, 0]
    assert all(abs(image.strength) < 10 and 0.3 < image.stderr < 10 for image in ranked.images)


def test_disconnected_sets():
    """Two islands of three images each, without noise: within an island differences resolve, between islands few do.

    Only that all strengths have one prior ties the islands: the best of one may be told from the worst of the other.
    """
    one = exact([2.0, 0.0, -2.0])
    outcomes = [replace(o, a=o.a + by, b=o.b + by) for o in one for by in (0, 3) for _ in range(3)]
    images = by_index(rank_images(6, outcomes))
    assert sorted(image.rank for image in images) == [1, 1, 3, 3, 5, 5]
    for place, image in enumerate(images):
        own, other = (0, 3) if place < 3 else (3, 0)
        assert not set(image.tied_with) & {own, own + 1, own + 2}
        assert set(image.tied_with) >= {other + at for at in range(3) if abs(at - place % 3) < 2}
    assert images[0].p_best == pytest.approx(0.5, abs=0.01)
    assert images[0].stderr > 0.8  # within an island it is below 0.1


def test_equal_images_share_a_rank():
    ranked = rank_images(3, [PairOutcome(a, b, 0.5, 0.5) for a, b in all_pairs(3)])
    assert [(i.index, i.rank, i.wins) for i in ranked.images] == [(0, 1, 0), (1, 1, 0), (2, 1, 0)]
    assert [i.p_best for i in ranked.images] == pytest.approx([1 / 3] * 3, abs=0.01)


def test_images_without_pairs_keep_the_prior():
    ranked = rank_images(3, [PairOutcome(0, 1, None, None)])
    assert [image.pairs for image in ranked.images] == [0, 0, 0]
    assert ranked.images[0].stderr == pytest.approx(PRIOR_DEVIATION * (2 / 3) ** 0.5, rel=1e-3)
    assert [i.p_best for i in ranked.images] == pytest.approx([1 / 3] * 3, abs=0.01)


def test_one_image_is_no_ranking():
    with pytest.raises(DataError, match="at least two images"):
        rank_images(1, [])


def test_a_missing_order_is_judged_without_the_bias():
    assert unbiased_preference(PairOutcome(0, 1, 0.8, 0.6), 5.0) == PairOutcome(0, 1, 0.8, 0.6).p_a
    assert unbiased_preference(PairOutcome(0, 1, float(expit(1.5)), None), 2.0) == pytest.approx(expit(-0.5))
    assert unbiased_preference(PairOutcome(0, 1, None, float(expit(-1.5))), 2.0) == pytest.approx(expit(0.5))
    assert unbiased_preference(PairOutcome(0, 1, None, float("nan")), 2.0) == 0.5


def test_wins_are_the_later_instruments():
    """Thinking turns one of three answers; the pairs it did not judge are reading's."""
    reading = [PairOutcome(a, b, 0.9, 0.9) for a, b in all_pairs(3)]
    images = by_index(rank_images(3, [*reading, PairOutcome(0, 1, 0.2, 0.2, 1)]))
    assert [(image.wins, image.pairs) for image in images] == [(1, 2), (2, 2), (0, 2)]


@pytest.mark.parametrize("reading", [0.1, 0.5, 0.97])
def test_thinking_decides_about_two_images(reading):
    """Nothing shows how far reading can be trusted: what thinking says holds."""
    for thinking in (0.5, 0.8, 1 - 1e-6):
        outcomes = [PairOutcome(0, 1, reading, reading), PairOutcome(1, 0, 1 - thinking, 1 - thinking, 1)]
        assert by_index(rank_images(2, outcomes))[0].p_best == pytest.approx(thinking, abs=0.02)

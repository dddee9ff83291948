"""Both orders or one: the rule at its edges and by simulation, and how one order is balanced."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxpref.ranking.bradley_terry import fit_strengths
from mlxpref.ranking.noise import Noise
from mlxpref.ranking.orders import FEW_IMAGES, better_orders, in_one_order, trial_pairs, worth_of_pairs
from mlxpref.ranking.outcomes import Outcomes, PairOutcome, all_pairs
from tests.ranking.simulation import one_order, random_pairs, relaxed, tau, thought

# The rule


@pytest.mark.parametrize("comparisons", [1, 2, 3, 4, 8, 50])
def test_the_rule_at_its_edges(comparisons):
    """Without a bias that varies one order is free; with a large one it is worth nothing."""
    assert better_orders(Noise(pair=0.1, bias=0.0), comparisons) == 1
    assert better_orders(Noise(pair=0.1, bias=1e-6), comparisons) == 1
    assert better_orders(Noise(pair=0.1, bias=0.5), comparisons) == 2
    assert better_orders(Noise(pair=10.0, bias=0.5), comparisons) == 1  # the bias drowns in the noise of the pair


def test_many_comparisons_choose_both_orders_earlier():
    """The bias's variance, in units of the noise, from which both orders are asked falls to 1."""
    ratios = np.linspace(0.5, 5, 451)
    thresholds = [
        next(ratio for ratio in ratios if better_orders(Noise(1.0, ratio), comparisons) == 2)
        for comparisons in (2, 3, 4, 8, 20, 1000)
    ]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > 2
    assert thresholds[-1] == pytest.approx(1, abs=0.02)


def test_what_twice_as_many_pairs_are_worth():
    """Against the covariance of strengths by linear algebra: random designs of 60 images, degree 4 against 8."""
    rng = np.random.default_rng(0)

    def variance(degree):
        a, b = np.array(random_pairs(60, degree, rng)).T
        design = np.zeros((len(a), 60))
        design[np.arange(len(a)), a], design[np.arange(len(a)), b] = 1, -1
        return (1 / np.linalg.eigvalsh(design.T @ design)[1:]).sum() / 60

    ratio = np.mean([variance(4) for _ in range(20)]) / np.mean([variance(8) for _ in range(20)])
    assert worth_of_pairs(4) == pytest.approx(ratio, rel=0.15)


@pytest.mark.parametrize(("bias_deviation", "orders"), [(0.0, 1), (2.0, 2)])
def test_the_rule_chooses_what_orders_better(bias_deviation, orders):
    """20 images, 80 comparisons: 40 pairs in both orders or 80 pairs in one; the noise is that of the first fit."""
    agreement, chosen = {1: 0.0, 2: 0.0}, []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        strengths = rng.normal(0, 1, 20)
        both = thought(random_pairs(20, 4, rng), strengths, rng, bias_deviation=bias_deviation)
        single = one_order(thought(random_pairs(20, 8, rng), strengths, rng, bias_deviation=bias_deviation))
        fit = fit_strengths(20, both)
        chosen.append(better_orders(fit.reference.noise, 4))
        agreement[2] += tau(fit.strengths, strengths) / 30
        agreement[1] += tau(fit_strengths(20, single).strengths, strengths) / 30
    assert max(agreement, key=lambda way: agreement[way]) == orders
    assert chosen.count(orders) >= 27


# The trial


@pytest.mark.parametrize(("count", "comparisons", "groups"), [(4, 36, 1), (9, 36, 1), (20, 128, 2), (200, 800, 4)])
def test_a_trial_closes_cycles(count, comparisons, groups):
    pairs = trial_pairs(count, comparisons, seed=1)
    assert len(set(pairs)) == len(pairs) == 6 * groups
    assert all(0 <= a < b < count for a, b in pairs)
    assert Outcomes(count, [PairOutcome(a, b, 0.6, 0.6) for a, b in pairs]).cycles(0) == 3 * groups
    assert 2 * len(pairs) <= max(comparisons * 3 / 8, 12)
    assert pairs == trial_pairs(count, comparisons, seed=1)


def test_trials_follow_the_seed():
    assert len({tuple(trial_pairs(50, 200, seed)) for seed in range(8)}) > 1


def test_there_is_no_trial_of_few_images_or_comparisons():
    assert FEW_IMAGES >= 4
    assert trial_pairs(3, 100, 0) == trial_pairs(20, 35, 0) == []
    assert len(trial_pairs(20, 36, 0)) == 6  # 12 comparisons: a third


# One order


@given(st.integers(2, 30), st.integers(0, 1000), st.integers(1, 8))
@relaxed
def test_one_order_is_balanced(count, seed, rounds):
    """However the pairs come, in rounds too, every image is first about as often as second."""
    rng = np.random.default_rng(seed)
    pairs = [list(all_pairs(count))[k] for k in rng.permutation(count * (count - 1) // 2)]
    lead, shown = {}, []
    for part in np.array_split(np.arange(len(pairs)), rounds):
        shown += in_one_order([pairs[k] for k in part], lead)
    assert [tuple(sorted(pair)) for pair in shown] == pairs
    first, second = Counter(a for a, _ in shown), Counter(b for _, b in shown)
    assert all(lead.get(image, 0) == first[image] - second[image] for image in range(count))
    assert max(abs(first[image] - second[image]) for image in range(count)) <= 2


def test_equal_leads_favour_neither_number():
    shown = in_one_order([(2 * k, 2 * k + 1 + 2 * (k % 2)) for k in range(0, 400, 2)], {})
    shown += in_one_order(random_pairs(40, 1, np.random.default_rng(0)), {})
    share = np.mean([a < b for a, b in shown[200:]])
    assert 0.2 < share < 0.8

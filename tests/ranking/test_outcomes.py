"""Answers as numbers: what is refused, which are votes, and how many cycles their pairs close."""

import numpy as np
import pytest
from hypothesis import given
from scipy.special import expit

from mlxpref.errors import DataError
from mlxpref.ranking.outcomes import Outcomes, PairOutcome, all_pairs
from tests.ranking.simulation import judged_sets, outcomes_of, random_pairs, relaxed, thought, voted


def test_the_soft_preference_of_an_outcome():
    assert PairOutcome(0, 1, 0.7, None).p_a == pytest.approx(0.7)
    assert PairOutcome(0, 1, float("nan"), 0.6).p_a == pytest.approx(0.6)
    assert PairOutcome(0, 1, None, None).p_a is None


@pytest.mark.parametrize(
    "outcome",
    [
        PairOutcome(0, 3, 0.5, 0.5),
        PairOutcome(-1, 0, 0.5, 0.5),
        PairOutcome(1, 1, 0.5, 0.5),
        PairOutcome(0, 1, 1.5, None),
        PairOutcome(0, 1, 0.5, -0.1),
        PairOutcome(0, 1, 0.5, 0.5, instrument=-1),
        PairOutcome(0, 1, 0.5, 0.5, instrument=10),
    ],
)
def test_impossible_outcomes_are_named(outcome):
    with pytest.raises(DataError, match=r"1 of 2 pairs cannot be ranked.*from 0 to 2"):
        Outcomes(3, [PairOutcome(0, 1, 0.5, 0.5), outcome])


def test_one_image_is_no_ranking():
    with pytest.raises(DataError, match="at least two images"):
        Outcomes(1, [])


def test_all_pairs_is_the_round_robin():
    assert list(all_pairs(4)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert list(all_pairs(1)) == []


# Votes


def votes_of(count, outcomes):
    return Outcomes(count, outcomes).are_votes(0)


@pytest.mark.parametrize("votes", [1, 3, 8])
@pytest.mark.parametrize("margin", [0.0, 1e-4])
def test_shares_are_votes(votes, margin):
    """Exactly, and as a data set keeps them, 1e-4 from 0 and 1; with an order missing here and there, too."""
    rng = np.random.default_rng(votes)
    outcomes = voted(random_pairs(20, 6, rng), rng.normal(0, 2, 20), rng, votes)
    clipped = np.clip([[o.p_a_shown_first, o.p_a_shown_second] for o in outcomes], margin, 1 - margin)
    clipped[0, ::5] = np.nan
    assert votes_of(20, outcomes_of([(o.a, o.b) for o in outcomes], *clipped.T))


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0, 40.0])
def test_log_odds_are_no_votes(scale):
    """A judge's probabilities, even where nearly all are within 1e-4 of 0 or 1."""
    rng = np.random.default_rng(1)
    assert not votes_of(20, thought(random_pairs(20, 6, rng), rng.normal(0, 2, 20), rng, scale=scale))


def test_shares_without_a_sure_one_are_no_votes():
    """Nothing of .5 says that it is a share of two; an instrument without an answer has no votes either."""
    assert not votes_of(2, [PairOutcome(0, 1, 0.5, 0.5)])
    assert not votes_of(2, [PairOutcome(0, 1, None, None)])


def test_every_instrument_has_its_own_kind():
    data = Outcomes(3, [PairOutcome(0, 1, 1.0, 0.0), PairOutcome(0, 2, 0.5, 0.5), PairOutcome(0, 1, 0.9, 0.83, 1)])
    assert data.are_votes(0)
    assert not data.are_votes(1)


def test_saturated_answers_of_a_judge_are_votes_only_if_exact():
    """Answers of 1e-5 are near no share exactly, and hardly one is given twice."""
    rng = np.random.default_rng(2)
    p = expit(rng.choice([-1, 1], (2, 30)) * rng.uniform(10, 20, (2, 30)))
    assert not votes_of(12, outcomes_of(random_pairs(12, 5, rng), *p))
    assert votes_of(12, outcomes_of(random_pairs(12, 5, rng), *np.round(p)))


# Cycles


def islands(count, pairs):
    """The number of connected components, by joining one pair after another."""
    parent = list(range(count))

    def root(image):
        while parent[image] != image:
            image = parent[image]
        return image

    for a, b in pairs:
        parent[root(a)] = root(b)
    return sum(root(image) == image for image in range(count))


@given(judged_sets())
@relaxed
def test_cycles_are_the_pairs_that_join_no_islands(judged):
    count, outcomes = judged
    data = Outcomes(count, outcomes)
    answered = [o for o in outcomes if o.p_a is not None]
    whole = len(answered) - count + islands(count, [(o.a, o.b) for o in answered])
    for number in range(data.instruments):
        others = [(o.a, o.b) for o in answered if o.instrument != number]
        assert data.cycles(number) == whole - (len(others) - count + islands(count, others))


def test_cycles_of_known_designs():
    def cycles(count, pairs):
        return Outcomes(count, [PairOutcome(a, b, 0.6, 0.6) for a, b in pairs]).cycles(0)

    assert cycles(2, [(0, 1)]) == 0
    assert cycles(2, [(0, 1), (1, 0)]) == 1
    assert cycles(5, [(0, 1), (1, 2), (3, 4)]) == 0
    assert cycles(4, all_pairs(4)) == 3

"""Probabilities as log-odds, and the rule that combines both orders."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from mlxpref.ranking.log_odds import combine_orders, log_odds, probability, soft_preference
from tests.ranking.simulation import PROBABILITIES, relaxed


def test_soft_preference_is_the_mean_in_log_odds():
    assert soft_preference(0.8, 0.8) == pytest.approx(0.8)
    assert soft_preference(expit(1.0 + 0.7), expit(1.0 - 0.7)) == pytest.approx(expit(1.0))
    assert soft_preference(0.9, 0.1) == 0.5  # only the place decides
    assert soft_preference([0.2, 0.9], 0.5).shape == (2,)


@given(PROBABILITIES, PROBABILITIES)
@relaxed
def test_soft_preference_is_antisymmetric(first, second):
    assert soft_preference(1 - second, 1 - first) == 1 - soft_preference(first, second)


def test_soft_preference_of_certainty_is_finite():
    assert 1 - 1e-11 < soft_preference(1, 1) < 1
    assert 0 < soft_preference(0.0, 0.0) < 1e-11
    assert soft_preference(np.float32(1), np.float32(0)) == 0.5


def test_a_missing_order():
    assert combine_orders(0.7, None) == combine_orders(0.7, float("nan")) == pytest.approx(0.7)
    assert combine_orders(None, 0.6) == pytest.approx(0.6)
    assert combine_orders(float("nan"), None) is None
    both = soft_preference([0.7, np.nan, np.nan, 0.9], [np.nan, 0.6, np.nan, 0.1])
    np.testing.assert_allclose(both, [0.7, 0.6, np.nan, 0.5])


@given(PROBABILITIES, st.floats(-50, 50))
@relaxed
def test_log_odds_and_probability(p, x):
    assert log_odds(1 - p) == -log_odds(p)
    assert probability(-x) == 1 - probability(x)
    assert probability(log_odds(p)) == pytest.approx(p, abs=1e-11)
    assert probability(x) == pytest.approx(expit(x), abs=1e-15)

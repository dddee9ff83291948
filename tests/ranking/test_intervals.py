import numpy as np
import pytest
from scipy.stats import binomtest

from mlxpref.ranking.intervals import difference_interval, share_interval, widest


@pytest.mark.parametrize("of", [1, 7, 400])
def test_shares_against_scipy(of: int) -> None:
    for count in {0, 1, of // 2, of}:
        expected = binomtest(count, of).proportion_ci(method="wilson")
        assert share_interval(count, of) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_differences_cover_what_they_say() -> None:
    """Of 4,000 draws of 40 pairs, about 95 in 100 intervals hold the true difference."""
    rng, shares = np.random.default_rng(0), (0.25, 0.1, 0.65)
    counts = rng.multinomial(40, shares, 4000)
    intervals = np.array([difference_interval(one, other, 40) for one, other, _ in counts])
    held = (intervals[:, 0] <= 0.15) & (intervals[:, 1] >= 0.15)
    assert 0.93 < held.mean() < 0.98
    low, high = difference_interval(0, 0, 3)
    assert -1 <= low < 0 < high <= 1


def test_the_widest_of_several() -> None:
    assert widest((0.2, 0.5), (0.3, 0.6)) == (0.2, 0.6)

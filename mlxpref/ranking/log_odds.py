"""Probabilities as log-odds, and the rule that combines the two orders of a pair into one preference."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

Array = NDArray[np.float64]

PROBABILITY_MARGIN = 2.0**-40  # log-odds are taken of probabilities at least this far (9e-13) from 0 and 1


def log_odds(p: ArrayLike) -> Array:
    """Log-odds of probabilities, any shape -> the same shape, in nats; NaN stays NaN.

    Exactly antisymmetric: `log_odds(1 - p)` is `-log_odds(p)` to the last bit, because 1 - (1 - p) is exactly p for the
    rounded values of `against`.
    """
    against = 1 - np.clip(np.asarray(p, np.float64), PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN)
    return np.asarray(np.log(1 - against) - np.log(against))


def probability(x: ArrayLike) -> Array:
    """The probability for log-odds, any shape -> the same shape; NaN stays NaN. Exactly antisymmetric, too."""
    larger = expit(np.abs(np.asarray(x, np.float64)))
    return np.asarray(np.where(np.less(x, 0), 1 - larger, larger))  # 1 - larger is exact: larger is at least 0.5


def soft_preference(p_a_shown_first: ArrayLike, p_a_shown_second: ArrayLike) -> Array:
    """The preference for a over both orders: the mean of their log-odds, which cancels an additive position bias.

    Both arguments are P(a preferred), of shapes that broadcast. NaN is a missing order: the result is the other order,
    with its position bias, or NaN if both are missing. Exactly antisymmetric: with a and b exchanged,
    `soft_preference(1 - p_a_shown_second, 1 - p_a_shown_first)` gives 1 minus the result to the last bit.
    """
    first, second = np.broadcast_arrays(log_odds(p_a_shown_first), log_odds(p_a_shown_second))
    first, second = np.where(np.isnan(first), second, first), np.where(np.isnan(second), first, second)
    return probability((first + second) / 2)


def combine_orders(p_a_shown_first: float | None, p_a_shown_second: float | None) -> float | None:
    """`soft_preference` of one pair, where None (or NaN) is a missing order; None where both are missing."""
    p_a = float(soft_preference(*(np.nan if p is None else p for p in (p_a_shown_first, p_a_shown_second))))
    return None if np.isnan(p_a) else p_a

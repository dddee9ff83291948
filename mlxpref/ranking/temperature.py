"""A temperature and a position bias that rescale a judge's probabilities to the shares of people."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlxpref.ranking.log_odds import PROBABILITY_MARGIN, log_odds, probability

Array = NDArray[np.float64]

COLDEST, HOTTEST = 0.01, 100.0  # the bounds of a temperature: log-odds never change their sign
EVEN = 1e-9  # log-odds below this are rounding
MAX_LOG_ODDS = math.log(1 / PROBABILITY_MARGIN - 1)


@dataclass(frozen=True)
class TemperatureScaling:
    """Log-odds of the first image x become (x - position_bias) / temperature.

    Where both orders of a pair are combined in log-odds the bias cancels, so the soft preference depends on the
    temperature alone; above 1 it comes nearer to 0.5. The position bias is above 0 if the judge favours the first
    image.
    """

    temperature: float = 1.0
    position_bias: float = 0.0

    def p_first(self, p_first: ArrayLike) -> Array:
        """The judge's preferences for the first image -> the rescaled ones; NaN stays NaN."""
        x = (log_odds(p_first) - self.position_bias) / self.temperature
        return probability(np.clip(x, -MAX_LOG_ODDS, MAX_LOG_ODDS))


def fit_temperature(p_a_shown_first: ArrayLike, p_a_shown_second: ArrayLike, p_people: ArrayLike) -> TemperatureScaling:
    """The scaling of N >= 1 pairs by maximum likelihood, all arguments (N,) and about image a.

    The temperature minimises the cross-entropy between the share of people and the soft preference over both orders; it
    is convex in 1 / temperature. Shares are moved towards 0.5 as by two more answers among the N, one for either side
    (Platt 1999), which bounds the fit where the judge is always right. A judge that is no better than chance gets
    `HOTTEST`; a judge whose soft preferences are all even gets 1.

    The position bias then minimises the cross-entropy of the 2 N comparisons. There the images that people prefer are
    first as often as second, so that with this bias the first image wins as often as the second.

    The scaling exactly undoes a constant added to the log-odds of first images, and a factor of all log-odds.
    """
    shown_first, shown_second = log_odds(p_a_shown_first), log_odds(p_a_shown_second)
    pair, count = (shown_first + shown_second) / 2, len(shown_first)
    people = (count * np.asarray(p_people, np.float64) + 1) / (count + 2)

    def too_steep(log_slope: float) -> float:
        return float(pair @ (probability(np.exp(log_slope) * pair) - people))

    even = bool((np.abs(pair) < EVEN).all())
    log_slope = 0.0 if even else _root(too_steep, -math.log(HOTTEST), -math.log(COLDEST))
    temperature = min(max(math.exp(-log_slope), COLDEST), HOTTEST)
    first = np.concatenate([shown_first, -shown_second])  # (2 N,) log-odds of the image that was shown first

    def too_high(bias: float) -> float:
        return float((0.5 - probability((first - bias) / temperature)).sum())

    return TemperatureScaling(temperature, _root(too_high, float(first.min()), float(first.max())))


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """The root of a rising function, or the nearest end of the interval if the root is outside."""
    from scipy.optimize import brentq

    if rising(low) >= 0:
        return low
    return high if rising(high) <= 0 else float(brentq(rising, low, high, xtol=1e-14))

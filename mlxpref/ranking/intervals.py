"""Confidence intervals of a share, and of the difference of two shares of the same pairs."""

import math

_Z = 1.959964
"""The normal quantile of a 95 % interval."""


def share_interval(count: float, of: float) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); from 0 to 1 where `of` is 0.

    Counts may be fractions: half a credit, or the number of independent pairs that weighted ones amount to.
    """
    if not of:
        return 0.0, 1.0
    share, shrink = count / of, 1 + _Z**2 / of
    centre = (share + _Z**2 / (2 * of)) / shrink
    half = _Z / shrink * math.sqrt(max(0.0, share * (1 - share)) / of + (_Z / (2 * of)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_interval(only_one: int, only_other: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a difference of shares of the same pairs (Agresti and Min 2005).

    `only_one` and `only_other` of the pairs count for one share alone. It is never without width.
    """
    one, other = ((count + 0.5) / (of + 2) for count in (only_one, only_other))
    half = _Z * math.sqrt((one + other - (one - other) ** 2) / (of + 2))
    return max(-1.0, one - other - half), min(1.0, one - other + half)


def widest(*intervals: tuple[float, float]) -> tuple[float, float]:
    """The interval from the least of the lower bounds to the greatest of the upper ones."""
    return min(low for low, _ in intervals), max(high for _, high in intervals)

"""Rewards: what a rollout earns for agreeing with people, as pure functions of arrays.

y is the share of people who prefer the first image shown, P1 and P2 the probabilities of the labels at the answer
position; all of one shape. `soft` and `brier` integrate the answer out: they depend on P1 and P2, not on a sampled
answer, and their gradient through P1 and P2 is taken exactly (see `grpo`).
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXACT_REWARDS", "brier_reward", "hard_reward", "score_reward", "soft_reward"]

T = TypeVar("T")
"""A number, or an array of NumPy or MLX: plain arithmetic works on all, and MLX differentiates through it."""


def soft_reward(p1: T, p2: T, y: T, format_weight: float = 0.0) -> T:
    """The expected agreement with people: `w (P1 + P2) + P1 y + P2 (1 - y)`.

    Not normalised: probability outside the labels is lost. It teaches the better side.
    """
    return format_weight * (p1 + p2) + p1 * y + p2 * (1 - y)  # type: ignore[operator, no-any-return]


def brier_reward(p1: T, p2: T, y: T, format_weight: float = 0.0) -> T:
    """A proper score: `(P1 + P2) (w + 1 - (P1 / (P1 + P2) - y)^2)`; it teaches calibrated probabilities (Brier 1950).

    P1 + P2 must be above 0.
    """
    mass = p1 + p2  # type: ignore[operator]
    return mass * (format_weight + 1 - (p1 / mass - y) ** 2)  # type: ignore[no-any-return]


EXACT_REWARDS: dict[str, Callable[..., object]] = {"soft": soft_reward, "brier": brier_reward}
"""The rewards that are functions of the labels' probabilities, so differentiable through them."""


def hard_reward(
    answer: NDArray[np.int64], y: NDArray[np.float64], well_formed: NDArray[np.bool_], format_weight: float = 0.0
) -> NDArray[np.float64]:
    """1 where the written answer (1, 2, or 0 for unreadable) is the majority's, plus w where the form is right.

    An unreadable answer earns 0.
    """
    agrees = ((answer == 1) & (y > 0.5)) | ((answer == 2) & (y < 0.5))
    return np.where(answer > 0, agrees + format_weight * well_formed, 0.0)


def score_reward(
    margin: NDArray[np.float64], y: NDArray[np.float64], well_formed: NDArray[np.bool_], format_weight: float = 0.0
) -> NDArray[np.float64]:
    """1 where the written scores' margin (first minus second, NaN for unreadable) has the majority's sign, plus w.

    An unreadable completion earns 0, an even one only its form.
    """
    agrees = np.sign(margin) == np.sign(y - 0.5)
    return np.where(np.isnan(margin), 0.0, agrees + format_weight * well_formed)

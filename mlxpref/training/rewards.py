"""Rewards: what a rollout earns for agreeing with people, as pure functions of arrays, and mixes of several.

y is the share of people who prefer the first image shown, P1 and P2 the probabilities of the labels at the answer
position; all of one shape. `soft` and `brier` integrate the answer out: they depend on P1 and P2, not on a sampled
answer, and their gradient through P1 and P2 is taken exactly (see `grpo`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlxpref.errors import ConfigError

__all__ = [
    "BUILT_IN_REWARDS",
    "EXACT_REWARDS",
    "RewardMix",
    "RewardPart",
    "brier_reward",
    "hard_reward",
    "length_reward",
    "reward_mix",
    "score_reward",
    "soft_reward",
]

T = TypeVar("T")
"""A number, or an array of NumPy or MLX: plain arithmetic works on all, and MLX differentiates through it."""

BUILT_IN_REWARDS = ("soft", "brier", "hard", "score")


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


def length_reward(tokens: NDArray[np.int64], budget: int, longest: int) -> NDArray[np.float64]:
    """0 up to a budget of tokens, from there falling evenly to -1 at the longest that a completion may be.

    The soft overlong punishment of DAPO, arXiv 2503.14476. The budget must be below the longest.
    """
    return -np.clip((tokens - budget) / (longest - budget), 0.0, 1.0)


@dataclass(frozen=True)
class RewardPart:
    """One reward of a mix: one of ours, or a `file.py:function`."""

    name: str
    weight: float


@dataclass(frozen=True)
class RewardMix:
    """The rewards whose weighted sum a rollout earns.

    Where one of them integrates the answer out (`exact`), completions end at the answer position: `soft` and `brier`
    get their exact gradient there, and rewards of one's own, which see the reasons and the labels' probabilities but no
    written answer, reach the reasons by the policy gradient. Where none does, answers are written.
    """

    parts: tuple[RewardPart, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names, in their order."""
        return tuple(part.name for part in self.parts)

    @property
    def own(self) -> tuple[str, ...]:
        """The names of the rewards that are not ours."""
        return tuple(name for name in self.names if name not in BUILT_IN_REWARDS)

    @property
    def exact(self) -> bool:
        """Whether the answer is integrated out."""
        return any(name in EXACT_REWARDS for name in self.names)

    def integrated(self, p1: T, p2: T, y: T, format_weight: float = 0.0) -> T:
        """The weighted sum of the rewards that are functions of the labels' probabilities; there must be one."""
        exact = [part for part in self.parts if part.name in EXACT_REWARDS]
        earned: list[Any] = [EXACT_REWARDS[part.name](p1, p2, y, format_weight) for part in exact]
        terms = [part.weight * each for part, each in zip(exact, earned, strict=True)]
        return sum(terms[1:], terms[0])  # type: ignore[no-any-return]


@lru_cache
def reward_mix(text: str) -> RewardMix:
    """The rewards that `--reward` names: `soft`, or several with weights, `soft=1,own.py:kind=0.5`.

    Commas stand between rewards; what follows the last `=` of one is its weight, by default 1. ConfigError where a
    weight is no number above 0, a name comes twice, or two rewards read completions in ways that exclude each other.
    """
    parts = []
    for each in text.split(","):
        name, equals, number = each.strip().rpartition("=")
        name, number = (name.strip(), number) if equals else (each.strip(), "1")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"reward {text!r}: {each.strip()!r} is not a name or name=weight with a weight above 0")
        parts.append(RewardPart(name, weight))
    mix = RewardMix(tuple(parts))
    if len(set(mix.names)) < len(parts):
        raise ConfigError(f"reward {text!r}: a reward is named twice; give each once, with its weight")
    if len({_reading(name) for name in mix.names if name in BUILT_IN_REWARDS}) > 1:
        raise ConfigError(
            f"reward {text!r}: soft and brier integrate the answer out, hard reads a written one and score two written "
            "numbers; take one of the three kinds, with rewards of your own beside it"
        )
    return mix


def _reading(name: str) -> str:
    """How one of our rewards reads completions."""
    return "exact" if name in EXACT_REWARDS else name

"""Rewards as pure functions of arrays, and mixes of several.

y is the share of people who prefer the first image shown; P1 and P2 are the probabilities of the labels at the answer
position, `mass` is P1 + P2 and `p_first` P1 / (P1 + P2). All arrays of a call have one shape. `soft` and `brier`
integrate the answer out: they depend on P1 and P2, not on a sampled answer, and the loss takes their exact gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlxpref.engine.profile import Form
from mlxpref.errors import ConfigError
from mlxpref.training.sampler import TrainingComparison
from mlxpref.verdict import Strategy, Verdict

T = TypeVar("T")
"""A number, or an array of NumPy or MLX; MLX differentiates through plain arithmetic."""
Floats = NDArray[np.float64]
CustomReward = Callable[[TrainingComparison, Sequence[Verdict]], list[float]]
"""Takes a group's comparison and its G verdicts, returns G rewards."""


def soft_reward(mass: T, p_first: T, y: T, format_weight: T) -> T:
    """Return the expected agreement with people: `w (P1 + P2) + P1 y + P2 (1 - y)`.

    It is not normalised, so probability outside the labels earns nothing. It teaches the better side.
    """
    return mass * (format_weight + p_first * y + (1 - p_first) * (1 - y))  # type: ignore[operator, no-any-return]


def brier_reward(mass: T, p_first: T, y: T, format_weight: T) -> T:
    """Return `(P1 + P2) (w + 1 - (P1 / (P1 + P2) - y)^2)`, a proper score (Brier 1950): it teaches calibration."""
    return mass * (format_weight + 1 - (p_first - y) ** 2)  # type: ignore[operator, no-any-return]


EXACT_REWARDS: dict[str, Callable[..., Any]] = {"soft": soft_reward, "brier": brier_reward}
"""The rewards that are differentiable functions of the labels' probabilities.

`mass` and `p_first` keep their gradients finite where both labels are unlikely; P1 / (P1 + P2) would not.
"""


def agreement_reward(lean: Floats, y: Floats, form: Floats) -> Floats:
    """Return 1 where a completion leans to the majority's side, plus the reward of its form: `hard` and `score`.

    `lean` is above 0 for the first image, below 0 for the second, 0 for neither; NaN is unreadable and earns 0.
    """
    agrees = np.sign(lean) == np.sign(y - 0.5)
    return np.where(np.isnan(lean), 0.0, agrees + form)


def length_reward(tokens: Floats, budget: int, longest: int) -> Floats:
    """Return 0 up to a budget of tokens, then fall linearly to -1 at the longest possible completion.

    The soft overlong punishment of DAPO, arXiv 2503.14476. The budget must be below the longest.
    """
    return -np.clip((tokens - budget) / (longest - budget), 0.0, 1.0)


class RewardPart(NamedTuple):
    """One reward of a mix: a built-in one, or a `file.py:function` with its loaded function."""

    name: str
    weight: float
    function: CustomReward | None = None


@dataclass(frozen=True)
class RewardMix:
    """The rewards whose weighted sum a rollout earns.

    If one of them integrates the answer out (`exact`), completions end at the answer position, where `soft` and `brier`
    get their exact gradient. Custom rewards then see the reasons and the labels' probabilities but no written answer,
    and act on the reasons by the policy gradient. Otherwise completions contain answers.
    """

    parts: tuple[RewardPart, ...]

    @classmethod
    def parse(cls, text: str) -> "RewardMix":
        """Return the rewards in `--reward`: `soft`, or several with weights, `soft=1,own.py:kind=0.5`.

        Commas separate rewards; the weight follows the last `=`, by default 1. ConfigError for a weight that is no
        number above 0, a repeated name, or two rewards that exclude each other.
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
                raise ConfigError(
                    f"reward {text!r}: {each.strip()!r} is not a name or name=weight with a weight above 0"
                )
            parts.append(RewardPart(name, weight))
        names = {part.name for part in parts}
        if len(names) < len(parts):
            raise ConfigError(f"reward {text!r}: a reward is named twice; give each once, with its weight")
        if bool(names & EXACT_REWARDS.keys()) + ("hard" in names) + ("score" in names) > 1:
            raise ConfigError(
                f"reward {text!r}: soft and brier integrate the answer out, hard reads a written one and score two "
                "written numbers; take one of the three kinds, with your own rewards added"
            )
        return cls(tuple(parts))

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names, in their order."""
        return tuple(part.name for part in self.parts)

    @property
    def custom(self) -> tuple[str, ...]:
        """The names of the rewards that are not built in."""
        return tuple(name for name in self.names if name not in (*EXACT_REWARDS, "hard", "score"))

    @property
    def exact(self) -> bool:
        """Whether the answer is integrated out."""
        return any(name in EXACT_REWARDS for name in self.names)

    @property
    def form(self) -> Form:
        """The form of answer that the rewards need."""
        return "scores" if "score" in self.names else "choice"

    @property
    def strategy(self) -> Strategy:
        """The strategy that reads the preference of a completion of that form."""
        return "score" if self.form == "scores" else "soft"

    @property
    def reading(self) -> "RewardMix | None":
        """The rewards of the answer that is read at once, without reasons.

        They are the mix's own that integrate the answer out; `hard` asks for the same side as `soft`. None for `score`,
        whose question asks for two numbers, and for custom rewards alone, which say by themselves what is right.
        """
        parts = [part for part in self.parts if part.name in EXACT_REWARDS]
        parts += [part._replace(name="soft") for part in self.parts if part.name == "hard"]
        return RewardMix(tuple(parts)) if parts else None

    def integrated(self, mass: T, p_first: T, y: T, format_weight: T) -> T:
        """Return the weighted sum of the rewards that are functions of the labels' probabilities; one at least."""
        exact = [part for part in self.parts if part.name in EXACT_REWARDS]
        terms = [part.weight * EXACT_REWARDS[part.name](mass, p_first, y, format_weight) for part in exact]
        return sum(terms[1:], terms[0])  # type: ignore[no-any-return]

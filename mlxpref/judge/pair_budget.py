"""How many pairs of a set of images to judge, without thinking and with it."""

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

from mlxpref.errors import ConfigError
from mlxpref.ranking.pair_selection import pair_budget

ThinkAbout = Literal["top", "all", "none"]
"""The pairs to judge with thinking: those of the TOP best images, all, or none."""
TOP = 10


@dataclass(frozen=True)
class PairBudget:
    """The numbers of pairs to judge without thinking, and then with thinking."""

    without_thinking: int
    with_thinking: int

    @classmethod
    def of(cls, count: int, think_about: ThinkAbout, pairs: int | Literal["all"] | None = None) -> "PairBudget":
        """The budget for `count` images: `pairs` of them, by default two an image.

        Of more than TOP images, "top" judges all without thinking first; the best TOP get a budget of their own.
        ConfigError for fewer than one pair, and for what is no choice.
        """
        if think_about not in get_args(ThinkAbout):
            raise ConfigError(f"think_about {think_about!r}: give {', '.join(map(repr, get_args(ThinkAbout)))}")
        if pairs not in (None, "all") and not is_count(pairs):
            raise ConfigError(f"{pairs!r} pairs cannot be judged: 1 is the least; or give 'all'")
        if think_about == "none":
            return cls(pair_budget(count, pairs), 0)
        if think_about == "all" or count <= TOP:
            return cls(0, pair_budget(count, pairs))
        return cls(pair_budget(count, pairs), pair_budget(TOP, pairs))

    @property
    def modes(self) -> list[bool]:
        """Whether there are pairs to judge without thinking and with thinking."""
        return [think for think, count in ((False, self.without_thinking), (True, self.with_thinking)) if count]

    @property
    def total(self) -> int:
        """All pairs together."""
        return self.without_thinking + self.with_thinking


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1

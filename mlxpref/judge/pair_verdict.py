"""What the judge says of a pair: every completion of both orders, and the preference for a read from them."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlxpref.ranking.bradley_terry import PairOutcome
from mlxpref.ranking.log_odds import soft_preference
from mlxpref.ranking.temperature import TemperatureScaling
from mlxpref.verdict import Strategy, Verdict

__all__ = ["PairVerdict"]


@dataclass(frozen=True)
class PairVerdict:
    """What the judge says of a pair: every completion of both orders, and the preferences read from them.

    Completions are as they were said; `rescaling` is applied to what is read from those of an order together.
    """

    a_shown_first: tuple[Verdict, ...]
    a_shown_second: tuple[Verdict, ...]
    strategy: Strategy = "soft"
    rescaling: TemperatureScaling | None = None

    @property
    def p_a_shown_first(self) -> float | None:
        """The preference for a where it was shown first, averaged over samples; None where unreadable."""
        return self._p_first(self.a_shown_first)

    @property
    def p_a_shown_second(self) -> float | None:
        """The preference for a where it was shown second, averaged over samples; None where unreadable."""
        p_b = self._p_first(self.a_shown_second)
        return None if p_b is None else 1.0 - p_b

    @property
    def p_a(self) -> float:
        """The soft preference: both orders combined in log-odds; the one that can be read; or 0.5."""
        orders = [p for p in (self.p_a_shown_first, self.p_a_shown_second) if p is not None]
        return float(soft_preference(orders[0], orders[-1])) if orders else 0.5

    def outcome(self, a: int, b: int) -> PairOutcome:
        """What this says for a ranking in which the pair's images have the numbers a and b."""
        return PairOutcome(a, b, self.p_a_shown_first, self.p_a_shown_second)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Every completion, those with a shown first before the others."""
        return self.a_shown_first + self.a_shown_second

    def _p_first(self, verdicts: Sequence[Verdict]) -> float | None:
        read = [p for verdict in verdicts if (p := verdict.p_first(self.strategy)) is not None]
        if not read:
            return None
        mean = sum(read) / len(read)
        return mean if self.rescaling is None else float(self.rescaling.p_first(mean))

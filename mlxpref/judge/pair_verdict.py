"""The verdict on a pair: every completion of both orders, and the preference for a."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlxpref.judge.notebook import pair_html
from mlxpref.preferences import Pair
from mlxpref.ranking.log_odds import combine_orders
from mlxpref.ranking.outcomes import PairOutcome
from mlxpref.ranking.temperature import TemperatureScaling
from mlxpref.verdict import Strategy, Verdict


@dataclass(frozen=True)
class PairVerdict:
    """The verdict on a pair: every completion of both orders, and the preferences that follow from them.

    Completions are not rescaled; `rescaling` applies to the mean of an order's samples. `recalled` says for each order
    whether a store had it. `pair` are the images and the prompt, if `Judge.compare` made this. An order has no
    completions if it was not asked, both have none if an image could not be read.
    """

    a_shown_first: tuple[Verdict, ...]
    a_shown_second: tuple[Verdict, ...]
    strategy: Strategy = "soft"
    rescaling: TemperatureScaling | None = None
    recalled: tuple[bool, bool] = field(default=(False, False), compare=False)
    pair: Pair | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        orders = [p if p is None else round(p, 4) for p in (self.p_a_shown_first, self.p_a_shown_second)]
        return f"PairVerdict(p_a={self.p_a:.4f}, p_a_shown_first={orders[0]}, p_a_shown_second={orders[1]})"

    def _repr_html_(self) -> str:
        return pair_html(self)

    @property
    def is_left_out(self) -> bool:
        """Whether an image could not be read."""
        return not (self.a_shown_first or self.a_shown_second)

    @property
    def is_in_both_orders(self) -> bool:
        """Whether both orders were asked."""
        return bool(self.a_shown_first and self.a_shown_second)

    @property
    def is_readable(self) -> bool:
        """Whether an order has a readable answer."""
        return self.p_a_shown_first is not None or self.p_a_shown_second is not None

    def swapped(self) -> "PairVerdict":
        """The same verdict with a and b exchanged."""
        pair = self.pair and Pair(self.pair.b, self.pair.a, self.pair.prompt)
        orders, recalled = (self.a_shown_second, self.a_shown_first), (self.recalled[1], self.recalled[0])
        return replace(self, a_shown_first=orders[0], a_shown_second=orders[1], recalled=recalled, pair=pair)

    def joined(self, other: "PairVerdict") -> "PairVerdict":
        """This verdict with the other one's answers for the order that it lacks."""
        first = self.a_shown_first or other.a_shown_first
        second = self.a_shown_second or other.a_shown_second
        recalled = tuple(mine or theirs for mine, theirs in zip(self.recalled, other.recalled, strict=True))
        return replace(self, a_shown_first=first, a_shown_second=second, recalled=(recalled[0], recalled[1]))

    @property
    def p_a_shown_first(self) -> float | None:
        """The mean preference for a over samples that show it first; None if unreadable."""
        return self._p_first(self.a_shown_first)

    @property
    def p_a_shown_second(self) -> float | None:
        """The mean preference for a over samples that show it second; None if unreadable."""
        p_b = self._p_first(self.a_shown_second)
        return None if p_b is None else 1.0 - p_b

    @property
    def p_a(self) -> float:
        """The soft preference for a, see `combine_orders`; 0.5 where neither order can be read."""
        if self.p_a_shown_first is not None and self.p_a_shown_first == self.p_a_shown_second:
            return self.p_a_shown_first  # also a certain one, whose log-odds are not finite
        p_a = combine_orders(self.p_a_shown_first, self.p_a_shown_second)
        return 0.5 if p_a is None else p_a

    @property
    def p_tie(self) -> float | None:
        """The probability of a tie, the mean over all readable completions; None for a judge that calls none."""
        shares = [each.p_label_tie / each.label_mass for each in self.verdicts if each.label_mass > 0]
        return sum(shares) / len(shares) if any(shares) else None

    @property
    def scores(self) -> tuple[float, float] | None:
        """The scores of a and b by a judge of single images, the mean over its samples; None for any other judge."""
        read = [each.scores for each in self.a_shown_first if each.scores is not None]
        read += [each.scores[::-1] for each in self.a_shown_second if each.scores is not None]
        return (sum(a for a, _ in read) / len(read), sum(b for _, b in read) / len(read)) if read else None

    def to_json(self) -> dict[str, Any]:
        """The pair's JSON, without the images' names; with `p_tie` and `scores` where the judge gives these."""
        return {
            "p_a": self.p_a,
            "p_a_shown_first": self.p_a_shown_first,
            "p_a_shown_second": self.p_a_shown_second,
            **({} if self.p_tie is None else {"p_tie": self.p_tie}),
            **({} if self.scores is None else {"scores": self.scores}),
            "reasons": [verdict.reasoning for verdict in self.verdicts],
        }

    def outcome(self, a: int, b: int, instrument: int = 0) -> PairOutcome:
        """The outcome for a ranking where the pair's images have the numbers a and b."""
        return PairOutcome(a, b, self.p_a_shown_first, self.p_a_shown_second, instrument)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Every completion, those with a shown first before the others."""
        return self.a_shown_first + self.a_shown_second

    def _p_first(self, verdicts: Sequence[Verdict]) -> float | None:
        readable = [p for verdict in verdicts if (p := verdict.p_first(self.strategy)) is not None]
        if not readable:
            return None
        mean = sum(readable) / len(readable)
        return mean if self.rescaling is None else float(self.rescaling.p_first(mean))


@dataclass(frozen=True)
class JudgingCounts:
    """The work of judging: comparisons judged now, comparisons from a store, and tokens written now."""

    comparisons: int = 0
    recalled: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, verdicts: Iterable[PairVerdict]) -> "JudgingCounts":
        """The counts of pairs."""
        orders = [
            (recalled, completions)
            for verdict in verdicts
            for recalled, completions in zip(
                verdict.recalled, (verdict.a_shown_first, verdict.a_shown_second), strict=True
            )
            if completions
        ]
        new = [completions for recalled, completions in orders if not recalled]
        tokens = sum(completion.tokens for completions in new for completion in completions)
        return cls(len(new), len(orders) - len(new), tokens)

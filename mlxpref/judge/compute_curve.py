"""Test-time compute: how often a judge agrees with people, by the tokens that it writes about a pair.

A setting is a number of samples and a bound on their tokens, or an answer without thinking. A point with one sample is
greedy, those with several are sampled, so between 1 and 2 the line changes both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlxpref.judge.strategies import StrategyRow, StrategyVariant
from mlxpref.text import counted


@dataclass(frozen=True)
class ComputePoint:
    """A setting with the mean number of tokens it writes about a pair, in both orders, and its accuracy.

    `low` to `high` is the accuracy's 95 % interval. All are shares.
    """

    variant: StrategyVariant
    tokens: float
    accuracy: float
    low: float
    high: float

    @classmethod
    def of(cls, row: StrategyRow) -> "ComputePoint":
        """The point of a measured variant."""
        tokens, metrics = row.evaluation.tokens_per_pair, row.evaluation.metrics
        return cls(row.variant, tokens, metrics.accuracy, metrics.accuracy_low, metrics.accuracy_high)


def varies_compute(variants: Iterable[StrategyVariant]) -> bool:
    """Whether variants think with several numbers of samples or several bounds on tokens."""
    return len({(variant.samples, variant.max_tokens) for variant in variants if variant.think}) > 1


def frontier(points: Iterable[ComputePoint]) -> list[ComputePoint]:
    """The points, from few tokens to many, that are more accurate than every one with at most as many tokens."""
    best: list[ComputePoint] = []
    for point in sorted(points, key=lambda each: (each.tokens, -each.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def lines(points: Sequence[ComputePoint]) -> dict[str, list[ComputePoint]]:
    """The points that write anything, by the name of their line, in the order of their settings.

    A line is a number of samples with every bound on tokens; with one bound it is all numbers of samples. Answers
    without thinking that write something have a line of their own.
    """
    named: dict[str, list[ComputePoint]] = {}
    several = _several_bounds(points)
    for point in sorted(points, key=lambda each: (each.variant.samples, each.variant.max_tokens or 0)):
        if point.tokens > 0:
            thinking = _samples(point.variant) if several else "thinking"
            named.setdefault(thinking if point.variant.think else "without thinking", []).append(point)
    return named


def settings_of_marks(points: Sequence[ComputePoint]) -> dict[StrategyVariant, str]:
    """What tells the points of one line apart, in words: the bound on tokens, or where it is one, the samples."""
    several = _several_bounds(points)
    ordered = sorted(
        {p.variant for p in points if p.variant.think}, key=lambda each: (each.max_tokens or 0, each.samples)
    )
    return {each: f"up to {each.max_tokens} tokens" if several else _samples(each) for each in ordered}


def _several_bounds(points: Sequence[ComputePoint]) -> bool:
    return len({point.variant.max_tokens for point in points if point.variant.think}) > 1


def _samples(variant: StrategyVariant) -> str:
    return counted(variant.samples, "sample") + (", greedy" if variant.samples == 1 else "")

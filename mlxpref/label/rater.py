"""What a rater's answers say of the rater: how often a repeated one is the same, and when there are enough to train.

A judge is measured on held-out answers, and cannot agree with them more often than the rater does. From the share of
repeats that agree follows how often a single answer is what the rater holds, and from that how many held-out answers
show what a judge learned. What a judge needs to learn depends on the judge and the taste: the demo judge learned a rule
from a dozen answers (scripts/label_loop.py), of a real one nothing was measured.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mlxpref.label.records import TEST, Record, pair_of
from mlxpref.metrics import share_interval
from mlxpref.ranking import Z95

__all__ = ["Consistency", "Enough", "consistency", "enough", "explained"]

_ERROR = 0.1
"""How well the accuracy of a judge is to be known at least: the half width of its 95 % interval."""
_POWER = 0.8416212335729143  # the normal quantile of 80 %: how surely the difference is found if it is there
_PRIOR_AGREED, _PRIOR_REPEATS = 4, 5  # what is believed of a rater who has repeated nothing yet
_MOST_RELIABLE, _LEAST_RELIABLE = 0.98, 0.55
_SHARE = 0.2  # of a labelling that holds nothing out: whoever measures takes about that


@dataclass(frozen=True)
class Consistency:
    """How many of the repeated answers were the same as the first one, and the 95 % interval of that share."""

    agreed: int
    repeats: int
    low: float
    high: float

    @property
    def reliability(self) -> float:
        """How often a single answer is what the rater holds, from 0.5 for guessing to nearly 1.

        Two answers agree if both or neither is: q^2 + (1 - q)^2. Few repeats are taken with a prior of 4 in 5.
        """
        agreement = (self.agreed + _PRIOR_AGREED) / (self.repeats + _PRIOR_REPEATS)
        return min((1 + math.sqrt(max(2 * agreement - 1, 0.0))) / 2, _MOST_RELIABLE)


@dataclass(frozen=True)
class Enough:
    """Whether there is enough to train and measure a judge, and the numbers that say why.

    Of `decided` pairs, `held_out` measure; `needed` are wanted in all, None where no number would do. `error` is the
    half width of the 95 % interval of a judge's accuracy on the held-out pairs, if it is as reliable as the rater.
    """

    decided: int
    needed: int | None
    held_out: int
    reliability: float
    error: float

    @property
    def reached(self) -> bool:
        """Whether nothing more is wanted."""
        return self.needed is not None and self.decided >= self.needed


def consistency(records: Iterable[Record]) -> Consistency:
    """How often answers to a pair that was asked again were the same, ties included; of standing records."""
    firsts: dict[tuple[str, str, str], str] = {}
    agreed = repeats = 0
    for record in records:
        if record.p_a is None:
            continue
        if pair_of(record) in firsts:
            repeats += 1
            agreed += firsts[pair_of(record)] == record.answer
        else:
            firsts[pair_of(record)] = record.answer
    return Consistency(agreed, repeats, *share_interval(agreed, repeats))


def enough(records: Iterable[Record], held_out: float) -> Enough:
    """Whether standing records are enough to train with and to measure; `held_out` is the share that measures.

    Wanted are so many held-out pairs that the accuracy of a judge as reliable as the rater is known to ten points, and
    that it is told from one that guesses, by a 95 % interval and in 80 % of cases.
    """
    records = list(records)
    shares: dict[tuple[str, str, str], list[float]] = {}
    tests = set()
    for record in records:
        if record.p_a is not None:
            shares.setdefault(pair_of(record), []).append(record.p_a)
            tests |= {pair_of(record)} if record.split == TEST else set()
    decided = {pair for pair, said in shares.items() if sum(said) != len(said) / 2}
    tested = len(decided & tests)
    q = consistency(records).reliability
    needed = None
    if q >= _LEAST_RELIABLE:
        root = (Z95 * 0.5 + _POWER * math.sqrt(q * (1 - q))) / (q - 0.5)
        needed = math.ceil(max(root**2, (Z95 / _ERROR) ** 2 * q * (1 - q)) / (held_out or _SHARE))
    error = Z95 * math.sqrt(q * (1 - q) / tested) if tested else math.nan
    return Enough(len(decided), needed, tested, q, error)


def explained(found: Enough, repeated: Consistency, every: int) -> str:
    """Why so many pairs are wanted, in sentences with the numbers that it follows from; `every` pairs there are."""
    said = (
        f"You gave the same answer to {repeated.agreed} of {repeated.repeats} repeated pairs"
        if repeated.repeats
        else "No pair was repeated yet"
    )
    if found.needed is None:
        return f"{said}, no more than by chance: there is nothing in them yet that a judge could learn."
    best = f"{100 * found.reliability:.0f}\u00a0%"
    assumed = "" if repeated.repeats else " by what is usual"
    text = f"{said}: a judge can agree with about {best} of your answers at most{assumed}."
    text += (
        f" {found.needed} pairs are wanted so that those held out tell it from guessing, and show it to \u00b110 points"
    )
    text += f"; the {found.held_out} so far show it to \u00b1{100 * found.error:.0f}." if found.held_out else "."
    if found.needed > every:
        text += f" These pictures have only {every} pairs: add more of them."
    return text

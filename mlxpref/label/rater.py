"""The rater's consistency over repeated answers, and the number of answers that training needs.

A judge is measured on held-out answers, and cannot agree with them more often than the rater does. The share of repeats
that agree gives the reliability of a single answer, and this gives the number of held-out answers that show what a
judge learned. How many answers a judge needs to learn depends on the judge and the taste: the demo judge learned a rule
from a dozen (scripts/label_loop.py); no real judge was measured.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from mlxpref.data.label_file import TEST, LabelRecord
from mlxpref.ranking.bradley_terry import Z95
from mlxpref.ranking.intervals import share_interval

_MAX_ERROR = 0.1  # half the width that the 95 % interval of a judge's accuracy should have
_POWER = 0.8416212335729143  # the normal quantile of 80 %, the probability to detect a real difference
_PRIOR_SAME, _PRIOR_REPEATS = 4, 5  # the prior, before any repeat
_MAX_RELIABILITY, _MIN_RELIABILITY = 0.98, 0.55
_HELD_OUT = 0.2  # the share to hold out later, if a labelling holds nothing out


@dataclass(frozen=True)
class Consistency:
    """The number of repeated answers that agreed with the first one.

    Of the repeats that named a side both times, `same` named the same side, `turned` the other.
    """

    agreed: int
    repeats: int
    same: int
    turned: int

    @property
    def reliability(self) -> float:
        """The probability that an answer with a side is the rater's true opinion, from 0.5 for guessing to nearly 1.

        Two answers agree if both are or neither is: q^2 + (1 - q)^2. The prior is 4 of 5 repeats that agree.
        """
        agreement = (self.same + _PRIOR_SAME) / (self.same + self.turned + _PRIOR_REPEATS)
        return min((1 + math.sqrt(max(2 * agreement - 1, 0.0))) / 2, _MAX_RELIABILITY)


@dataclass(frozen=True)
class Enough:
    """Whether there are enough answers to train and measure a judge, and the numbers behind that.

    Of the `decided` pairs, `held_out` measure. `needed` pairs are enough, `held_out_needed` of them held out; both are
    None if no number is. `error` is half the width of the 95 % interval of a judge's accuracy on the held-out pairs, if
    it is as reliable as the rater.
    """

    decided: int
    needed: int | None
    held_out: int
    held_out_needed: int | None
    reliability: float
    error: float

    @property
    def reached(self) -> bool:
        """Whether there are enough answers."""
        if self.needed is None or self.held_out_needed is None:
            return False
        return self.decided >= self.needed and self.held_out >= self.held_out_needed


def consistency(records: Iterable[LabelRecord]) -> Consistency:
    """The consistency of active records: agreement of repeated answers, ties included."""
    first_answers: dict[tuple[str, str, str], str] = {}
    pairs = []
    for record in records:
        if record.p_people is not None and record.pair in first_answers:
            pairs.append((first_answers[record.pair], record.answer))
        elif record.p_people is not None:
            first_answers[record.pair] = record.answer
    agreements = sum(first == second for first, second in pairs)
    sides = [first == second for first, second in pairs if "tie" not in (first, second)]
    return Consistency(agreements, len(pairs), same=sum(sides), turned=len(sides) - sum(sides))


def enough(records: Iterable[LabelRecord], held_out: float) -> Enough:
    """Whether active records are enough to train with and to measure; `held_out` is the share that measures.

    Enough held-out pairs tell the accuracy of a judge as reliable as the rater to ten points (95 % interval), and tell
    it from guessing in 80 % of cases.
    """
    records = list(records)
    shares: dict[tuple[str, str, str], list[float]] = {}
    tests = set()
    for record in records:
        if record.p_people is not None:
            shares.setdefault(record.pair, []).append(record.p_people)
            tests |= {record.pair} if record.split == TEST else set()
    decided_pairs = {pair for pair, answers in shares.items() if sum(answers) != len(answers) / 2}
    test_count = len(decided_pairs & tests)
    reliability = consistency(records).reliability
    held_out_target = _held_out_pairs(reliability)
    target = held_out_target and math.ceil(held_out_target / (held_out or _HELD_OUT))
    held_out_needed = held_out_target if held_out or held_out_target is None else 0
    return Enough(len(decided_pairs), target, test_count, held_out_needed, reliability, _error(reliability, test_count))


def explain(target: Enough, repeated: Consistency, pairs_left: int) -> str:
    """Why more pairs are needed, in sentences with numbers; `pairs_left` can still be asked."""
    same = f"You gave the same answer to {repeated.agreed} of {repeated.repeats} repeated pairs"
    if target.needed is None:
        return f"{same}, no more than by chance: a judge could not learn anything from them yet."
    share = f"a judge can agree with about {100 * target.reliability:.0f}\u00a0% of"
    best = f"{same}: {share} your answers at most" if repeated.repeats else f"Usually {share} a rater's answers at most"
    held_out = f"{target.held_out_needed} of them held out" if target.held_out_needed else "a fifth held out later"
    text = f"{best}. {target.needed} pairs, {held_out}, are enough to measure that to \u00b110 points"
    if target.held_out:
        text += f"; the {target.held_out} held out so far measure it to \u00b1{100 * target.error:.0f}"
    if target.needed - target.decided > pairs_left:
        text += f". These pictures have only {pairs_left} pairs left: add more pictures"
    return text + "."


def _held_out_pairs(reliability: float) -> int | None:
    """The fewest pairs that tell a judge's accuracy to ten points, and from guessing."""
    q = reliability
    if q < _MIN_RELIABILITY:
        return None
    least = ((Z95 * 0.5 + _POWER * math.sqrt(q * (1 - q))) / (q - 0.5)) ** 2
    return next(count for count in itertools.count(math.ceil(least)) if _error(q, count) <= _MAX_ERROR)


def _error(share: float, count: int) -> float:
    """Half the width of the interval of a share of `count`; NaN for 0."""
    low, high = share_interval(round(share * count), count)
    return (high - low) / 2 if count else math.nan

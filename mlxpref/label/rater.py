"""What a rater's answers say of the rater: how often a repeated one is the same, and when there are enough to train.

A judge is measured on held-out answers, and cannot agree with them more often than the rater does. From the share of
repeats that agree follows how often a single answer is what the rater holds, and from that how many held-out answers
show what a judge learned. What a judge needs to learn depends on the judge and the taste: the demo judge learned a rule
from a dozen answers (scripts/label_loop.py), of a real one nothing was measured.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from mlxpref.data.label_file import TEST, LabelRecord, pair_of
from mlxpref.judge.metrics import share_interval
from mlxpref.ranking.bradley_terry import Z95

__all__ = ["Consistency", "Enough", "consistency", "enough", "explained"]

_ERROR = 0.1
"""How well the accuracy of a judge is to be known at least: the half width of its 95 % interval."""
_POWER = 0.8416212335729143  # the normal quantile of 80 %: how surely the difference is found if it is there
_PRIOR_SAME, _PRIOR_REPEATS = 4, 5  # what is believed of a rater who has repeated nothing yet
_MOST_RELIABLE, _LEAST_RELIABLE = 0.98, 0.55
_SHARE = 0.2  # of a labelling that holds nothing out: whoever measures takes about that


@dataclass(frozen=True)
class Consistency:
    """How many of the repeated answers were the same as the first one, and the 95 % interval of that share.

    Of those that named a side both times, `same` named the same one and `turned` the other.
    """

    agreed: int
    repeats: int
    low: float
    high: float
    same: int
    turned: int

    @property
    def reliability(self) -> float:
        """How often a single answer that names a side is what the rater holds, from 0.5 for guessing to nearly 1.

        Two answers agree if both or neither is: q^2 + (1 - q)^2. Few repeats are taken with a prior of 4 in 5.
        """
        agreement = (self.same + _PRIOR_SAME) / (self.same + self.turned + _PRIOR_REPEATS)
        return min((1 + math.sqrt(max(2 * agreement - 1, 0.0))) / 2, _MOST_RELIABLE)


@dataclass(frozen=True)
class Enough:
    """Whether there is enough to train and measure a judge, and the numbers that say why.

    Of `decided` pairs, `held_out` measure; wanted are `needed` and, of them, `held_out_needed`; both None where no
    number would do. `error` is the half width of the 95 % interval of a judge's accuracy on the held-out pairs, if it
    is as reliable as the rater.
    """

    decided: int
    needed: int | None
    held_out: int
    held_out_needed: int | None
    reliability: float
    error: float

    @property
    def reached(self) -> bool:
        """Whether nothing more is wanted."""
        if self.needed is None or self.held_out_needed is None:
            return False
        return self.decided >= self.needed and self.held_out >= self.held_out_needed


def consistency(records: Iterable[LabelRecord]) -> Consistency:
    """How often answers to a pair that was asked again were the same, ties included; of standing records."""
    firsts: dict[tuple[str, str, str], str] = {}
    pairs = []
    for record in records:
        if record.p_a is not None and pair_of(record) in firsts:
            pairs.append((firsts[pair_of(record)], record.answer))
        elif record.p_a is not None:
            firsts[pair_of(record)] = record.answer
    agreed = sum(first == second for first, second in pairs)
    sides = [first == second for first, second in pairs if "tie" not in (first, second)]
    return Consistency(
        agreed, len(pairs), *share_interval(agreed, len(pairs)), same=sum(sides), turned=len(sides) - sum(sides)
    )


def enough(records: Iterable[LabelRecord], held_out: float) -> Enough:
    """Whether standing records are enough to train with and to measure; `held_out` is the share that measures.

    Wanted are so many held-out pairs that the accuracy of a judge as reliable as the rater is known to ten points, and
    that it is told from one that guesses, by a 95 % interval and in 80 % of cases. Where nothing is held out, whoever
    measures is taken to hold out a fifth.
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
    wanted = _pairs_that_show(q)
    needed = wanted and math.ceil(wanted / (held_out or _SHARE))
    held_out_needed = wanted if held_out or wanted is None else 0
    return Enough(len(decided), needed, tested, held_out_needed, q, _error(q, tested))


def explained(found: Enough, repeated: Consistency, left: int) -> str:
    """Why so many pairs are wanted, in sentences with the numbers that it follows from; `left` pairs can be asked."""
    said = f"You gave the same answer to {repeated.agreed} of {repeated.repeats} repeated pairs"
    if found.needed is None:
        return f"{said}, no more than by chance: there is nothing in them yet that a judge could learn."
    best = f"a judge can agree with about {100 * found.reliability:.0f}\u00a0% of"
    whose = f"{said}: {best} your answers" if repeated.repeats else f"Usually {best} a rater's answers"
    held_out = f"{found.held_out_needed} of them held out" if found.held_out_needed else "and a fifth held out later"
    so_far = (
        f"; the {found.held_out} held out so far show it to \u00b1{100 * found.error:.0f}" if found.held_out else ""
    )
    text = (
        f"{whose} at most. {found.needed} pairs are wanted, {held_out}, to show that to \u00b110 points and tell it "
        f"from guessing{so_far}."
    )
    if found.needed - found.decided > left:
        text += f" These pictures have only {left} pairs left to ask: add more of them."
    return text


def _pairs_that_show(reliability: float) -> int | None:
    """The fewest pairs on which a judge that is right so often is known to ten points and told from guessing."""
    q = reliability
    if q < _LEAST_RELIABLE:
        return None
    least = ((Z95 * 0.5 + _POWER * math.sqrt(q * (1 - q))) / (q - 0.5)) ** 2
    return next(count for count in itertools.count(math.ceil(least)) if _error(q, count) <= _ERROR)


def _error(share: float, count: int) -> float:
    """Half the width of the interval of a share of so many; not a number of none."""
    low, high = share_interval(round(share * count), count)
    return (high - low) / 2 if count else math.nan

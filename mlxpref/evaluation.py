"""How often a judge agrees with people: the metrics of `eval`, from probabilities and votes alone or from a judge."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxpref.errors import DataError
from mlxpref.judge import Judge
from mlxpref.pairs import Pair, PairVerdict, Track
from mlxpref.preferences import Preference
from mlxpref.ranking import soft_preference
from mlxpref.verdict import Strategy

__all__ = ["Evaluation", "Metrics", "evaluate", "measure"]

Floats = NDArray[np.float64]

_BOOTSTRAPS = 2000
_BINS = 10


@dataclass(frozen=True)
class Metrics:
    """What `measure` computes; shares from 0 to 1."""

    pairs: int
    ties_dropped: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    accuracy_macro: float
    both_orders_accuracy: float
    position_consistency: float
    first_choice_rate: float
    first_image_baseline: float
    brier: float
    ece: float


@dataclass(frozen=True)
class Evaluation:
    """The JSON of `eval`: what was judged, how, and how well."""

    data: str
    split: str
    protocol: str
    strategy: Strategy
    metrics: Metrics
    unreadable: float
    tokens: int
    seconds: float
    verdicts: tuple[PairVerdict, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """The evaluation as design.md's JSON of `eval`."""
        fields = {key: value for key, value in self.__dict__.items() if key not in ("metrics", "verdicts")}
        before = {key: fields.pop(key) for key in ("data", "split", "protocol", "strategy")}
        return {**before, **asdict(self.metrics), **fields}


def evaluate(
    judge: Judge,
    preferences: Sequence[Preference],
    data: str,
    split: str,
    strategy: Strategy = "soft",
    track: Track = lambda work, count, what: work,
) -> Evaluation:
    """Judge preferences, each in both orders, and measure the agreement with people; ties in the data are dropped."""
    started, tokens = time.perf_counter(), judge.tokens
    scored = [preference for preference in preferences if not preference.is_tie]
    if not scored:
        raise DataError(f"{data}, split {split}: no preference to judge ({len(preferences)} ties)")
    pairs = (Pair(p.a, p.b, p.prompt) for p in scored)
    verdicts = list(track(judge.pairs(pairs, strategy), len(scored), f"judging ({strategy})"))
    metrics = measure(
        _filled([v.p_a_shown_first for v in verdicts]),
        _filled([v.p_a_shown_second for v in verdicts]),
        np.array([p.p_a for p in scored]),
        [p.group for p in scored],
        ties_dropped=len(preferences) - len(scored),
    )
    completions = [verdict for v in verdicts for verdict in v.verdicts]
    unreadable = sum(verdict.p_first(strategy) is None for verdict in completions) / len(completions)
    return Evaluation(
        data,
        split,
        "pairs",
        strategy,
        metrics,
        unreadable,
        tokens=judge.tokens - tokens,
        seconds=round(time.perf_counter() - started, 3),
        verdicts=tuple(verdicts),
    )


def measure(
    p_shown_first: Floats, p_shown_second: Floats, p_people: Floats, groups: Sequence[str], ties_dropped: int = 0
) -> Metrics:
    """The agreement of a judge with people over N pairs, none of them a tie.

    `p_shown_first` and `p_shown_second` (N,) are the judge's preferences for a where it was shown first and second,
    `p_people` (N,) the share of people who prefer a. A pair counts as right where both orders, combined in
    log-odds, lean to the side of the majority; an even preference is wrong.

    - `accuracy_low`, `accuracy_high`: 95 % interval, by bootstrap over groups, as pairs of a prompt are not
      independent; the same for the same input.
    - `accuracy_macro`: the mean over groups of each group's accuracy.
    - `both_orders_accuracy`: right in either order by itself.
    - `position_consistency`: the same image preferred in both orders.
    - `first_choice_rate`: how often the image on the first place is preferred; 0.5 for a judge without position bias.
    - `first_image_baseline`: how often people prefer a, what "always the first in the file" would score.
    - `brier`: mean squared distance to the share of people. `ece`: expected calibration error against it, in ten
      bins, both sides of each pair counted, so that it does not depend on which image is called a.
    """
    p = np.asarray(soft_preference(p_shown_first, p_shown_second))
    people_prefer_a = p_people > 0.5
    right = np.where(people_prefer_a, p > 0.5, p < 0.5).astype(np.float64)
    right_in_order = [np.where(people_prefer_a, q > 0.5, q < 0.5) for q in (p_shown_first, p_shown_second)]
    same = ((p_shown_first > 0.5) & (p_shown_second > 0.5)) | ((p_shown_first < 0.5) & (p_shown_second < 0.5))
    first_chosen = [_wins(p_shown_first), _wins(1 - p_shown_second)]
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    correct = np.asarray(np.bincount(group, right), np.float64)
    size = np.asarray(np.bincount(group), np.float64)
    low, high = _interval(correct, size)
    return Metrics(
        pairs=len(p),
        ties_dropped=ties_dropped,
        accuracy=float(right.mean()),
        accuracy_low=low,
        accuracy_high=high,
        accuracy_macro=float((correct / size).mean()),
        both_orders_accuracy=float((right_in_order[0] & right_in_order[1]).mean()),
        position_consistency=float(same.mean()),
        first_choice_rate=float(np.mean(first_chosen)),
        first_image_baseline=float(people_prefer_a.mean()),
        brier=float(((p - p_people) ** 2).mean()),
        ece=_calibration_error(np.concatenate([p, 1 - p]), np.concatenate([p_people, 1 - p_people])),
    )


def _filled(preferences: Sequence[float | None]) -> Floats:
    """An order that could not be read counts as undecided."""
    return np.array([0.5 if p is None else p for p in preferences])


def _wins(p: Floats) -> Floats:
    return 0.5 * (1 + np.sign(p - 0.5))


def _interval(correct: Floats, size: Floats) -> tuple[float, float]:
    """The 95 % bootstrap interval of the share correct, groups drawn with replacement."""
    drawn = np.random.default_rng(0).integers(len(size), size=(_BOOTSTRAPS, len(size)))
    low, high = np.quantile(correct[drawn].sum(axis=1) / size[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _calibration_error(p: Floats, p_people: Floats) -> float:
    """The mean distance between probability and share of people, over equally wide bins weighted by their size."""
    place = np.minimum((p * _BINS).astype(int), _BINS - 1)
    distance = np.bincount(place, p, _BINS) - np.bincount(place, p_people, _BINS)
    return float(np.abs(distance).sum() / len(p))

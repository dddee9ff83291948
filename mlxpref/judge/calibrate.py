"""Calibrating a judge: preferences of people are judged, and its answers rescaled so that they mean what they say."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mlxpref.errors import DataError
from mlxpref.judge.calibration import Calibration, CalibrationMetrics, JudgeConditions
from mlxpref.judge.judge import Judge
from mlxpref.judge.metrics import Floats, both_orders, calibration_error, first_choice_rate, group_numbers
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.log import track
from mlxpref.preferences import Pair, Preference
from mlxpref.ranking.temperature import COLDEST, EVEN, HOTTEST, TemperatureScaling, fit_temperature

__all__ = ["calibrate", "calibration_of", "cross_fitted", "quality"]

_FOLDS = 5
_FEWEST, _FEW = 10, 50
"""Pairs below which nothing is fitted, and below which it is said that the fit is rough."""


def calibrate(
    judge: Judge,
    preferences: Sequence[Preference],
    data: str,
    split: str,
    think: bool,
) -> Calibration:
    """Judge preferences, each in both orders, and fit a calibration for thinking, or for reading without.

    Ties are dropped, as an evaluation does. What the judge is calibrated by so far makes no difference. DataError where
    fewer than ten pairs could be read.
    """
    asked = [p for p in preferences if p.better != "tie"]
    before, judge.calibration = judge.calibration, None
    try:
        conditions = judge.conditions(think)
        work = judge.pairs((Pair(p.a, p.b, p.prompt) for p in asked), think=think)
        verdicts = list(track(work, len(asked), f"judging ({conditions.mode})"))
    finally:
        judge.calibration = before
    return calibration_of(asked, verdicts, conditions, data, split)


def calibration_of(
    preferences: Sequence[Preference],
    verdicts: Sequence[PairVerdict],
    conditions: JudgeConditions,
    data: str,
    split: str,
) -> Calibration:
    """The calibration that fits what a judge said of preferences, under the conditions that it was asked in.

    Pairs of which an order could not be read are left out.
    """
    shown = [(verdict.p_a_shown_first, verdict.p_a_shown_second) for verdict in verdicts]
    read = [i for i, orders in enumerate(shown) if None not in orders]
    if len(read) < _FEWEST:
        raise DataError(
            f"{data}, split {split}: {len(read)} pairs were judged and could be read in both orders; "
            f"at least {_FEWEST} are needed to calibrate a judge"
        )
    first, second = np.array([shown[i] for i in read], np.float64).T
    people = np.array([preferences[i].p_a for i in read], np.float64)
    groups = [preferences[i].group or preferences[i].prompt for i in read]
    fold = _folds(groups)
    before, after = quality(first, second, people), quality(*cross_fitted(first, second, people, fold), people)
    rescaling = fit_temperature(first, second, people)
    remarks = [f"{len(shown) - len(read)} pairs could not be read in both orders: left out"] * (len(read) < len(shown))
    remarks += _remarks(rescaling, both_orders(first, second), before, after)
    remarks += ["all are of one prompt: for others it may not hold"] * (len(set(groups)) == 1)
    count = int(fold.max()) + 1
    return Calibration(conditions, rescaling, data, split, len(read), count, before, after, tuple(remarks))


def cross_fitted(
    p_a_shown_first: Floats, p_a_shown_second: Floats, p_people: Floats, fold: NDArray[np.intp]
) -> tuple[Floats, Floats]:
    """Preferences for a in both orders (N,), rescaled by what was fitted to the pairs of the other folds."""
    first, second = p_a_shown_first.copy(), p_a_shown_second.copy()
    for number in np.unique(fold):
        held_out, others = fold == number, fold != number
        fitted = fit_temperature(p_a_shown_first[others], p_a_shown_second[others], p_people[others])
        first[held_out] = fitted.p_first(p_a_shown_first[held_out])
        second[held_out] = 1 - fitted.p_first(1 - p_a_shown_second[held_out])
    return first, second


def quality(p_a_shown_first: Floats, p_a_shown_second: Floats, p_people: Floats) -> CalibrationMetrics:
    """How far the soft preferences of N pairs are from the shares of people, (N,) each."""
    p = both_orders(p_a_shown_first, p_a_shown_second)
    first_chosen = first_choice_rate(np.concatenate([p_a_shown_first, 1 - p_a_shown_second]))
    return CalibrationMetrics(
        nll=float(-(p_people * np.log(p) + (1 - p_people) * np.log1p(-p)).mean()),
        brier=float(((p - p_people) ** 2).mean()),
        ece=calibration_error(np.concatenate([p, 1 - p]), np.concatenate([p_people, 1 - p_people])),
        first_choice_rate=0.5 if math.isnan(first_chosen) else first_chosen,  # nothing was decided
    )


def _folds(groups: Sequence[str]) -> NDArray[np.intp]:
    """The fold (N,) of each pair: whole prompts, or single pairs where there is one prompt only."""
    number = group_numbers(groups)
    if not number.any():
        number = np.arange(len(groups))
    drawn = np.random.default_rng(0).permutation(int(number.max()) + 1)
    return drawn[number] % _FOLDS


def _remarks(
    rescaling: TemperatureScaling, p: Floats, before: CalibrationMetrics, after: CalibrationMetrics
) -> Iterator[str]:
    """What should be known before a calibration is trusted, a line each."""
    if len(p) < _FEW:
        yield f"{len(p)} pairs are few: the temperature may be far off"
    if (np.abs(p - 0.5) < EVEN).all():
        yield "the judge finds every pair even: there is nothing to scale, so the temperature is 1"
    elif rescaling.temperature >= HOTTEST:
        yield "the judge is no better than chance here: its answers become nearly even, and its order of images stays"
    elif rescaling.temperature <= COLDEST:
        yield f"the judge is far surer than it says: the temperature ends at its bound, {COLDEST}"
    if after.nll >= before.nll:
        yield "on prompts that it was not fitted to it does not help: use more preferences, or none of it"
    elif after.ece > before.ece:
        yield (
            "the probabilities come nearer to people's, yet the calibration error rises: "
            "how often the judge is right does not follow how sure it is"
        )

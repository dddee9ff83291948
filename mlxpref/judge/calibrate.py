"""Calibrating a judge: it judges people's preferences, and a rescaling of its answers is fitted to them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mlxpref.data.learned import pair_names
from mlxpref.data.left_out import LeftOut
from mlxpref.errors import DataError
from mlxpref.judge.calibration import Calibration, CalibrationMetrics, JudgeConditions
from mlxpref.judge.evaluation import readable
from mlxpref.judge.judge import Judge
from mlxpref.judge.metrics import Floats, both_orders, calibration_error, first_choice_rate, group_numbers
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.log import track
from mlxpref.preferences import Pair, Preference, data_fingerprint
from mlxpref.ranking.temperature import COLDEST, EVEN, HOTTEST, TemperatureScaling, fit_temperature
from mlxpref.text import counted

_FOLDS = 5
_FEWEST, _FEW = 10, 50
"""Fewer pairs than the first raise an error; fewer than the second bring a warning that the fit is rough."""


def modes_of(judge: Judge, think: bool | None) -> list[bool]:
    """The ways of judging to fit: the given one, else those that the judge's rankings use."""
    if think is not None:
        return [think]
    return [False, True] if judge.settings.think else [False]


def decided(preferences: Sequence[Preference], data: str, split: str) -> list[Preference]:
    """The preferences that are no ties; DataError, before the work, for fewer than ten."""
    pairs = [p for p in preferences if p.better != "tie"]
    if len(pairs) < _FEWEST:
        raise DataError(
            f"{data}, split {split}: {counted(len(pairs), 'pair')} without ties; "
            f"at least {_FEWEST} are needed to calibrate a judge"
        )
    return pairs


def calibrate(
    judge: Judge, preferences: Sequence[Preference], data: str, split: str, think: bool, left_out: LeftOut | None = None
) -> Calibration:
    """Judge preferences, each in both orders, and fit a calibration for judging with or without thinking.

    Ties are dropped, as in an evaluation; a calibration of the judge is ignored. `left_out` gets the images that cannot
    be read. DataError for fewer than ten readable pairs.
    """
    left_out = left_out or LeftOut(data, preferences)
    pairs = decided(preferences, data, split)
    uncalibrated = replace(judge, calibration=None)
    conditions = uncalibrated.conditions(think)
    work = uncalibrated.pairs((Pair(p.a, p.b, p.prompt) for p in pairs), think=think, left_out=left_out, by_scores=True)
    verdicts = list(track(work, len(pairs), f"judging {conditions.mode}"))
    kept, (verdicts,) = readable(pairs, pairs, [verdicts])
    calibration = replace(
        calibration_of(kept, verdicts, conditions, data, split),
        name=f"{judge.name} with {judge.adapter}" if judge.adapter else judge.name,
        fingerprint=data_fingerprint(kept),
        fitted=" ".join(pair_names(kept)),
        criterion=judge.settings.criterion.strip(),
    )
    if not left_out.reasons:
        return calibration
    warning = f"{len(left_out.reasons)} images could not be read: {len(pairs) - len(kept)} pairs are left out"
    return replace(calibration, warnings=(warning, *calibration.warnings))


def calibration_of(
    preferences: Sequence[Preference],
    verdicts: Sequence[PairVerdict],
    conditions: JudgeConditions,
    data: str,
    split: str,
) -> Calibration:
    """Fit a calibration to a judge's verdicts on preferences, for the conditions of these verdicts.

    Pairs with an unreadable order are left out; DataError where fewer than ten remain.
    """
    orders = np.array([(v.p_a_shown_first, v.p_a_shown_second) for v in verdicts], np.float64).reshape(-1, 2)
    readable = np.flatnonzero(~np.isnan(orders).any(axis=1)).tolist()
    if len(readable) < _FEWEST:
        raise DataError(
            f"{data}, split {split}: {len(readable)} pairs were judged and could be read in both orders; "
            f"at least {_FEWEST} are needed to calibrate a judge"
        )
    first, second = orders[readable].T
    p_people = np.array([preferences[i].p_people for i in readable], np.float64)
    prompts = [preferences[i].group or preferences[i].prompt for i in readable]
    fold = _folds(prompts)
    before = calibration_metrics(first, second, p_people)
    after = calibration_metrics(*cross_fitted(first, second, p_people, fold), p_people)
    rescaling = fit_temperature(first, second, p_people)
    warnings = []
    if unreadable := len(orders) - len(readable):
        warnings.append(f"{counted(unreadable, 'pair')} could not be read in both orders: left out")
    warnings += _warnings(rescaling, both_orders(first, second), before, after)
    if len(set(prompts)) == 1:
        warnings.append("all are of one prompt: for others it may not hold")
    count = int(fold.max()) + 1
    return Calibration(conditions, rescaling, data, split, len(readable), count, before, after, tuple(warnings))


def cross_fitted(
    p_a_shown_first: Floats, p_a_shown_second: Floats, p_people: Floats, fold: NDArray[np.intp]
) -> tuple[Floats, Floats]:
    """Preferences for a in both orders (N,), each rescaled by the fit to the pairs of the other folds."""
    first, second = p_a_shown_first.copy(), p_a_shown_second.copy()
    for number in np.unique(fold):
        held_out, others = fold == number, fold != number
        scaling = fit_temperature(p_a_shown_first[others], p_a_shown_second[others], p_people[others])
        first[held_out] = scaling.p_first(p_a_shown_first[held_out])
        second[held_out] = 1 - scaling.p_first(1 - p_a_shown_second[held_out])
    return first, second


def calibration_metrics(p_a_shown_first: Floats, p_a_shown_second: Floats, p_people: Floats) -> CalibrationMetrics:
    """How far the soft preferences of N pairs are from the shares of people, (N,) each."""
    p = both_orders(p_a_shown_first, p_a_shown_second)
    first_rate = first_choice_rate(np.concatenate([p_a_shown_first, 1 - p_a_shown_second]))
    return CalibrationMetrics(
        nll=float(-(p_people * np.log(p) + (1 - p_people) * np.log1p(-p)).mean()),
        brier=float(((p - p_people) ** 2).mean()),
        ece=calibration_error(np.concatenate([p, 1 - p]), np.concatenate([p_people, 1 - p_people])),
        first_choice_rate=0.5 if math.isnan(first_rate) else first_rate,  # nothing was decided
    )


def _folds(groups: Sequence[str]) -> NDArray[np.intp]:
    """The fold (N,) of each pair: whole prompts together, or single pairs where there is only one prompt."""
    number = group_numbers(groups)
    if not number.any():
        number = np.arange(len(groups))
    order = np.random.default_rng(0).permutation(int(number.max()) + 1)
    return order[number] % _FOLDS


def _warnings(
    rescaling: TemperatureScaling, p: Floats, before: CalibrationMetrics, after: CalibrationMetrics
) -> Iterator[str]:
    """The warnings about a calibration, a line each."""
    if len(p) < _FEW:
        yield f"{len(p)} pairs are few: the temperature may be far off"
    if (np.abs(p - 0.5) < EVEN).all():
        yield "the judge finds every pair even: there is nothing to scale, so the temperature is 1"
    elif rescaling.temperature >= HOTTEST:
        yield "the judge is no better than chance here: its answers become nearly even, and its order of images stays"
    elif rescaling.temperature <= COLDEST:
        yield f"the judge is far too unsure of its answers: the temperature ends at its bound, {COLDEST}"
    if after.nll >= before.nll:
        yield "on prompts that it was not fitted to it does not help: use more preferences, or no calibration"
    elif after.ece > before.ece:
        yield (
            "the probabilities come nearer to people's, yet the calibration error rises: "
            "how often the judge is right does not follow how sure it is"
        )

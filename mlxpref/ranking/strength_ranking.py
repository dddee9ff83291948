"""The order of images by their strengths: ranks, intervals, ties and the probability to be the best."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mlxpref.ranking.bradley_terry import Z95, StrengthFit, fit_strengths
from mlxpref.ranking.covariance import DENSE_IMAGES, DenseCovariance
from mlxpref.ranking.log_odds import log_odds, probability
from mlxpref.ranking.noise import Noise
from mlxpref.ranking.outcomes import PairOutcome
from mlxpref.ranking.posterior import best_probabilities
from mlxpref.ranking.threads import one_thread

INTERVAL_MEANING = (
    "An interval holds, with 95 %, the strength behind this judge's answers, as far as these show it; "
    "it does not say what people think."
)
"""What an interval says, wherever one is shown."""
TIE_PLACES = 16  # of more images than DENSE_IMAGES ties are looked for so many places up and down the order
ALL_ASKED = (
    "Every pair was asked in both orders, and this judge would answer the same again: the intervals say how far its "
    "answers contradict one order of the images, not that anything is left to ask."
)


@dataclass(frozen=True)
class RankedImage:
    """One image's place.

    `rank` is 1 + the number of stronger images; `low` and `high` bound a 95 % interval (`INTERVAL_MEANING`); `p_best`
    is the probability to be the strongest; `wins` of its `pairs` had a soft preference above 0.5 for it; `tied_with`:
    images whose difference from this one is not resolved at 95 %. By pairs of more than `DENSE_IMAGES` images these are
    only those among the nearest `TIE_PLACES` above and below: all would be most of the images for each. By scores of
    single images they are all with an equal score, however many there are.
    """

    index: int
    rank: int
    strength: float
    stderr: float
    low: float
    high: float
    p_best: float
    wins: int
    pairs: int
    tied_with: tuple[int, ...]


@dataclass(frozen=True)
class StrengthRanking:
    """Images best first (equal strengths by index), how far the judge favours the first place, and the fit."""

    images: tuple[RankedImage, ...]
    position_bias: float
    position_bias_stderr: float
    fit: StrengthFit


def rank_images(
    count: int, outcomes: Iterable[PairOutcome], known: Mapping[int, Noise] | None = None
) -> StrengthRanking:
    """Rank `count` images from the pairs judged so far; any subset of pairs and orders will do.

    Permuting the images permutes the ranking. `known` and errors as in `fit_strengths`.
    """
    answers = [pair for pair in outcomes if pair.p_a is not None]
    return ranking_of(fit_strengths(count, answers, known), answers)


@one_thread()
def ranking_of(fit: StrengthFit, answers: Iterable[PairOutcome]) -> StrengthRanking:
    """The ranking by a fit to readable answers.

    Of a pair that two instruments judged, the later one's answer is won or lost.
    """
    count = len(fit.strengths)
    wins, pairs = [0] * count, [0] * count
    last = {(pair.a, pair.b): pair for pair in sorted(answers, key=lambda pair: pair.instrument)}
    for pair in last.values():
        p_a = unbiased_preference(pair, fit.instruments[pair.instrument].position_bias)
        for index, won in ((pair.a, p_a > 0.5), (pair.b, p_a < 0.5)):
            wins[index] += won
            pairs[index] += 1
    strengths = np.round(fit.strengths, 9)  # strengths that differ by rounding only share a rank
    rank = 1 + count - np.searchsorted(np.sort(strengths), strengths, side="right")
    error = np.sqrt(fit.covariance.variances())
    bounds = fit.strengths - Z95 * error, fit.strengths + Z95 * error
    p_best = best_probabilities(fit.strengths, fit.covariance.scaled(fit.widening**-2.0), fit.degrees_of_freedom)
    numbers = [column.tolist() for column in (rank, fit.strengths, error, *bounds, p_best)]
    rows = list(zip(range(count), *numbers, wins, pairs, _ties(fit), strict=True))
    images = tuple(RankedImage(*rows[i]) for i in np.argsort(rank, kind="stable"))
    return StrengthRanking(images, fit.reference.position_bias, fit.reference.position_bias_stderr, fit)


def names_only_near_ties(count: int) -> bool:
    """Whether a ranking of so many images leaves out ties that are not near in the order, see `RankedImage`."""
    return count > DENSE_IMAGES


def _ties(fit: StrengthFit) -> list[tuple[int, ...]]:
    """For every image those that it is tied with, ascending; see `RankedImage`."""
    count = len(fit.strengths)
    order = np.argsort(-fit.strengths, kind="stable")  # (N,) best first
    reach = count - 1 if isinstance(fit.covariance, DenseCovariance) else TIE_PLACES
    better = np.concatenate([order[: count - gap] for gap in range(1, reach + 1)])  # (K,)
    worse = np.concatenate([order[gap:] for gap in range(1, reach + 1)])
    lead = fit.strengths[better] - fit.strengths[worse]
    tied = lead <= Z95 * np.sqrt(fit.covariance.of_differences(better, worse))
    ties: list[list[int]] = [[] for _ in range(count)]
    for one, other in zip(better[tied].tolist(), worse[tied].tolist(), strict=True):
        ties[one].append(other)
        ties[other].append(one)
    return [tuple(sorted(each)) for each in ties]


def unbiased_preference(pair: PairOutcome, position_bias: float) -> float:
    """The soft preference for a; where one order is missing, without the judge's position bias; 0.5 without any."""
    p_a = pair.p_a
    if p_a is None:
        return 0.5
    first, second = (p is not None and not np.isnan(p) for p in (pair.p_a_shown_first, pair.p_a_shown_second))
    return p_a if first == second else float(probability(log_odds(p_a) + (-position_bias if first else position_bias)))

"""One way of judging by itself: with thinking, or without."""

from mlxpref.judge.ranking_result import Ranking
from mlxpref.ranking.bradley_terry import StrengthFit, fit_strengths

_CONTRADICTION = 2.0
"""So many times the variance of thinking by itself is one that the answers at once make of it."""


def fit_of_mode(ranking: Ranking, think: bool) -> StrengthFit:
    """The fit to all answers with or without thinking alone, without what earlier rankings showed."""
    pairs = [pair for pair in (*ranking.pairs, *ranking.replaced) if pair.think == think and pair.verdict.is_readable]
    return fit_strengths(len(ranking), [pair.verdict.outcome(pair.a, pair.b) for pair in pairs])


def is_contradicted(ranking: Ranking) -> bool:
    """Whether answers at once contradict what was thought.

    The fit takes what differs between both for noise of the answers, not for another view of an image. There are many
    more answers at once, and they agree with each other: then thinking looks noisy, and the order goes by the others.
    """
    if ranking.modes != (False, True):
        return False
    together, alone = ranking.strengths.fit.reference.noise, fit_of_mode(ranking, True).reference.noise
    return not together.votes and together.pair > _CONTRADICTION * alone.pair

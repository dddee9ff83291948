"""Chooses preference pairs: of rankings those that the judge can tell apart, of preferences those that are no ties."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Self

from mlxpref.judge.ranking_result import Ranking
from mlxpref.preferences import ImageLike, Preference
from mlxpref.ranking.bradley_terry import Z95
from mlxpref.ranking.log_odds import log_odds, probability
from mlxpref.ranking.strength_ranking import names_only_near_ties

Choose = Literal["best-worst", "resolved", "margin"]
"""Of each ranking the best image against the worst, all pairs that are resolved, or all above a margin."""
UNRESOLVED = "the judge cannot tell the images apart"
BELOW = "their lead is below the margin"
TIE = "people prefer both alike"
NO_PROMPT = "there is no prompt"
"""Why a pair is left out."""


@dataclass(frozen=True, eq=False)  # it may hold pictures
class RankedImages:
    """The images of one ranking, best first, with their strengths (N,) in nats.

    `tied` are the places (better, worse) of images whose difference is not resolved. A ranking of many images names
    only the nearest ties: there the standard `errors` (N,) say the others. `group` names the ranking where several have
    one prompt.
    """

    prompt: str
    images: tuple[ImageLike, ...]
    strengths: tuple[float, ...]
    tied: frozenset[tuple[int, int]]
    group: str = ""
    errors: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        prompt: str,
        names: Sequence[str],
        images: Sequence[ImageLike],
        strengths: Sequence[float],
        tied_with: Sequence[Iterable[str]],
        group: str = "",
        errors: Sequence[float] = (),
    ) -> Self:
        """From images best first with their unique names, and for each the names of those that it is tied with.

        Their standard errors, where these names may not be all.
        """
        places = {name: place for place, name in enumerate(names)}
        others = ((place, places[name]) for place, tied in enumerate(tied_with) for name in tied if name in places)
        tied = frozenset((min(pair), max(pair)) for pair in others)
        return cls(prompt, tuple(images), tuple(strengths), tied, group, tuple(errors))

    @classmethod
    def of_ranking(cls, ranking: Ranking) -> Self:
        """From the result of `Judge.rank`."""
        images, tied = [ranking.images[each.index] for each in ranking], [map(str, each.tied_with) for each in ranking]
        strengths, names = [each.strength for each in ranking], [str(each.index) for each in ranking]
        errors = [each.stderr for each in ranking] if names_only_near_ties(len(ranking)) else []
        return cls.of(ranking.prompt, names, images, strengths, tied, ranking.similar_to, errors)

    def are_tied(self, better: int, worse: int) -> bool:
        """Whether the difference of the images at two places is not resolved."""
        if (better, worse) in self.tied:
            return True
        reach = Z95 * math.hypot(self.errors[better], self.errors[worse]) if self.errors else -math.inf
        return self.strengths[better] - self.strengths[worse] <= reach


def choose_pairs(
    items: Iterable[RankedImages | Preference], choose: Choose, margin: float | None, ties: bool
) -> tuple[list[Preference], Counter[str]]:
    """The pairs of rankings and of preferences, in their order, and how many are left out, by reason.

    The better image of a ranking is a, and `p_people` the probability of its lead: the logistic of the difference of
    strengths. With a `margin`, in nats, every pair of at least that lead is one; a preference that all people share is
    above any margin. Ties between people are kept only if the format has `ties`.
    """
    pairs, left_out = list[Preference](), Counter[str]()
    for item in items:
        if isinstance(item, Preference):
            if reason := _left_out(item, margin, ties):
                left_out[reason] += 1
            else:
                pairs.append(item)
        else:
            pairs += _pairs_of(item, choose, margin, left_out)
    return pairs, left_out


def _left_out(preference: Preference, margin: float | None, ties: bool) -> str:
    """Why a preference is left out; empty if it is not."""
    p = preference.p_people
    if p == 0.5 and not (ties and not margin):
        return TIE
    return BELOW if margin and 0 < p < 1 and abs(float(log_odds(p))) < margin else ""


def _pairs_of(
    ranking: RankedImages, choose: Choose, margin: float | None, left_out: Counter[str]
) -> Iterator[Preference]:
    """The pairs of a ranking; counts those that are left out."""
    count = len(ranking.images)
    for a, b in [(0, count - 1)][: count - 1] if choose == "best-worst" else combinations(range(count), 2):
        lead = ranking.strengths[a] - ranking.strengths[b]
        same = str(ranking.images[a]) == str(ranking.images[b])  # a file that was given twice
        if lead <= 0 or same or (margin is None and ranking.are_tied(a, b)):
            left_out[UNRESOLVED] += 1
        elif margin is not None and lead < margin:
            left_out[BELOW] += 1
        elif not ranking.prompt:
            left_out[NO_PROMPT] += 1
        else:
            group = ranking.group or ranking.prompt
            p_a = float(probability(lead))
            yield Preference(ranking.prompt, ranking.images[a], ranking.images[b], p_a, group=group)

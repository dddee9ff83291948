"""Brackets over images that are tied: which to draw, so that two lines are enough for any number of images."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from mlxpref.ranking.strength_ranking import RankedImage

BRACKETS_MEANING = (
    "A bracket joins pictures that these pairs do not tell apart, each from each. Two neighbours without a bracket are "
    "told apart. An open picture names all its ties."
)


@dataclass(frozen=True)
class Bracket:
    """The images from place `first` to place `last` of the order, counted from 0, on line 0 or 1."""

    first: int
    last: int
    line: int


def tie_brackets(images: Sequence[RankedImage]) -> list[Bracket]:
    """Brackets over images in order; all images below one are tied with each other.

    Being tied is not transitive, so brackets may overlap. Drawn are the longest runs that begin with the best image and
    then again with each pair of neighbours that is tied but under no bracket yet: every pair of tied neighbours has a
    bracket, and no place has more than two.
    """
    start = _starts(images)
    brackets: list[Bracket] = []
    place = 0
    while place < len(images) - 1:
        last = bisect(start, place) - 1  # the last run that begins here or before
        if last > place:
            overlaps = bool(brackets) and brackets[-1].last >= start[last]
            brackets.append(Bracket(start[last], last, 1 - brackets[-1].line if overlaps else 0))
        place = max(last, place + 1)
    return brackets


def _starts(images: Sequence[RankedImage]) -> list[int]:
    """For each place, the first of the longest run that ends there and whose images are all tied with each other."""
    starts = [0]
    for place in range(1, len(images)):
        tied, start = {*images[place].tied_with}, place
        while start > starts[-1] and images[start - 1].index in tied:
            start -= 1
        starts.append(start)
    return starts

"""What a ranking settles, in words."""

from bisect import bisect

from mlxpref.judge.ranking_result import Ranking
from mlxpref.ranking.strength_ranking import TIE_PLACES, RankedImage, names_only_near_ties
from mlxpref.text import few


def best_in_words(ranking: Ranking) -> str:
    """Whether one image is the best, in a sentence."""
    first = ranking.strengths.images[0]
    name, ties = ranking.short_names[first.index], ties_in_words(ranking, first)
    if not first.tied_with:
        return f"{name} is this judge's best, {ties}."
    is_near = names_only_near_ties(len(ranking)) and not ranking.is_by_scores
    near = f", of the nearest {TIE_PLACES}" if is_near else ""
    return f"No image is clearly the best: {name} comes first, but is {ties}{near}."


def ties_in_words(ranking: Ranking, image: RankedImage) -> str:
    """The images tied with one."""
    if not image.tied_with:
        return "tied with no other image"
    if len(image.tied_with) == len(ranking.images) - 1:
        return "tied with all others"
    ranks = tied_ranks(ranking, image)
    return f"tied with rank{'' if ranks.isdigit() else 's'} {ranks}"


def orders_in_words(ranking: Ranking) -> str:
    """The orders in which the pairs were shown to the judge, if they were."""
    if ranking.is_by_scores:
        return "each image scored by itself"
    one = sum(not pair.verdict.is_in_both_orders for pair in ranking.pairs)
    if not one:
        return "each in both orders"
    both = len(ranking.pairs) - one
    return f"{both} in both orders, {one} in one" if both else "each in one order"


def tied_ranks(ranking: Ranking, image: RankedImage) -> str:
    """The ranks of the images tied with one, those in a row as `2 to 5`; the first four parts."""
    rows, following = list[list[int]](), 0
    for rank in sorted({ranking.ranks[other] for other in image.tied_with}):
        if rank == following:
            rows[-1].append(rank)
        else:
            rows.append([rank])
        following = 1 + bisect(ranking.strengths.images, rank, key=lambda other: other.rank)
    parts = [part for row in rows for part in ([f"{row[0]} to {row[-1]}"] if len(row) > 2 else map(str, row))]
    return few(parts, 4)

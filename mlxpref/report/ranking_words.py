"""What a ranking settles, in words."""

from mlxpref.judge.ranking_result import Ranking
from mlxpref.ranking.bradley_terry import RankedImage


def best_in_words(ranking: Ranking) -> str:
    """Whether one image is the best, in a sentence."""
    first = ranking.strengths.images[0]
    name, ties = ranking.short_names[first.index], ties_in_words(ranking, first)
    if not first.tied_with:
        return f"{name} is this judge's best, {ties}."
    return f"No image is clearly the best: {name} comes first, but is {ties}."


def ties_in_words(ranking: Ranking, image: RankedImage) -> str:
    """The images tied with one."""
    if not image.tied_with:
        return "tied with no other image"
    if len(image.tied_with) == len(ranking.images) - 1:
        return "tied with all others"
    ranks = {other.index: other.rank for other in ranking.strengths.images}
    tied = sorted({ranks[other] for other in image.tied_with})
    if len(tied) > 3:
        return f"tied with {len(image.tied_with)} others, ranked {tied[0]} to {tied[-1]}"
    return f"tied with rank{'s' if len(tied) > 1 else ''} {', '.join(map(str, tied))}"

"""What a ranking settles, in words."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxpref.judge.ranking_result import BY_SCORES, Ranking
from mlxpref.ranking.strength_ranking import rank_images
from mlxpref.report.ranking_words import best_in_words, tied_ranks, ties_in_words
from mlxpref.text import few


def ranking_of(ranks: list[int], tied: tuple[int, ...] = ()) -> Any:
    """A ranking whose images, in order and numbered so, have these ranks; all are tied with the same ones."""
    images = [SimpleNamespace(index=i, rank=rank, tied_with=tied) for i, rank in enumerate(ranks)]
    return SimpleNamespace(images=images, strengths=SimpleNamespace(images=images), ranks=ranks)


@pytest.mark.parametrize(
    ("ranks", "tied", "words"),
    [
        ([1, 2, 3], (), "with no other image"),
        ([1, 2, 3], (1, 2), "with all others"),
        ([1, 2, 3], (1,), "with rank 2"),
        ([1, 2, 3, 4], (1, 3), "with ranks 2, 4"),
        ([1, 2, 3, 4, 5, 6], (1, 2, 3, 5), "with ranks 2 to 4, 6"),
        ([1, 2, 2, 4, 5], (1, 2, 3), "with ranks 2, 4"),
        ([1, *range(2, 14)], (1, 3, 5, 7, 9, 11), "with ranks 2, 4, 6, 8, and 2 more"),
    ],
)
def test_ties(ranks: list[int], tied: tuple[int, ...], words: str) -> None:
    ranking = ranking_of(ranks, tied)
    assert ties_in_words(ranking, ranking.images[0]) == f"tied {words}"


def test_ties_of_many_images_are_those_near() -> None:
    """A ranking of many looks for ties near in the order alone, and says so where it names the best."""
    ranking = rank_images(601, [])
    result = Ranking("x", tuple(Path(f"{i}.png") for i in range(601)), ranking, (), 1.0)
    assert ties_in_words(result, result[0]) == "tied with rank 1"
    best = best_in_words(result)
    assert best == "No image is clearly the best: 0.png comes first, but is tied with rank 1, of the nearest 16."
    # By scores all ties are known.
    assert best_in_words(replace(result, orders=BY_SCORES)) == best.replace(", of the nearest 16", "")


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.data())
def test_ranks_in_a_row(steps: list[bool], data: st.DataObject) -> None:
    """As by going through all ranks that there are: images of equal strength share one."""
    ranks = [1]
    for place, is_weaker in enumerate(steps, 2):
        ranks.append(place if is_weaker else ranks[-1])
    tied = tuple(data.draw(st.sets(st.integers(0, len(steps)))))
    wanted = {ranks[other] for other in tied}
    rows = [list(row) for each, row in itertools.groupby(sorted({*ranks}), wanted.__contains__) if each]
    parts = [part for row in rows for part in ([f"{row[0]} to {row[-1]}"] if len(row) > 2 else map(str, row))]
    ranking = ranking_of(ranks, tied)
    assert tied_ranks(ranking, ranking.images[0]) == few(parts, 4)

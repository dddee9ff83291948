"""What a ranking settles, in words."""

from types import SimpleNamespace
from typing import Any

import pytest

from mlxpref.report.ranking_words import ties_in_words


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
    images = [SimpleNamespace(index=i, rank=rank, tied_with=tied) for i, rank in enumerate(ranks)]
    ranking: Any = SimpleNamespace(images=images, strengths=SimpleNamespace(images=images))
    first: Any = images[0]
    assert ties_in_words(ranking, first) == f"tied {words}"

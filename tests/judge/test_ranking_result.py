"""A ranking of many images answers for each without going through all pairs, and says the same."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.ranking_result import JudgedPair, Ranking, Reason
from mlxpref.ranking.outcomes import all_pairs
from mlxpref.ranking.strength_ranking import RankedImage, rank_images
from mlxpref.verdict import Verdict
from tests.conftest import read_verdict


def random_ranking(seed: int) -> Ranking:
    """Some pairs of some images; each order has up to two completions, some without reasoning, some unreadable."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 9))

    def completions(name: str) -> Iterator[Verdict]:
        for number in range(rng.integers(0, 3)):
            p, text = float(np.round(rng.random(), 1)), f"{name} {number}" * int(rng.random() < 0.7)
            yield read_verdict(f"<think>{text}</think><answer>", *((p, 1 - p) if rng.random() < 0.9 else (0.0, 0.0)))

    pairs = []
    for a, b in all_pairs(count):
        if rng.random() < 0.6:
            first, second = ((a, b) if rng.random() < 0.5 else (b, a)) if rng.random() < 0.5 else (a, b)
            verdict = PairVerdict(tuple(completions(f"{a} {b}")), tuple(completions(f"{b} {a}")))
            pairs.append(JudgedPair(first, second, verdict, think=True))
    outcomes = [pair.verdict.outcome(pair.a, pair.b) for pair in pairs if pair.verdict.is_readable]
    images = tuple(Path(f"{i}.png") for i in range(count))
    return Ranking("x", images, rank_images(count, outcomes), tuple(pairs), 1.0, modes=(True,))


def reason_by_definition(ranking: Ranking, image: RankedImage, won: bool) -> Reason | None:
    """The clearest reasoning of all comparisons, looked for in each."""
    clearest, reason = 0.0, None
    for pair in ranking.pairs:
        p_a = ranking.preference(pair)
        clearness = p_a if (pair.a == image.index) == won else 1 - p_a
        for first, second, verdicts in (
            (pair.a, pair.b, pair.verdict.a_shown_first),
            (pair.b, pair.a, pair.verdict.a_shown_second),
        ):
            if image.index not in (first, second):
                continue
            shares = [(verdict.p_first("soft"), verdict.reasoning) for verdict in verdicts]
            said = [
                (p if (first == image.index) == won else 1 - p, text) for p, text in shares if p is not None and text
            ]
            share, text = max(said, key=lambda each: each[0], default=(0.0, None))
            if text and share > 0.5 and clearness > clearest:
                clearest, reason = clearness, Reason(first, second, text)
    return reason


@pytest.mark.parametrize("seed", range(40))
def test_a_reason_is_the_clearest_of_all_pairs(seed: int) -> None:
    ranking = random_ranking(seed)
    for image in ranking:
        upper = image.rank <= (len(ranking) + 1) // 2
        expected = reason_by_definition(ranking, image, upper) or reason_by_definition(ranking, image, not upper)
        assert ranking.reason(image) == expected
        assert ranking.ranks[image.index] == image.rank
        assert ranking.pairs_of[image.index] == [p for p in ranking.pairs if image.index in (p.a, p.b)]


def test_json_that_is_made_as_it_is_read() -> None:
    ranking = random_ranking(1)
    lazy = ranking.lazy_json()
    names = [name for name, value in lazy.items() if isinstance(value, Iterator)]
    assert names == ["images", "pairs", "replaced"]
    read = {name: list(value) if isinstance(value, Iterator) else value for name, value in lazy.items()}
    assert json.dumps(read) == json.dumps(ranking.to_json())
    assert len(read["images"]) == len(ranking)
    assert len(read["pairs"]) == len(ranking.pairs) > 0

"""Warnings about a ranking: each where it belongs, and none where there is nothing to warn about."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from mlxpref.judge.mode_fit import fit_of_mode, is_contradicted
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.rank import rank_pairs
from mlxpref.judge.ranking_result import Ranking
from mlxpref.preferences import Pair
from mlxpref.verdict import Verdict
from tests.judge.test_rank import Rater


def ranked(rater: Rater) -> Ranking:
    return rank_pairs(rater.images, "a hat", rater, "all")


def test_clear_judge_has_no_remark() -> None:
    assert ranked(Rater(8)).warnings == ()


@pytest.mark.parametrize(("bias", "place"), [(5.0, "first"), (-5.0, "second")])
def test_a_judge_that_goes_by_place(bias: float, place: str) -> None:
    (warning,) = ranked(Rater(8, scale=1.0, bias=bias)).warnings
    assert warning.startswith(f"the judge goes by place more than by picture: it favours the {place} one by ")


def test_a_judge_that_cannot_tell() -> None:
    (warning,) = ranked(Rater(8, scale=0.01)).warnings
    assert warning == ("the judge can hardly tell these images apart: of 16 pairs, 16 came out between 40 and 60 %")


class Thinker(Rater):
    """It can tell images apart when it thinks, and hardly at once."""

    def verdict(self, log_odds: float, text: str, thinks: bool) -> Verdict:  # type: ignore[override]
        return super().verdict(log_odds if thinks else 0.01 * log_odds, text, thinks)


def test_a_judge_that_must_think() -> None:
    judge = Thinker(24)
    (warning,) = rank_pairs(judge.images, "a hat", judge, "top").warnings
    assert warning.startswith("which images the judge thought about is mostly by chance, as it can hardly tell them ")
    assert warning.endswith(" came out between 40 and 60 %; --think-about all thinks about every pair")
    assert not rank_pairs(judge.images, "a hat", judge, "all").warnings


class Unlike(Rater):
    """At once it sees each image otherwise than when it thinks, by so much."""

    def __init__(self, unlike: float) -> None:
        super().__init__(30, scale=1.0)
        rng = np.random.default_rng(4)
        self.views = {False: self.strengths + unlike * rng.normal(size=30), True: self.strengths}
        self.noise = rng

    def __call__(self, pairs: Iterable[Pair], thinks: bool, orders: int) -> Iterator[PairVerdict]:
        self.strengths = self.views[thinks]
        yield from super().__call__(pairs, thinks, orders)

    def verdict(self, log_odds: float, text: str, thinks: bool) -> Verdict:  # type: ignore[override]
        return super().verdict(log_odds + 0.2 * float(self.noise.normal()), text, thinks)


@pytest.mark.parametrize(("unlike", "warns"), [(0.0, False), (1.5, True)])
def test_answers_at_once_that_contradict_thinking(unlike: float, warns: bool) -> None:
    judge = Unlike(unlike)
    ranking = rank_pairs(judge.images, "a hat", judge, "top")
    contradictions = [line for line in ranking.warnings if "contradicts what it thinks" in line]
    assert len(contradictions) == warns
    assert is_contradicted(ranking) == warns
    alone = fit_of_mode(ranking, True).reference.noise.pair
    assert (ranking.strengths.fit.reference.noise.pair > 4 * alone) == warns
    assert not rank_pairs(judge.images, "a hat", judge, "all").warnings


class Faulty(Rater):
    """Every third answer is not given, every second completion is cut off, or an answer gets little probability."""

    def __init__(self, fault: str) -> None:
        super().__init__(6)
        self.fault, self.said = fault, 0

    def verdict(self, log_odds: float, text: str, thinks: bool) -> Verdict:  # type: ignore[override]
        self.said += 1
        p = float(1 / (1 + np.exp(-log_odds)))
        if self.fault == "unreadable" and self.said % 3 == 0:
            return Verdict(text, tokens=3)
        mass = 0.1 if self.fault == "mass" else 1.0
        return Verdict(text, mass * p, mass * (1 - p), self.fault == "closed" and self.said % 2 == 0, 3)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("unreadable", "8 of 24 answers could not be read and count for nothing"),
        ("closed", "12 of 24 completions ran out of tokens and were closed there: "),
        ("mass", "the judge gave only 10% of its probability to an answer at all: "),
    ],
)
def test_faulty_answers_are_counted(fault: str, expected: str) -> None:
    (warning,) = ranked(Faulty(fault)).warnings
    assert warning.startswith(expected)


def test_remarks_in_the_json() -> None:
    ranking = ranked(Faulty("closed"))
    assert ranking.to_json()["remarks"] == list(ranking.warnings)
    assert isinstance(ranking.pairs[0].verdict, PairVerdict)

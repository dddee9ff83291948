"""The metrics by hand-computed cases, by the plainest loops, and on the votes of real judges."""

import csv
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mlxpref.judge.metrics import (
    agreement,
    both_orders,
    calibration_error,
    first_choice_rate,
    human_agreement,
    interval,
    measure,
)
from mlxpref.ranking.intervals import share_interval

NAN = math.nan
P_FIRST = {"1": 1.0, "2": 0.0, "=": 0.5, "-": NAN}


def votes() -> dict[str, str]:
    """Who voted what on 1,735 pairs, see data/votes.md."""
    with (Path(__file__).parents[1] / "fixtures" / "votes.csv").open(encoding="utf-8", newline="") as file:
        return {row["who"]: row["votes"] for row in csv.DictReader(file)}


def p_first(letters: str) -> np.ndarray:
    return np.array([P_FIRST[letter] for letter in letters])


@pytest.mark.parametrize(
    ("judge", "rate"),
    [("llava", 1.0), ("cogvlm", 1.0), ("minicpm-V-2.5", 0.980), ("gpt4o", 0.555), ("gemini-1.5-pro", 0.391)],
)
def test_the_position_bias_of_real_judges(judge: str, rate: float) -> None:
    letters = votes()[judge]
    assert len(letters) == 1735
    assert first_choice_rate(p_first(letters)) == letters.count("1") / (letters.count("1") + letters.count("2"))
    assert first_choice_rate(p_first(letters)) == pytest.approx(rate, abs=5e-4)


@pytest.mark.parametrize("judge", ["llava", "gpt4o", "idefics2", "videollava"])
def test_a_judge_that_saw_one_order(judge: str) -> None:
    people = p_first(votes()["people"])
    decided = people != 0.5
    p = p_first(votes()[judge])[decided]
    metrics = measure(p, np.full(len(p), NAN), people[decided], [str(i) for i in range(len(p))])
    pairs = [(a, b) for a, b in zip(votes()[judge], votes()["people"], strict=True) if b in "12"]
    first = [a for a, _ in pairs if a in "12"].count("1")
    assert metrics.pairs == len(pairs) == 1306
    assert metrics.accuracy == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert metrics.first_choice_rate == pytest.approx(first / len([a for a, _ in pairs if a in "12"]))
    assert metrics.first_image_baseline == pytest.approx(sum(b == "1" for _, b in pairs) / len(pairs))
    assert metrics.both_orders_accuracy == metrics.position_consistency == 0


def test_undecided_judges_have_no_first_choice() -> None:
    assert math.isnan(first_choice_rate(np.array([0.5, NAN])))
    assert first_choice_rate(np.array([0.5, NAN, 0.7, 0.6, 0.1])) == pytest.approx(2 / 3)


def test_unreadable_order_leaves_the_other() -> None:
    first, second = np.array([0.8, NAN, 0.2, NAN]), np.array([NAN, 0.3, 0.8, NAN])
    assert both_orders(first, second) == pytest.approx([0.8, 0.3, 0.5, 0.5])
    # Undecided or unreadable agrees with nobody.
    assert agreement(first, np.array([True, True, False, False])).tolist() == [True, False, True, False]
    metrics = measure(first, second, np.array([1.0, 1.0, 0.0, 0.0]), list("wxyz"))
    assert metrics.accuracy == pytest.approx(1 / 4)
    assert metrics.both_orders_accuracy == metrics.position_consistency == 0
    assert metrics.brier == pytest.approx((0.2**2 + 0.7**2 + 0.5**2 + 0.5**2) / 4)


def test_labels_may_differ_from_the_majority() -> None:
    p, people = np.array([0.9, 0.9]), np.array([0.5, 0.4])
    metrics = measure(p, p, people, ["x", "x"], a_is_better=np.array([True, True]))
    assert (metrics.accuracy, metrics.first_image_baseline) == (1, 1)
    assert metrics.brier == pytest.approx((0.4**2 + 0.5**2) / 2)


def test_human_agreement_by_counting() -> None:
    rng = np.random.default_rng(0)
    ranks = [[list(rng.permutation(9)) for _ in range(10)] for _ in range(15)]
    shares, agreeing = [], []
    for raters in ranks:
        for i, j in combinations(range(9), 2):
            ballots = [rank[i] < rank[j] for rank in raters]
            shares.append(sum(ballots) / 10)
            agreeing.append(np.mean([x == y for x, y in combinations(ballots, 2)]))
    assert human_agreement(np.array(shares), np.full(len(shares), 10)) == pytest.approx(np.mean(agreeing))
    # 10:0 all agree; 1:1 nobody does; 2:1 one of three; a single vote says nothing.
    assert human_agreement(np.array([1.0, 0.5, 2 / 3, 1.0]), [10, 2, 3, 1]) == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert math.isnan(human_agreement(np.array([1.0]), [1]))


def test_the_calibration_error_of_one_bin_by_hand() -> None:
    # Both lie in 0.7..0.8: on average 0.75 is said, 0.5 of the people agree.
    assert calibration_error(np.array([0.72, 0.78]), np.array([0.0, 1.0])) == pytest.approx(0.25)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0


def test_interval_against_a_bootstrap_in_loops() -> None:
    rng = np.random.default_rng(1)
    total, size = rng.integers(0, 5, 30), np.full(30, 5)
    random = np.random.default_rng(2)
    shares = []
    for _ in range(4000):
        indices = [int(random.integers(30)) for _ in range(30)]
        shares.append(sum(total[i] for i in indices) / sum(size[i] for i in indices))
    assert interval(total, size) == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.01)
    assert interval(total, size) == interval(total, size)
    assert interval([3], [4]) == (0.75, 0.75)


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    total, size = np.arange(40) % 3, np.full(40, 2)
    whole = interval(total, size)
    monkeypatch.setattr("mlxpref.judge.metrics.DRAWN_TOGETHER", 120)
    assert interval(total, size) == whole


def test_interval_of_nothing() -> None:
    assert share_interval(0, 0) == (0.0, 1.0)
    assert share_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson's, by hand


def test_intervals_are_at_least_wilsons() -> None:
    for groups in (["one"] * 8, ["one"] * 4 + ["two"] * 4, [str(i) for i in range(8)]):
        right = np.array([0.9] * 8)
        metrics = measure(right, right, np.ones(8), groups)
        assert metrics.accuracy == 1
        assert (metrics.accuracy_low, metrics.accuracy_high) == pytest.approx(share_interval(8, 8))

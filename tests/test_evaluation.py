"""The metrics of `eval`, by hand-computed cases and by independent arithmetic."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxpref.demo.preferences import demo_preferences
from mlxpref.errors import DataError
from mlxpref.evaluation import Metrics, evaluate, measure
from mlxpref.judge import Judge
from mlxpref.ranking import soft_preference

CONTRACT = [
    "data", "split", "protocol", "strategy", "pairs", "ties_dropped", "accuracy", "accuracy_low", "accuracy_high",
    "accuracy_macro", "both_orders_accuracy", "position_consistency", "first_choice_rate", "first_image_baseline",
    "brier", "ece", "unreadable", "tokens", "seconds",
]  # fmt: skip


def measured(first: list[float], second: list[float], people: list[float], groups: list[str] | None = None) -> Metrics:
    return measure(np.array(first), np.array(second), np.array(people), groups or [str(i) for i in range(len(first))])


def test_a_hand_computed_case() -> None:
    metrics = measured([0.9, 0.8, 0.2, 0.6], [0.9, 0.3, 0.3, 0.4], [1, 1, 1, 0], ["x", "x", "x", "y"])
    # Log-odds sums: +, 0.539 > 0, -, exactly 0 (undecided, so wrong).
    assert metrics.accuracy == pytest.approx(2 / 4)
    assert metrics.accuracy_macro == pytest.approx((2 / 3 + 0) / 2)
    assert metrics.both_orders_accuracy == pytest.approx(1 / 4)
    assert metrics.position_consistency == pytest.approx(2 / 4)
    # First chosen: with a first 3 of 4; with b first where p_a < 0.5: 3 of 4.
    assert metrics.first_choice_rate == pytest.approx(6 / 8)
    assert metrics.first_image_baseline == pytest.approx(3 / 4)


def test_brier_and_calibration_error_by_plain_loops() -> None:
    rng = np.random.default_rng(0)
    first, second, people = rng.random((3, 200))
    metrics = measure(first, second, people, ["g"] * 200)
    p = [float(soft_preference(x, y)) for x, y in zip(first, second, strict=True)]
    assert metrics.brier == pytest.approx(sum((q - y) ** 2 for q, y in zip(p, people, strict=True)) / 200)
    sides = [(q, y) for q, y in zip(p, people, strict=True)] + [(1 - q, 1 - y) for q, y in zip(p, people, strict=True)]
    error = 0.0
    for low in range(10):
        inside = [(q, y) for q, y in sides if low / 10 <= q < (low + 1) / 10 or (low == 9 and q == 1)]
        if inside:
            error += abs(sum(q for q, _ in inside) / len(inside) - sum(y for _, y in inside) / len(inside)) * len(
                inside
            )
    assert metrics.ece == pytest.approx(error / 400)


def test_a_perfectly_calibrated_judge_has_no_calibration_error() -> None:
    people = np.array([0.1, 0.3, 0.6, 0.8, 0.95])
    metrics = measure(people, people, people, list("abcde"))
    assert metrics.brier == pytest.approx(0)
    assert metrics.ece == pytest.approx(0)
    assert metrics.accuracy == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0.01, 0.99)] * 3), min_size=1, max_size=30), st.randoms())
def test_nothing_but_the_baseline_depends_on_which_image_is_called_a(
    rows: list[tuple[float, float, float]], random: np.random.Generator
) -> None:
    rows = [(x, y, 0.6 if z == 0.5 else z) for x, y, z in rows]
    turned = [random.random() < 0.5 for _ in rows]
    other = [(1 - y, 1 - x, 1 - z) if turn else (x, y, z) for turn, (x, y, z) in zip(turned, rows, strict=True)]
    one, two = (measured(*[list(column) for column in zip(*r, strict=True)]) for r in (rows, other))
    for name in Metrics.__dataclass_fields__:
        if name not in ("first_image_baseline", "ece"):  # a value on a bin's edge may change its bin by rounding
            assert getattr(one, name) == pytest.approx(getattr(two, name)), name


def test_the_interval_is_that_of_groups_not_of_pairs() -> None:
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(40) < 0.6, 10)
    p = np.where(right, 0.9, 0.1)
    clustered = measure(p, p, np.ones(400), [str(i // 10) for i in range(400)])
    single = measure(p, p, np.ones(400), [str(i) for i in range(400)])
    width = clustered.accuracy_high - clustered.accuracy_low
    # Ten pairs of a group always agree: the interval of 40 draws, about 2 * 1.96 * sqrt(.24 / 40).
    assert width == pytest.approx(2 * 1.96 * np.sqrt(0.24 / 40), rel=0.15)
    assert single.accuracy_high - single.accuracy_low == pytest.approx(width / np.sqrt(10), rel=0.15)
    assert clustered.accuracy_low < clustered.accuracy < clustered.accuracy_high


def test_a_judge_that_always_says_first_is_seen_through() -> None:
    people = np.array([1.0] * 59 + [0.0] * 41)
    metrics = measure(np.full(100, 0.9), np.full(100, 0.1), people, [str(i) for i in range(100)])
    assert metrics.first_image_baseline == pytest.approx(0.59)
    assert metrics.accuracy == 0  # both orders cancel: it has no opinion
    assert metrics.position_consistency == 0
    assert metrics.first_choice_rate == 1


def test_evaluating_drops_ties_and_reports_the_contract(demo_judge: Callable[..., Judge]) -> None:
    preferences = demo_preferences("test", 6)
    tied = [replace(preferences[0], p_a=0.5), *preferences[1:]]
    evaluation = evaluate(demo_judge(think=False), tied, "demo", "test")
    report = evaluation.to_json()
    assert list(report) == CONTRACT
    assert report["pairs"] == 5
    assert report["ties_dropped"] == 1
    assert report["unreadable"] == 0
    with pytest.raises(DataError, match="no preference"):
        evaluate(demo_judge(), tied[:1], "demo", "test")


def test_strategies_read_what_they_are_asked_to(demo_judge: Callable[..., Judge]) -> None:
    preferences = demo_preferences("test", 4)
    judge = demo_judge(max_tokens=60)
    for strategy in ("soft", "select", "score"):
        verdicts = list(judge.pairs([]))
        assert verdicts == []
        report = evaluate(judge, preferences, "demo", "test", strategy).to_json()  # type: ignore[arg-type]
        assert report["strategy"] == strategy
        assert report["tokens"] > 0

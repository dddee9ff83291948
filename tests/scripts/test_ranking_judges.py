"""Simulated judges answer as their settings say, and every bench of rankings runs on little."""

import json
from itertools import product

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.special import expit

from scripts import (
    ranking_best,
    ranking_coverage,
    ranking_instruments,
    ranking_judges,
    ranking_orders,
    ranking_scale,
    ranking_strategies,
    ranking_top,
)
from scripts.ranking_judges import Judge, fit_of_all, held, people, ranked, tau_a


def results_of(bench, *arguments):
    """The JSON of a bench, which comes after its tables."""
    result = CliRunner().invoke(bench.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.rstrip("\n").rsplit("\n", 1)[1])


# Judges


def shares(judge, count=60):
    """The mean answers of equal images with a shown first and second."""
    answers = judge.answers(np.zeros(count), np.random.default_rng(0)).values()
    return tuple(np.mean([[one.p_a_shown_first, one.p_a_shown_second] for one in answers], axis=0))


@pytest.mark.parametrize("judge", [people(3, bias=1.0), Judge(pair=0.01, order=0.01, bias=1.0)])
def test_a_biased_judge_favours_the_first_place(judge):
    assert shares(judge) == pytest.approx((expit(1), expit(-1)), abs=0.02)


def test_votes_are_shares_and_hard_answers_are_sure():
    strengths = np.random.default_rng(1).normal(0, 1, 20)
    for judge, possible in (
        (people(3), {0, 1 / 3, 2 / 3, 1}),
        (people(3, margin=0.01), {0.01, 1 / 3, 2 / 3, 0.99}),
        (people(3, hard=True), {0, 1}),
        (Judge(hard=True), {0, 1}),
    ):
        answers = judge.answers(strengths, np.random.default_rng(0)).values()
        assert {p for one in answers for p in (one.p_a_shown_first, one.p_a_shown_second)} == possible


def test_noise_and_bias_have_their_deviations():
    """The mean of the orders has the noise of the pair, half their difference the bias."""
    judge = Judge(pair=0.7, order=0.0, bias=0.5, bias_deviation=2.0)
    answers = judge.answers(np.zeros(80), np.random.default_rng(0)).values()
    first, second = np.array([[one.p_a_shown_first, one.p_a_shown_second] for one in answers]).T
    first, second = np.log(first / (1 - first)), np.log(second / (1 - second))
    assert ((first + second) / 2).std() == pytest.approx(0.7, rel=0.05)
    assert ((first - second) / 2).std() == pytest.approx(2.0, rel=0.05)
    assert ((first - second) / 2).mean() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("orders", ["both", "one", "auto"])
def test_the_product_gets_the_answers_in_the_order_that_it_asks(orders):
    """All are answered as the judge answers them: a nearly noiseless one, with a strong bias, gives its order."""
    judge = Judge(pair=0.01, order=0.01, bias=3.0)
    truth = judge.strengths(12, np.random.default_rng(5))
    answers = judge.answers(truth, np.random.default_rng(6))
    ranking = ranked(12, answers, 0, orders=orders)
    assert tau_a(ranking.strengths.fit.strengths, -truth) > 0.9
    assert ranking.strengths.position_bias == pytest.approx(3.0, abs=0.3)
    for pair in ranking.pairs:
        own = answers[pair.a, pair.b]
        for said, true in (
            (pair.verdict.p_a_shown_first, own.p_a_shown_first),
            (pair.verdict.p_a_shown_second, own.p_a_shown_second),
        ):
            assert said is None or said == pytest.approx(true, abs=1e-12)


def test_what_intervals_hold():
    truth = np.array([3.0, 0.0, -3.0])
    fit = fit_of_all(3, Judge(pair=0.01, order=0.01).answers(truth, np.random.default_rng(0)))
    assert held(fit, truth)["tau"] == 1
    assert held(fit, -truth) | {"resolved": 1} == {
        "strengths": 1 / 3,
        "differences": 0,
        "resolved": 1,
        "wrong": 1,
        "tau": -1,
    }


def test_a_table_puts_values_under_their_keys(capsys):
    ranking_judges.table([{"a": 1, "b": "x"}, {"b": "y", "a": 2}, {"b": "z"}], "rows")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["1", "x"], ["2", "y"], ["z"]]


# Benches


def test_coverage():
    rows = results_of(ranking_coverage, "--repeats", 1, "--judge", "pair 0.3")["coverage"]
    named = [(row["judge"], row["bias_sd"], row["pairs"]) for row in rows]
    assert named == list(product(["soft, pair 0.3"], [0, 0.5, 1, 2, 4], ["auto", "both", "all"]))
    assert np.mean([row["differences"] for row in rows]) > 0.7
    for row in rows:
        # Of such a judge the bias of a pair leaves the mean of the orders alone, so the fit is that of the mean.
        assert row["pairs"] == "auto" or row["tau_p_a"] == pytest.approx(row["tau"], abs=0.06)


def test_other_judges_and_ways():
    rows = ranking_coverage.coverage("hard", ranking_coverage.UNLIKE["hard"], 1)
    assert [row["pairs"] for row in rows] == ["auto", "both", "all"]
    ways = ranking_coverage.ways(1.0, 1)
    assert [row["way"] for row in ways] == ["fixed", "product", "top 1", "swiss"]
    assert [(row["images"], row["comparisons"]) for row in ranking_coverage.times([100])] == [(100, 400)]


def test_orders():
    rows = results_of(ranking_orders, "--repeats", 1, "--images", "4,12")["orders"]
    assert [(row["bias"], row["bias_sd"]) for row in rows] == 2 * list(ranking_orders.BIASES)
    assert all(row["auto"] == row["both"] and not row["one_order"] for row in rows if row["images"] == 4)
    assert any(row["one_order"] for row in rows if row["images"] == 12)
    for row in rows:
        assert row["auto_less_better"] == pytest.approx(row["auto"] - max(row["both"], row["one"]), abs=2e-4)


def test_best():
    actual = results_of(ranking_best, "--repeats", 2, "--images", "2,3", "--draw-repeats", 1)
    assert {(row["images"], row["known"]) for row in actual["together"]} == {(2, ""), (3, ""), (3, "yes")}
    assert all(row["from_compare"] < 0.02 for row in actual["best"] if row["images"] == 2)
    assert {row["images"] for row in actual["draws"]} == {2, 3, 8, 32}
    assert all(row["largest_error"] < 0.02 for row in actual["draws"])


def test_instruments(monkeypatch):
    monkeypatch.setattr(ranking_instruments, "SETTINGS", ranking_instruments.SETTINGS[:3])
    rows = results_of(ranking_instruments, "--repeats", 1, "--images", "16")["instruments"]
    assert [(row["read"], row["think"]) for row in rows[:2]] == [("1/0.7/0", "1/0.3/0"), ("0.3/0.7/0", "1/0.3/0")]
    assert all(row["top"] > 0.5 for row in rows)
    assert all(row["scale"] == pytest.approx(1, rel=0.8) for row in rows)


def test_top(monkeypatch):
    monkeypatch.setattr(ranking_top, "LIMITS", (0.25, 1.0))
    rows = results_of(ranking_top, "--repeats", 1)["top"]
    assert [row["judge"] for row in rows[::2]] == list(ranking_top.JUDGES)
    assert all(row["asked"] <= row["limit"] + 0.01 for row in rows)
    assert any(row["settled"] and row["found"] for row in rows)


def test_the_best_of_many():
    rows = results_of(ranking_strategies, "--repeats", 1, "--images", 120)["best_of_many"]
    assert [row["way"] for row in rows] == ["ours", "knockout", "random", "bound"]
    assert all(row["recall"] > 0.4 for row in rows)
    assert rows[0]["rounds"] > 3
    missing = CliRunner().invoke(ranking_strategies.main, [])
    assert missing.exit_code == 2
    assert "DATA_FOLDER" in missing.output


def test_scale(monkeypatch):
    monkeypatch.setattr(ranking_scale, "memory", lambda _: 0)  # Linux alone says it
    row = ranking_scale.of_images(20, 1)
    assert row["images"] == 20
    assert 0.7 < row["strengths"] <= 1

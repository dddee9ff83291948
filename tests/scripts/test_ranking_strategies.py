"""The benches of strategies and of coverage run on little, and their parts do what they say."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.ranking.bradley_terry import fit_strengths
from mlxpref.ranking.outcomes import PairOutcome, all_pairs
from scripts import ranking_coverage as figures
from scripts import ranking_strategies as bench

COUNT = 6


@pytest.fixture
def folder(tmp_path):
    """Two prompts of six images; the raters of the first agree, those of the second differ."""
    rng = np.random.default_rng(0)
    rows = []
    for noise in (0.0, 1.5):
        order = rng.permutation(COUNT)
        ranks = [(order + rng.normal(0, noise, COUNT)).argsort().argsort() + 1 for _ in range(10)]
        row = {"prompt": "p", "image_path": [f"{i}.jpg" for i in range(COUNT)], "rank": (order + 1).tolist()}
        rows.append(row | {"raw_annotations": [{"rank": rank.tolist(), "user_hash": "x"} for rank in ranks]})
    (tmp_path / "test.json").write_text(json.dumps(rows))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(bench.main, [str(argument) for argument in arguments], catch_exceptions=False)


def sure_answers(order):
    """Of a judge who always says the same: the earlier in the order wins."""
    place = {image: i for i, image in enumerate(order)}
    return {(a, b): PairOutcome(a, b, *[float(place[a] < place[b])] * 2) for a, b in all_pairs(len(order))}


def test_json_has_every_strategy(folder):
    result = run(folder, "--repeats", 2, "--biased-repeats", 1)
    assert result.exit_code == 0, result.stderr
    assert "raters, 3 votes, soft: 4 of 4" in result.stderr
    table, last = result.stdout.rstrip("\n").rsplit("\n", 1)
    assert "Judge: biased" in table
    actual = json.loads(last)
    for key, cases in (
        ("strategies", {(1, False), (1, True), (3, False), (3, True)}),
        ("biased_judge", {(3, False), (3, True)}),
    ):
        rows = actual[key]
        assert {(row["votes"], row["soft"]) for row in rows} == cases
        for case in cases:
            assert {row["name"] for row in rows if (row["votes"], row["soft"]) == case} == set(bench.STRATEGIES)
        assert all(-1 <= row["tau"] <= 1 and 0 <= row["top1"] <= row["top1_tied"] <= 1 for row in rows)
        pairs = {name: {row["comparisons"] for row in rows if row["name"] == name} for name in ("ours", "all pairs")}
        assert pairs == {"ours": {6.0, 8.0, 12.0}, "all pairs": {15.0}}
    assert json.loads(run(folder, "--repeats", 2, "--biased-repeats", 1).stdout.rsplit("\n", 2)[1]) == actual


def test_folder_without_test_json(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "no test.json in HPDv2's layout" in result.stderr


@pytest.mark.parametrize("name", list(bench.STRATEGIES))
def test_a_judge_without_noise_gets_its_order(name):
    """Once all pairs are asked; the merge sort needs fewer."""
    rng = np.random.default_rng(3)
    for seed in range(5):
        order = rng.permutation(8).tolist()
        results = bench.STRATEGIES[name](8, sure_answers(order), [28], seed)
        (pairs, strengths), *_ = results.items()
        assert np.argsort(-strengths).tolist() == order
        assert pairs <= 17 if name == "merge sort" else pairs == 28


def test_raters_are_drawn_once_each():
    ranks = np.array([[1, 2], [1, 2], [2, 1], [2, 1]])
    rng = np.random.default_rng(0)
    shares = [bench.rater_answers(ranks, 3, True, rng)[0, 1].p_a_shown_first for _ in range(400)]
    assert set(shares) == {1 / 3, 2 / 3}  # three of these four never agree
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert {bench.rater_answers(ranks, 3, False, rng)[0, 1].p_a_shown_first for _ in range(40)} == {0.0, 1.0}
    assert bench.rater_answers(ranks, 4, True, rng)[0, 1].p_a == pytest.approx(0.5)


def test_the_biased_judge_favours_the_first_place():
    rng = np.random.default_rng(0)
    answers = [bench.voted_answers(np.zeros(2), 3, True, rng)[0, 1] for _ in range(1000)]
    assert np.mean([answer.p_a_shown_first for answer in answers]) == pytest.approx(1 / (1 + np.exp(-1)), abs=0.03)
    assert np.mean([answer.p_a_shown_second for answer in answers]) == pytest.approx(1 / (1 + np.exp(1)), abs=0.03)


def test_measures():
    rank = np.array([1.0, 2.0, 3.0, 4.0])
    assert bench.tau_a(np.array([4.0, 3.0, 2.0, 1.0]), rank) == 1
    assert bench.tau_a(np.array([4.0, 3.0, 1.0, 2.0]), rank) == pytest.approx(4 / 6)
    assert bench.tau_a(np.zeros(4), rank) == 0
    assert bench.best_found(np.array([1.0, 5.0, 0.0, 0.0]), np.array([2.0, 1.0, 3.0, 4.0]))
    assert bench.best_found(np.array([1.0, 5.0, 0.0, 0.0]), np.array([1.5, 1.5, 3.0, 4.0]))
    assert not bench.best_found(np.array([5.0, 1.0, 0.0, 0.0]), np.array([2.0, 1.0, 3.0, 4.0]))


def test_swiss_pairs_unmet_neighbours():
    assert bench.swiss_round([3, 1, 0, 2], set(), 2) == [(1, 3), (0, 2)]
    assert bench.swiss_round([3, 1, 0, 2], {(1, 3), (0, 2)}, 2) == [(0, 1), (2, 3)]


# Coverage, settled tops, time


def test_json_of_the_second_bench():
    result = CliRunner().invoke(
        figures.main, ["--repeats", "2", "--top-repeats", "1", "--largest", "100"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.stderr
    actual = json.loads(result.stdout.rstrip("\n").rsplit("\n", 1)[1])
    held = actual["coverage"]
    names = ["fixed", "ours", "ours, top 1", "swiss"]
    assert [(row["deviation"], row["name"]) for row in held] == [(d, name) for d in (0.5, 1.0, 2.0) for name in names]
    assert all(0.6 < row["strengths"] <= 1 and 0.6 < row["differences"] <= 1 for row in held)
    assert all(row["pairs"] == 40 for row in held if row["name"] != "ours, top 1")
    assert [(row["answers"], row["deviation"]) for row in actual["top5"]] == list(figures.JUDGES)
    assert all(0 < row["stable_share"] <= (297 + 6) / 496 for row in actual["top5"])
    assert [(row["images"], row["pairs"]) for row in actual["time"]] == [(100, 200)]


def test_asking_until_a_budget_or_a_settled_top():
    answers = sure_answers([4, 2, 0, 1, 3, 5])
    for ask in (figures.ask_until, figures.ask_swiss):
        pairs, fit = ask(6, answers, 14, 0)
        assert len(pairs) == len(set(pairs)) == 14
        assert figures.top_of(fit.strengths, 2) == {4, 2}
    strengths = np.linspace(4, -4, 20)
    sure = {(a, b): PairOutcome(a, b, *[1 / (1 + np.exp(strengths[b] - strengths[a]))] * 2) for a, b in all_pairs(20)}
    assert len(figures.ask_until(20, sure, 190, 0, top=3)[0]) < 190


def test_top_is_found_when_it_stays_right(monkeypatch):
    """Ten images; the fits after 6, 12 and 18 pairs are given: right, wrong, right."""
    wrong, right = np.arange(10.0)[::-1], np.arange(10.0)
    strengths = iter([right, right, wrong, right])  # of all pairs, then of each round
    unsure = fit_strengths(10, [])
    monkeypatch.setattr(figures, "fit_of", lambda *_: replace(unsure, strengths=next(strengths)))
    result = figures.top_found(10, sure_answers(range(10)), right, 18, 0, 2)
    assert result["stable_share"] == 18 / 45
    assert (result["settled_share"], result["settled"]) == (18 / 45, 0)
    assert (result["stable"], result["right"], result["true"], result["all_true"]) == (1, 1, 1, 1)
    strengths = iter([right, right, right, wrong])
    result = figures.top_found(10, sure_answers(range(10)), wrong, 18, 0, 2)
    assert (result["stable_share"], result["stable"]) == (24 / 45, 0)
    assert (result["right"], result["true"], result["all_true"]) == (0, 1, 0)

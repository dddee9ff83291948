"""The bench of strategies runs on a small folder in HPDv2's layout, and its parts do what they say."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.ranking import PairOutcome, all_pairs
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


def test_the_last_line_has_every_strategy(folder):
    result = run(folder, "--repeats", 2, "--biased-repeats", 1)
    assert result.exit_code == 0, result.stderr
    assert "raters, 3 votes, soft: 4 of 4" in result.stderr
    table, last = result.stdout.rstrip("\n").rsplit("\n", 1)
    assert "Judge: biased" in table
    found = json.loads(last)
    for key, cases in (
        ("strategies", {(1, False), (1, True), (3, False), (3, True)}),
        ("biased_judge", {(3, False), (3, True)}),
    ):
        rows = found[key]
        assert {(row["votes"], row["soft"]) for row in rows} == cases
        for case in cases:
            assert {row["name"] for row in rows if (row["votes"], row["soft"]) == case} == set(bench.STRATEGIES)
        assert all(-1 <= row["tau"] <= 1 and 0 <= row["top1"] <= row["top1_tied"] <= 1 for row in rows)
        pairs = {name: {row["comparisons"] for row in rows if row["name"] == name} for name in ("ours", "all pairs")}
        assert pairs == {"ours": {6.0, 8.0, 12.0}, "all pairs": {15.0}}
    assert json.loads(run(folder, "--repeats", 2, "--biased-repeats", 1).stdout.rsplit("\n", 2)[1]) == found


def test_a_folder_without_test_json_is_said(tmp_path):
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


def test_raters_are_drawn_without_looking_and_each_at_most_once():
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


def test_swiss_asks_neighbours_that_have_not_met():
    assert bench._swiss_round([3, 1, 0, 2], set(), 2) == [(1, 3), (0, 2)]
    assert bench._swiss_round([3, 1, 0, 2], {(1, 3), (0, 2)}, 2) == [(0, 1), (2, 3)]


def test_the_rest_of_the_figures():
    asked, fit = bench.ask_until(6, sure_answers([4, 2, 0, 1, 3, 5]), 15, 0)
    assert len(asked) == 15
    assert bench.top_of(fit, 2) == {4, 2}
    assert len(bench.early_stop(1, top=2, count=6)) == 9
    held = bench.coverage(2, count=8)
    assert [row[0] for row in held] == ["fixed random pairs", "ours", "ours, stops when top 1 settled"]
    assert all(float(str(row[1]).rstrip("%")) > 50 for row in held)
    assert [row[:2] for row in bench.scheduling((10, 20))] == [[10, 20], [20, 40]]

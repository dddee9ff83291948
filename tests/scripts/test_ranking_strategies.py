"""The bench of strategies runs on little, and its parts do what they say."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.ranking.outcomes import PairOutcome, all_pairs
from scripts import ranking_strategies as bench
from scripts.ranking_judges import tau_a

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
    result = run(folder, "--repeats", 1, "--biased-repeats", 1)
    assert result.exit_code == 0, result.stderr
    assert "raters, 3 votes, soft: 2 of 2" in result.stderr
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
        names = ("ours", "swiss", "all pairs")
        asked = {name: {row["comparisons"] for row in rows if row["name"] == name} for name in names}
        assert asked == {"ours": {12.0, 16.0, 24.0}, "swiss": {12.0, 16.0, 24.0}, "all pairs": {30.0}}
    assert json.loads(run(folder, "--repeats", 1, "--biased-repeats", 1).stdout.rsplit("\n", 2)[1]) == actual


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
        results = bench.STRATEGIES[name](8, sure_answers(order), [56], seed)
        (comparisons, strengths), *_ = results.items()
        assert np.argsort(-strengths).tolist() == order
        assert comparisons <= 34 if name == "merge sort" else comparisons == 56


def test_raters_are_drawn_once_each():
    ranks = np.array([[1, 2], [1, 2], [2, 1], [2, 1]])
    rng = np.random.default_rng(0)
    shares = [bench.rater_answers(ranks, 3, True, rng)[0, 1].p_a_shown_first for _ in range(400)]
    assert set(shares) == {1 / 3, 2 / 3}  # three of these four never agree
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert {bench.rater_answers(ranks, 3, False, rng)[0, 1].p_a_shown_first for _ in range(40)} == {0.0, 1.0}
    assert bench.rater_answers(ranks, 4, True, rng)[0, 1].p_a == pytest.approx(0.5)


def test_measures():
    rank = np.array([1.0, 2.0, 3.0, 4.0])
    assert tau_a(np.array([4.0, 3.0, 2.0, 1.0]), rank) == 1
    assert tau_a(np.array([4.0, 3.0, 1.0, 2.0]), rank) == pytest.approx(4 / 6)
    assert tau_a(np.zeros(4), rank) == 0
    assert bench.best_found(np.array([1.0, 5.0, 0.0, 0.0]), np.array([2.0, 1.0, 3.0, 4.0]))
    assert bench.best_found(np.array([1.0, 5.0, 0.0, 0.0]), np.array([1.5, 1.5, 3.0, 4.0]))
    assert not bench.best_found(np.array([5.0, 1.0, 0.0, 0.0]), np.array([2.0, 1.0, 3.0, 4.0]))


def test_swiss_pairs_unmet_neighbours():
    assert bench.swiss_round([3, 1, 0, 2], set(), 2) == [(1, 3), (0, 2)]
    assert bench.swiss_round([3, 1, 0, 2], {(1, 3), (0, 2)}, 2) == [(0, 1), (2, 3)]

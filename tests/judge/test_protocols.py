"""The official definitions, by hand-computed cases and by independent code in the plainest form."""

import csv
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from mlxpref.data.catalog import CATALOG
from mlxpref.data.load import load_preferences
from mlxpref.errors import ConfigError
from mlxpref.judge.evaluation import EvaluationSpec, evaluate, evaluation_of
from mlxpref.judge.judge import Judge
from mlxpref.judge.protocols import (
    PROTOCOLS,
    THRESHOLDS,
    best_threshold,
    counted,
    credit,
    labels,
    official,
    protocol_of,
)
from mlxpref.preferences import Preference
from mlxpref.ranking.intervals import share_interval
from mlxpref.verdict import Verdict
from tests.data_layouts import make_layout


def pairs_of(scores: list[float], ranks: list[int]) -> tuple[list[float], list[float]]:
    """Predictions and labels of all pairs of a group, by an image's score (high is good) and rank (low is good)."""
    predicted, label = [], []
    for i, j in combinations(range(len(ranks)), 2):
        predicted.append(0.5 + 0.5 * np.sign(scores[i] - scores[j]))
        label.append(0.5 + 0.5 * np.sign(ranks[j] - ranks[i]))
    return predicted, label


def groups_of(groups: list[tuple[list[float], list[int]]], ties: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
    predicted, label, names = [], [], []
    for number, (scores, ranks) in enumerate(groups):
        for p, y in zip(*pairs_of(scores, ranks), strict=True):
            if ties or y != 0.5:
                predicted.append(p)
                label.append(y)
                names.append(f"prompt {number}")
    return np.array(predicted), np.array(label), names


def random_groups(seed: int, ties: bool) -> list[tuple[list[float], list[int]]]:
    """Groups of 4 to 10 images; with `ties`, of scores and of ranks too."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(4, 11, 25)
    if ties:
        return [([float(x) for x in rng.integers(0, 6, n)], [int(x) for x in rng.integers(1, 6, n)]) for n in sizes]
    return [([float(x) for x in rng.permutation(n)], [int(x) + 1 for x in rng.permutation(n)]) for n in sizes]


def test_imagereward_by_hand() -> None:
    # Ranks 1, 2, 2: the pair (1, 2) is a tie and dropped. Scores 3, 3, 1: (0, 1) is undecided, so wrong; (0, 2) right.
    p, label, names = groups_of([([3, 3, 1], [1, 2, 2]), ([1, 2], [1, 2])], ties=False)
    result = official("imagereward", p, label, names)
    assert len(p) == 3
    assert result.value == pytest.approx(1 / 3)


@pytest.mark.parametrize("seed", range(5))
def test_imagereward_by_loops(seed: int) -> None:
    groups = random_groups(seed, ties=True)
    correct = total = 0
    for scores, ranks in groups:
        for i in range(len(ranks)):
            for j in range(i + 1, len(ranks)):
                if ranks[i] < ranks[j]:
                    total, correct = total + 1, correct + (scores[i] > scores[j])
                elif ranks[i] > ranks[j]:
                    total, correct = total + 1, correct + (scores[i] < scores[j])
    result = official("imagereward", *groups_of(groups, ties=False))
    assert result.value == pytest.approx(correct / total)
    assert result.low < result.value < result.high


@pytest.mark.parametrize("seed", range(5))
def test_hpdv2_counts_inversions_within_prompts(seed: int) -> None:
    groups = random_groups(seed, ties=False)
    shares, taus = [], []
    for scores, ranks in groups:
        predicted = sorted(range(len(scores)), key=lambda i, scores=scores: -scores[i])
        places = [predicted.index(i) for i in range(len(scores))]
        inversions = sum(
            (places[i] > places[j] and ranks[i] < ranks[j]) or (places[i] < places[j] and ranks[i] > ranks[j])
            for i, j in combinations(range(len(ranks)), 2)
        )
        shares.append(1 - inversions / (len(ranks) * (len(ranks) - 1) / 2))
        taus.append((kendalltau(scores, [-rank for rank in ranks]).statistic + 1) / 2)
    result = official("hpdv2", *groups_of(groups, ties=False))
    assert result.value == pytest.approx(sum(shares) / len(shares)) == pytest.approx(sum(taus) / len(taus))
    # The groups are of 4 to 10 images, so that pairs by themselves give another number.
    assert result.value != pytest.approx(official("pairs", *groups_of(groups, ties=False)).value, abs=1e-6)


def test_hpdv2_credits_half_for_equal_scores() -> None:
    ranks = [2, 1, 3]
    first, second = (official("hpdv2", *groups_of([(s, ranks)], ties=False)).value for s in ([2, 3, 1], [3, 2, 1]))
    assert official("hpdv2", *groups_of([([2, 2, 1], ranks)], ties=False)).value == pytest.approx((first + second) / 2)


def test_hpdv3_is_strict() -> None:
    p, label = np.array([0.51, 0.5, 0.2, 0.8]), np.array([1.0, 1.0, 0.0, 0.0])
    assert official("hpdv3", p, label, list("abcd")).value == pytest.approx(2 / 4)


def test_pickapic_by_hand() -> None:
    p = np.array([0.9, 0.6, 0.5, 0.45, 0.1])
    label = np.array([1.0, 0.5, 0.0, 0.5, 1.0])
    # Threshold 0: right, tie missed, tie said, tie missed, wrong.
    assert credit("pickapic", p, label, 0.0).tolist() == [1, 0.5, 0.5, 0.5, 0]
    # Threshold 0.15 (0.45 is 0.1 away): the last tie is found.
    assert credit("pickapic", p, label, 0.15).tolist() == [1, 0.5, 0.5, 1, 0]
    # Threshold 0.3 finds both ties; 1 says nothing but ties.
    assert credit("pickapic", p, label, 0.3).tolist() == [1, 1, 0.5, 1, 0]
    assert credit("pickapic", p, label, 1.0).tolist() == [0.5, 1, 0.5, 1, 0.5]
    assert official("pickapic", p, label, list("abcde"), 0.3).value == pytest.approx(3.5 / 5)
    # 0.2 is the smallest that finds both ties; at 0.8 the right and the wrong one become ties: worth as much.
    assert credit("pickapic", p, label, 0.2).sum() == credit("pickapic", p, label, 0.8).sum() == 3.5
    assert best_threshold(p, label) == 0.2


def pickapic_by_loops(p: np.ndarray, label: np.ndarray, threshold: float) -> float:
    earned = 0.0
    for p_0, y in zip(p, label, strict=True):
        p_1 = 1 - p_0
        prediction = "tie" if abs(p_1 - p_0) <= threshold else "0" if p_0 > p_1 else "1"
        right = "tie" if y == 0.5 else "0" if y == 1 else "1"
        if prediction == right:
            earned += 1
        elif "tie" in (prediction, right):
            earned += 0.5
    return earned / len(p)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=40))
def test_pickapic_by_loops(rows: list[tuple[float, float]]) -> None:
    p, label = (np.array(column) for column in zip(*rows, strict=True))
    by_loops = [pickapic_by_loops(p, label, t / 10) for t in range(11)]
    for threshold, expected in zip(THRESHOLDS, by_loops, strict=True):
        assert official("pickapic", p, label, ["x"] * len(p), threshold).value == pytest.approx(expected)
    assert best_threshold(p, label) == by_loops.index(max(by_loops)) / 10


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_official_numbers_are_symmetric(protocol: str) -> None:
    rng = np.random.default_rng(3)
    p, label = rng.random(60).round(1), rng.integers(0, 2, 60).astype(float)
    turned = rng.random(60) < 0.5
    names = [str(i % 7) for i in range(60)]
    result = official(protocol, p, label, names, 0.25)
    other = official(protocol, np.where(turned, 1 - p, p), np.where(turned, 1 - label, label), names, 0.25)
    assert result.value == pytest.approx(other.value)
    assert (result.low, result.high) == pytest.approx((other.low, other.high))


def test_macro_interval() -> None:
    # One prompt of 400 pairs and 99 of one: the mean over prompts does not hang on the large one.
    label = np.ones(499)
    p = np.where(np.arange(499) < 400, 0.9, np.where(np.arange(499) % 2, 0.9, 0.1))
    names = ["large"] * 400 + [str(i) for i in range(99)]
    macro, micro = official("hpdv2", p, label, names), official("hpdv3", p, label, names)
    share = (1 + np.mean(p[400:] > 0.5) * 99) / 100
    assert macro.value == pytest.approx(share)
    assert macro.high - macro.low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 100), rel=0.1)
    assert micro.value > 0.85


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("right", [0, 5, 9])
def test_one_prompt_has_an_interval_with_width(protocol: str, right: int) -> None:
    """Never narrower than for independent pairs; a mean over one prompt is a mean over its pairs."""
    p = np.where(np.arange(9) < right, 0.9, 0.1)
    result = official(protocol, p, np.ones(9), ["one"] * 9)
    assert result.low <= result.value <= result.high
    assert (result.low, result.high) == pytest.approx(share_interval(right, 9))
    several = official(protocol, np.tile(p, 20), np.ones(180), [str(i // 9) for i in range(180)])
    assert (several.low, several.high) == pytest.approx(share_interval(20 * right, 180))


@pytest.mark.parametrize("seed", range(5))
def test_mmrb2_by_loops(seed: int) -> None:
    """As the authors count: what is asked forward and in reverse, one by one, without what has no judgement.

    A judgement is a letter in the order shown, and the letter of the reverse one is turned.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.choice(["A", "B"], 300)
    answers = rng.choice(["A", "B", "tie", ""], (2, 300), p=[0.5, 0.35, 0.05, 0.1])
    correct = evaluated = 0
    for truth, forward, reverse in zip(chosen, *answers, strict=True):
        if forward:
            evaluated += 1
            correct += forward == truth
        if reverse:
            evaluated += 1
            correct += {"A": "B", "B": "A"}.get(reverse, reverse) == truth
    value = {"A": 1.0, "B": 0.0, "tie": 0.5, "": np.nan}
    first = np.array([value[answer] for answer in answers[0]])
    second = np.array([1 - value[answer] for answer in answers[1]])
    label, names = (chosen == "A").astype(float), [str(i // 3) for i in range(300)]
    result = official("mmrb2", np.full(300, np.nan), label, names, orders=(first, second))
    assert result.value == pytest.approx(correct / evaluated)
    assert result.beside == {
        "judgements": evaluated, "of_judgements": 600, "value_missing_wrong": pytest.approx(correct / 600)
    }  # fmt: skip
    assert result.low < result.value < result.high
    assert f"{600 - evaluated} of 600 judgements are missing; {100 * correct / 600:.1f} % with" in result.in_words()


def test_mmrb2_counts_orders_and_not_pairs() -> None:
    """A judge that always says the first is right in half of its judgements, and undecided about every pair."""
    first, second, label = np.ones(8), np.zeros(8), np.array([1.0, 1, 1, 1, 1, 1, 0, 0])
    names = [str(i) for i in range(8)]
    assert official("mmrb2", np.full(8, 0.5), label, names, orders=(first, second)).value == 0.5
    assert official("pairs", np.full(8, 0.5), label, names).value == 0
    # Sure in one order only: that judgement counts by itself.
    result = official("mmrb2", np.full(8, 0.9), np.ones(8), names, orders=(np.full(8, 0.99), np.full(8, 0.4)))
    assert (result.value, result.beside["judgements"]) == (0.5, 16)
    # As many independent judgements as pairs, not twice as many.
    assert (result.low, result.high) == pytest.approx(share_interval(4, 8))


def test_mmrb2_with_missing_judgements() -> None:
    nan = np.nan
    orders = np.array([1, nan, nan, 0]), np.array([nan, nan, 1, 1])
    result = official("mmrb2", np.full(4, 0.5), np.ones(4), list("abcd"), orders=orders)
    assert result.value == 3 / 4
    assert result.beside == {"judgements": 4, "of_judgements": 8, "value_missing_wrong": 3 / 8}
    nothing = np.full(4, nan)
    result = official("mmrb2", np.full(4, 0.5), np.ones(4), list("abcd"), orders=(nothing, nothing))
    assert result.to_json() == {
        "value": None, "low": None, "high": None, "definition": PROTOCOLS["mmrb2"].definition,
        "judgements": 0, "of_judgements": 8, "value_missing_wrong": 0,
    }  # fmt: skip


@pytest.mark.parametrize("strategy", ["select", "soft"])
def test_mmrb2_of_a_judge(strategy: Any, tmp_path: Path, demo_judge: Callable[..., Judge]) -> None:
    """From tables to the number, by what the judge wrote; some of its answers are cut off."""
    preferences = load_preferences("mmrb2", "test", data_dir=make_layout("mmrb2", tmp_path, 6))
    spec = EvaluationSpec("mmrb2", "test", strategy, "mmrb2")
    whole = evaluate(demo_judge(think=False), preferences, spec)
    cut = Verdict("<think></think><answer>")
    verdicts = [replace(v, a_shown_second=(cut,)) if i % 4 == 1 else v for i, v in enumerate(whole.verdicts)]
    result = evaluation_of(preferences, verdicts, spec, 1.0).to_json()["official"]
    right = made = 0
    for preference, verdict in zip(preferences, verdicts, strict=True):
        for (each,), shown in ((verdict.a_shown_first, "ab"), (verdict.a_shown_second, "ba")):
            if strategy == "select" and (answer := re.search(r"<answer>\s*([12])", each.text)):
                made, right = made + 1, right + (shown[int(answer[1]) - 1] == preference.better)
            elif strategy == "soft" and each.p_label_first + each.p_label_second > 0:
                said = shown[0] if each.p_label_first > each.p_label_second else shown[1]
                made, right = made + 1, right + (said == preference.better)
    assert (len(verdicts), made) == (12, 21)
    assert (result["judgements"], result["of_judgements"]) == (21, 24)
    assert result["value"] == pytest.approx(right / made)
    assert result["value_missing_wrong"] == pytest.approx(right / 24)
    assert ("written verdict (as in the official" in result["definition"]) == (strategy == "select")
    assert ("the more probable answer" in result["definition"]) == (strategy == "soft")


def test_genai_bench_by_hand() -> None:
    """Right, wrong, undecided on a decided pair; a tie found, a tie missed; nothing read on two."""
    p = np.array([0.9, 0.9, 0.5, 0.5, 0.51, 0.5, 0.5])
    label = np.array([1, 0, 1, 0.5, 0.5, 1, 0.5])
    order = np.where(np.arange(7) < 5, p, np.nan)
    result = official("genai_bench", p, label, list("abcdefg"), orders=(order, order))
    assert result.value == 1 / 4
    assert result.beside == {"tau": 2 / 7, "tau_pairs": 7}
    assert "tau is 28.6 % of 7 pairs" in result.in_words()
    decided = label != 0.5
    names = ["a", "b", "c", "f"]
    plain = official("pairs", p[decided], label[decided], names)
    assert (result.value, result.low, result.high) == (plain.value, plain.low, plain.high)


def test_real_votes_by_the_protocol_of_genai_bench() -> None:
    """GPT-4o's letters in one order: what papers call diff and tau, by counting letters."""
    with (Path(__file__).parents[1] / "fixtures" / "votes.csv").open(encoding="utf-8", newline="") as file:
        votes = dict(csv.reader(file))
    people, judge = votes["people"], votes["gpt4o"]
    pairs = list(zip(people, judge, strict=True))
    value = {"1": 1.0, "2": 0.0, "=": 0.5, "-": np.nan}
    label, order = (np.array([value[letter] for letter in letters]) for letters in (people, judge))
    p = np.nan_to_num(order, nan=0.5)
    result = official("genai_bench", p, label, [str(i) for i in range(1735)], orders=(order, order))
    drop = [(human, said) for human, said in pairs if human != "="]
    assert result.value == sum(human == said for human, said in drop) / len(drop)
    assert result.beside["tau"] == sum(human == said for human, said in pairs) / 1735


def preference(p_a: float, label: str | None = None) -> Preference:
    return Preference("x", Path("a"), Path("b"), p_a, label=label)  # type: ignore[arg-type]


def test_scored_and_right_pairs() -> None:
    inputs = [preference(1), preference(0.5), preference(0.5, "b"), preference(0.3), preference(0.8, "tie")]
    assert counted(inputs, "hpdv2") == [inputs[0], inputs[2], inputs[3]]
    assert counted(inputs, "pickapic") == counted(inputs, "genai_bench") == inputs
    assert labels(inputs).tolist() == [1, 0.5, 0, 0, 0.5]


def test_every_data_set_has_its_own_protocol() -> None:
    expected = {name: name for name in CATALOG} | {"pickapic_v1": "pickapic", "demo": "pairs", "mine.jsonl": "pairs"}
    expected |= {"rl-research/multimodal-rewardbench-2": "mmrb2", "TIGER-Lab/GenAI-Bench": "genai_bench"}
    assert {name: protocol_of(name) for name in expected} == expected
    with pytest.raises(ConfigError, match="unknown protocol 'accuracy'; known are pairs, imagereward"):
        official("accuracy", np.ones(1), np.ones(1), ["x"])

"""Strategies compared: what rows share is what each would have read by itself, and what each took is its own."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mlxpref.config import JudgeSettings
from mlxpref.demo.preferences import demo_preferences
from mlxpref.engine.vlm import VLM
from mlxpref.errors import ConfigError, DataError
from mlxpref.judge.calibration import Calibration, CalibrationFile, CalibrationMetrics
from mlxpref.judge.evaluation import evaluate
from mlxpref.judge.judge import Judge
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.store import Store
from mlxpref.judge.strategies import (
    StrategyComparison,
    StrategyVariant,
    compare_strategies,
    difference,
    strategy_variants,
)
from mlxpref.log import showing
from mlxpref.preferences import Pair, Preference
from mlxpref.ranking.temperature import TemperatureScaling
from mlxpref.verdict import STRATEGIES, Strategy, Verdict
from scripts.learning_runs import Plan, settings_of
from scripts.strategies_by_training import READ_BY, SEEDS, gains_of, make_run, plans, rows_of, table_of
from tests.messages import Tracked

TOKENS = 24
"""Between the lengths of what the demo judge writes, so that some completions are closed and some are not."""


@pytest.fixture(scope="module")
def preferences() -> list[Preference]:
    return demo_preferences("test", 6, 5)


@pytest.fixture
def compared(demo_judge: Callable[..., Judge], preferences: Sequence[Preference]) -> Callable[..., StrategyComparison]:
    def compare(asked: Sequence[StrategyVariant], **options: object) -> StrategyComparison:
        judge = demo_judge(max_tokens=TOKENS)
        return compare_strategies(judge, preferences, "demo", "test", asked, **options)  # type: ignore[arg-type]

    return compare


def said(preferences: Sequence[Preference], judge: Judge, strategy: Strategy) -> list[PairVerdict]:
    return list(judge.pairs([Pair(p.a, p.b, p.prompt) for p in preferences], strategy))


def assert_same(found: Sequence[PairVerdict], expected: Sequence[PairVerdict]) -> None:
    """The same completions, read alike; probabilities up to what a batch's shape changes in a sum."""
    assert [pair.strategy for pair in found] == [pair.strategy for pair in expected]
    pairs = [
        (x, y)
        for one, two in zip(found, expected, strict=True)
        for x, y in zip(one.verdicts, two.verdicts, strict=True)
    ]
    for x, y in pairs:
        assert (x.text, x.tokens, x.closed) == (y.text, y.tokens, y.closed)
        assert (x.p_label_first, x.p_label_second) == pytest.approx((y.p_label_first, y.p_label_second), abs=1e-5)


def test_ways_are_every_combination_but_thoughtless_samples() -> None:
    found = strategy_variants(["soft", "score"], [4, 1, 4], [True, False])
    assert found == [
        StrategyVariant("soft", False, 1), StrategyVariant("score", False, 1),
        StrategyVariant("soft", True, 1), StrategyVariant("score", True, 1),
        StrategyVariant("soft", True, 4), StrategyVariant("score", True, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(("think", "samples"), [(True, 1), (True, 3), (False, 1)])
def test_each_row_says_what_it_would_by_itself(
    compared: Callable[..., StrategyComparison],
    demo_judge: Callable[..., Judge],
    preferences: Sequence[Preference],
    think: bool,
    samples: int,
) -> None:
    # soft is read from what select writes, and three samples from five.
    counts = [1, samples, 5] if samples > 1 else [1]
    rows = {row.way: row for row in compared(strategy_variants(STRATEGIES, counts, [think])).rows}
    judge = demo_judge(max_tokens=TOKENS, think=think, samples=samples)
    for strategy in STRATEGIES:
        found = rows[StrategyVariant(strategy, think, samples)].evaluation
        expected = said(preferences, judge, strategy)
        assert_same(found.verdicts, expected)
        completions = [verdict for pair in expected for verdict in pair.verdicts]
        assert any(verdict.closed for verdict in completions) == think
        written = sum(verdict.tokens for verdict in completions)
        assert found.tokens == written
        assert found.tokens_per_pair == pytest.approx(written / len(preferences))


def test_a_row_is_measured_as_eval_does(
    compared: Callable[..., StrategyComparison], demo_judge: Callable[..., Judge], preferences: list[Preference]
) -> None:
    (row,) = compared(strategy_variants(["select"], [1], [True])).rows
    alone = evaluate(demo_judge(max_tokens=TOKENS), preferences, "demo", "test", "select")
    assert replace(row.evaluation, seconds=0, seconds_per_pair=0) == replace(alone, seconds=0, seconds_per_pair=0)
    assert 0 < row.evaluation.seconds < 10 * alone.seconds


def test_what_is_shared_is_written_once(compared: Callable[..., StrategyComparison]) -> None:
    found = compared(strategy_variants(["soft", "select"], [1, 2, 4], [True]))
    tokens = {row.way: row.evaluation.tokens for row in found.rows}
    assert found.tokens == tokens[StrategyVariant("select", True, 1)] + tokens[StrategyVariant("select", True, 4)]
    # What soft does not read of a completion is its answer: a label and an ending.
    for count in (1, 2, 4):
        assert tokens[StrategyVariant("soft", True, count)] < tokens[StrategyVariant("select", True, count)]
    assert tokens[StrategyVariant("soft", True, 2)] < tokens[StrategyVariant("soft", True, 4)]
    assert 0 < found.reading_seconds < found.seconds
    seconds = {row.way: row.evaluation.seconds for row in found.rows}
    assert (
        seconds[StrategyVariant("soft", True, 2)]
        < seconds[StrategyVariant("soft", True, 4)]
        < seconds[StrategyVariant("select", True, 4)]
    )


def test_rows_without_written_answers_do_not_write_them(compared: Callable[..., StrategyComparison]) -> None:
    found = compared(strategy_variants(["soft"], [1], [False]))
    assert found.tokens == 0
    assert found.rows[0].to_json()["tokens"] == 0
    assert found.rows[0].evaluation.seconds > 0


def test_an_interrupted_comparison_goes_on_where_it_was(
    demo_judge: Callable[..., Judge], preferences: list[Preference], tmp_path: Path
) -> None:
    asked = strategy_variants(["select", "score"], [1, 2], [True])

    def stopped(work: Iterable[PairVerdict], total: int, what: object) -> Iterator[PairVerdict]:
        yield from islice(work, len(preferences) + 1)
        raise KeyboardInterrupt

    with Store(tmp_path / "store.sqlite") as store:
        judge = demo_judge(max_tokens=TOKENS)
        judge.store = store
        with pytest.raises(KeyboardInterrupt), showing(Tracked(stopped)):
            compare_strategies(judge, preferences, "demo", "test", asked)
        kept = store.count()
        assert kept >= 2 * len(preferences)
        resumed, whole = demo_judge(max_tokens=TOKENS), demo_judge(max_tokens=TOKENS)
        resumed.store = store
        found = compare_strategies(resumed, preferences, "demo", "test", asked)
        assert resumed.recalled == kept
        assert resumed.comparisons == 4 * 2 * len(preferences) - kept
        assert resumed.tokens == found.tokens
        expected = compare_strategies(whole, preferences, "demo", "test", asked)
        for row, other in zip(found.rows, expected.rows, strict=True):
            assert_same(row.evaluation.verdicts, other.evaluation.verdicts)
            assert row.evaluation.tokens_per_pair == other.evaluation.tokens_per_pair
        # Nothing is judged a third time; then seconds are not known.
        again = compare_strategies(resumed, preferences, "demo", "test", asked)
        assert again.tokens == 0
        assert again.rows[0].to_json()["seconds_per_pair"] is None


def test_what_was_kept_for_eval_is_recalled(
    demo_judge: Callable[..., Judge], preferences: list[Preference], tmp_path: Path
) -> None:
    judge = demo_judge(max_tokens=TOKENS)
    with Store(tmp_path / "store.sqlite") as judge.store:
        evaluate(judge, preferences, "demo", "test", "select")
        before = judge.tokens
        compare_strategies(judge, preferences, "demo", "test", strategy_variants(["soft", "select"], [1], [True]))
        assert judge.tokens == before
        assert judge.recalled == 2 * len(preferences)


def test_thresholds_of_ties_are_chosen_for_every_row(compared: Callable[..., StrategyComparison]) -> None:
    validation = [replace(p, p_a=0.5) for p in demo_preferences("test", 2, 6)]
    found = compared(strategy_variants(["soft", "select"], [1], [False]), protocol="pickapic", validation=validation)
    # Everything was a tie where it was chosen: the least threshold with which everything is.
    p = [np.array([v.p_a for v in row.evaluation.verdicts]) for row in found.rows]
    assert len(p[0]) == 6
    assert found.rows[1].evaluation.tie_threshold == 1.0
    assert 0 < (found.rows[0].evaluation.tie_threshold or 0) <= 1.0
    given = compared(
        strategy_variants(["soft"], [1], [False]), protocol="pickapic", tie_threshold=0.5, validation=validation
    )
    assert given.rows[0].evaluation.tie_threshold == 0.5


def test_nothing_to_judge_is_an_error(demo_judge: Callable[..., Judge], preferences: list[Preference]) -> None:
    tied = [replace(p, p_a=0.5) for p in preferences]
    with pytest.raises(DataError, match=r"demo, split test: no preference to judge \(6 ties\)"):
        compare_strategies(demo_judge(), tied, "demo", "test", strategy_variants(["soft"], [1], [True]))


def pair_verdict(p_a: float) -> PairVerdict:
    return PairVerdict((Verdict("", p_a, 1 - p_a),), (Verdict("", 1 - p_a, p_a),))


def test_a_difference_by_hand_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    groups = [str(i // 8) for i in range(400)]
    people = [1.0, 0.0] * 200
    # One is right of all of every second prompt, the other of none of these; elsewhere both are right or both wrong.
    right = np.array([[int(g) % 2 == 0 or rng.random() < 0.5] * 2 for g in groups]).T
    right[1] &= np.array([int(g) % 2 == 1 for g in groups])
    blank = demo_preferences("test", 1)[0]
    preferences = [replace(blank, p_a=p, group=g) for p, g in zip(people, groups, strict=True)]
    one, other = (
        [pair_verdict(0.9 if good == (p > 0.5) else 0.1) for good, p in zip(row, people, strict=True)] for row in right
    )
    found = difference(one, other, preferences)
    assert found.accuracy == pytest.approx(0.5)
    # 50 prompts differ by 1 or by 0: the interval is that of 50 draws, not of 400.
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 50), rel=0.15)
    assert difference(other, one, preferences).accuracy == -found.accuracy
    same = difference(one, one, preferences)
    assert (same.accuracy, same.low, same.high) == (0, 0, 0)
    # Ties have no better image: they are left out.
    tied = [*preferences, replace(blank, p_a=0.5)]
    assert difference([*one, pair_verdict(0.9)], [*other, pair_verdict(0.9)], tied) == found


def test_soft_is_compared_with_the_others_of_its_kind(compared: Callable[..., StrategyComparison]) -> None:
    found = compared(strategy_variants(STRATEGIES, [1, 2], [True]))
    for row in found.rows:
        assert set(row.minus) == ({"select", "score"} if row.way.strategy == "soft" else set())
        report = row.to_json()
        assert (report["think"], report["samples"]) == (True, row.way.samples)
        for other, minus in row.minus.items():
            accuracy = {r.way: r.evaluation.metrics.accuracy for r in found.rows}
            gained = accuracy[row.way] - accuracy[replace(row.way, strategy=other)]
            assert minus.accuracy == pytest.approx(gained)
            assert report[f"minus_{other}"] == {"accuracy": minus.accuracy, "low": minus.low, "high": minus.high}


@pytest.mark.parametrize("samples", [1, 4])
def test_other_families_end_and_stop_alike(tiny_vlm: VLM, preferences: list[Preference], samples: int) -> None:
    """Random weights write nonsense, which is closed: the answer's probabilities are those read where it begins."""
    judge = Judge(tiny_vlm, JudgeSettings(max_tokens=5, samples=samples))
    asked = strategy_variants(["soft", "select"], [samples], [True])
    soft = compare_strategies(judge, preferences[:2], "demo", "test", asked).rows[0].evaluation
    assert_same(soft.verdicts, said(preferences[:2], judge, "soft"))


def test_rows_are_calibrated_where_the_judge_is(
    demo_judge: Callable[..., Judge], preferences: list[Preference], tmp_path: Path
) -> None:
    judge = demo_judge(max_tokens=TOKENS, samples=2)
    asked = strategy_variants(["soft", "select"], [2], [True])
    plain = compare_strategies(judge, preferences, "demo", "test", asked)
    quality = CalibrationMetrics(0.0, 0.0, 0.0, 0.5)
    rescaling = TemperatureScaling(temperature=3.0, position_bias=0.5)
    calibration = Calibration(judge.conditions(), rescaling, "demo", "train", 1, 1, quality, quality)
    judge.calibration = CalibrationFile(tmp_path / "calibration.json", (calibration,))
    found = compare_strategies(judge, preferences, "demo", "test", asked)
    for row, before in zip(found.rows, plain.rows, strict=True):
        for one, other in zip(row.evaluation.verdicts, before.evaluation.verdicts, strict=True):
            p = other.p_a_shown_first
            if row.way.strategy == "soft" and p is not None:
                p = float(rescaling.p_first(p))
            assert one.p_a_shown_first == p
    # What it is not calibrated for is refused before anything is judged.
    comparisons = judge.comparisons
    with pytest.raises(ConfigError, match="made for samples 2, not 3"):
        compare_strategies(judge, preferences, "demo", "test", strategy_variants(["soft"], [2, 3], [True]))
    assert judge.comparisons == comparisons


def test_training_for_each_strategy_is_measured_alike() -> None:
    plan = {"reward": "score", "steps": 1, "seed": 0}
    run = make_run(plan, (4, 3))
    assert plan.items() <= run.items()
    assert run["seconds"] > 0
    assert [reading["strategy"] for reading in run["read"]] == ["soft", "select", "score"]
    assert all(0 <= reading["accuracy"] <= 1 and reading["tokens_per_pair"] > 0 for reading in run["read"])
    untrained = make_run(plans()[-1], (4, 3))
    assert untrained["seconds"] == 0
    # One step changes what is said, if only in the last digits.
    assert untrained["read"][0]["brier"] != run["read"][0]["brier"]


def test_every_strategy_has_the_same_budget() -> None:
    every = plans((20,))
    assert len(every) == len(READ_BY) * len(SEEDS) + 1
    assert {run["steps"] for run in every} == {20, 0}
    budgets = {replace(settings_of(Plan(reward, "labels", True, 0, 20)), reward="") for reward in READ_BY}
    assert len(budgets) == 1


def reading(strategy: str, accuracy: float) -> dict[str, object]:
    shares = dict.fromkeys(("held_out_prompts", "position_consistency", "ece", "unreadable"), 0.5)
    return {"strategy": strategy, "accuracy": accuracy, "tokens_per_pair": 60.0, **shares}


def test_the_table_has_each_judge_as_it_was_trained_to_be_read() -> None:
    runs = [
        {"reward": reward, "steps": 20, "seed": seed, "seconds": 10.0,
         "read": [reading(strategy, 0.7 + 0.1 * seed + 0.05 * (strategy == "soft")) for strategy in STRATEGIES]}
        for reward in READ_BY for seed in (0, 1)
    ]  # fmt: skip
    runs.append({"reward": "none", "steps": 0, "seed": 0, "seconds": 0.0, "read": [reading("soft", 0.5)]})
    rows = rows_of(runs)
    assert [(row["reward"], row["strategy"], row["seeds"]) for row in rows] == [
        ("none", "soft", 1), ("soft", "soft", 2), ("hard", "select", 2), ("score", "score", 2),
    ]  # fmt: skip
    assert rows[1]["accuracy"] == pytest.approx((0.8, 0.75, 0.85))
    assert len(rows_of(runs, every=True)) == 1 + 9
    lines = table_of(rows).splitlines()
    assert lines[2].startswith("| none | 0 | soft | 0.500 | 0.500 |")
    assert lines[3].startswith("| soft | 20 | soft | 0.800 (0.750 to 0.850) |")
    assert gains_of(runs)[0].startswith("soft - select, steps 20, seeds 2: accuracy +5.0 points (+5.0 to +5.0)")
    assert gains_of(runs[:3]) == ["soft - select, steps 20, seeds 1: " + gains_of(runs)[0].partition(": ")[2]]

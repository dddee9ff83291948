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
from mlxpref.judge import verdict_source
from mlxpref.judge.calibration import Calibration, CalibrationFile, CalibrationMetrics
from mlxpref.judge.evaluation import EvaluationSpec, evaluate
from mlxpref.judge.judge import Judge
from mlxpref.judge.pair_verdict import JudgingCounts, PairVerdict
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
from mlxpref.verdict import STRATEGIES, Strategy
from tests.messages import Tracked
from tests.tolerance import PROBABILITY

TOKENS = 34
"""Between the lengths of what the demo judge writes, so that some completions are closed and some are not."""


SPEC = EvaluationSpec("demo", "test")


@pytest.fixture(scope="module")
def preferences() -> list[Preference]:
    return demo_preferences("test", 6, 5)


@pytest.fixture
def compared(demo_judge: Callable[..., Judge], preferences: Sequence[Preference]) -> Callable[..., StrategyComparison]:
    def compare(
        asked: Sequence[StrategyVariant], spec: EvaluationSpec = SPEC, validation: Sequence[Preference] = ()
    ) -> StrategyComparison:
        judge = demo_judge(max_tokens=TOKENS)
        return compare_strategies(judge, preferences, spec, asked, validation=validation)

    return compare


def judge_pairs(preferences: Sequence[Preference], judge: Judge, strategy: Strategy) -> list[PairVerdict]:
    return list(judge.pairs([Pair(p.a, p.b, p.prompt) for p in preferences], strategy))


def assert_same(result: Sequence[PairVerdict], expected: Sequence[PairVerdict]) -> None:
    """The same completions, read alike; probabilities up to what a batch's shape changes in a sum."""
    assert [pair.strategy for pair in result] == [pair.strategy for pair in expected]
    pairs = [
        (x, y)
        for one, two in zip(result, expected, strict=True)
        for x, y in zip(one.verdicts, two.verdicts, strict=True)
    ]
    for x, y in pairs:
        assert (x.text, x.tokens, x.closed) == (y.text, y.tokens, y.closed)
        assert (x.p_label_first, x.p_label_second) == pytest.approx(
            (y.p_label_first, y.p_label_second), abs=PROBABILITY
        )


def test_strategy_variants() -> None:
    result = strategy_variants(["soft", "score"], [4, 1, 4], [True, False])
    assert result == [
        StrategyVariant("soft", False, 1), StrategyVariant("score", False, 1),
        StrategyVariant("soft", True, 1), StrategyVariant("score", True, 1),
        StrategyVariant("soft", True, 4), StrategyVariant("score", True, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(("think", "samples"), [(True, 1), (True, 3), (False, 1)])
def test_each_row_equals_a_single_run(
    compared: Callable[..., StrategyComparison],
    demo_judge: Callable[..., Judge],
    preferences: Sequence[Preference],
    think: bool,
    samples: int,
) -> None:
    # soft is read from what select writes, and three samples from five.
    counts = [1, samples, 5] if samples > 1 else [1]
    rows = {row.variant: row for row in compared(strategy_variants(STRATEGIES, counts, [think])).rows}
    judge = demo_judge(max_tokens=TOKENS, think=think, samples=samples)
    for strategy in STRATEGIES:
        result = rows[StrategyVariant(strategy, think, samples)].evaluation
        expected = judge_pairs(preferences, judge, strategy)
        assert_same(result.verdicts, expected)
        completions = [verdict for pair in expected for verdict in pair.verdicts]
        assert any(verdict.closed for verdict in completions) == think
        count = sum(verdict.tokens for verdict in completions)
        assert result.tokens == count
        assert result.tokens_per_pair == pytest.approx(count / len(preferences))


def test_rows_equal_eval(
    compared: Callable[..., StrategyComparison], demo_judge: Callable[..., Judge], preferences: list[Preference]
) -> None:
    (row,) = compared(strategy_variants(["select"], [1], [True])).rows
    alone = evaluate(demo_judge(max_tokens=TOKENS), preferences, EvaluationSpec("demo", "test", "select"))
    assert replace(row.evaluation, seconds=0, seconds_per_pair=0) == replace(alone, seconds=0, seconds_per_pair=0)
    assert row.evaluation.seconds > 0


def test_shared_completions_are_written_once(compared: Callable[..., StrategyComparison]) -> None:
    result = compared(strategy_variants(["soft", "select"], [1, 2, 4], [True]))
    tokens = {row.variant: row.evaluation.tokens for row in result.rows}
    assert (
        result.counts.tokens == tokens[StrategyVariant("select", True, 1)] + tokens[StrategyVariant("select", True, 4)]
    )
    # What soft does not read of a completion is its answer: a label and an ending.
    for count in (1, 2, 4):
        assert tokens[StrategyVariant("soft", True, count)] < tokens[StrategyVariant("select", True, count)]
    assert tokens[StrategyVariant("soft", True, 2)] < tokens[StrategyVariant("soft", True, 4)]
    # Rows that share completions have the seconds of all of them.
    seconds = {row.variant: row.evaluation.seconds for row in result.rows}
    assert (
        len({seconds[StrategyVariant(strategy, True, count)] for strategy in ("soft", "select") for count in (2, 4)})
        == 1
    )
    assert 0 < seconds[StrategyVariant("soft", True, 1)] == seconds[StrategyVariant("select", True, 1)] < result.seconds


def test_soft_without_thinking_writes_nothing(compared: Callable[..., StrategyComparison]) -> None:
    result = compared(strategy_variants(["soft"], [1], [False]))
    assert result.counts.tokens == 0
    assert result.rows[0].to_json()["tokens"] == 0
    assert result.rows[0].evaluation.seconds > 0


def test_an_interrupted_comparison_continues(
    demo_judge: Callable[..., Judge], preferences: list[Preference], tmp_path: Path
) -> None:
    variants = strategy_variants(["select", "score"], [1, 2], [True])

    def stopped(work: Iterable[PairVerdict], total: int, what: object) -> Iterator[PairVerdict]:
        yield from islice(work, len(preferences) + 1)
        raise KeyboardInterrupt

    with Store(tmp_path / "store.sqlite") as store:
        judge = replace(demo_judge(max_tokens=TOKENS), store=store)
        with pytest.raises(KeyboardInterrupt), showing(Tracked(stopped)):
            compare_strategies(judge, preferences, SPEC, variants)
        result = compare_strategies(judge, preferences, SPEC, variants)
        assert result.counts.recalled >= 2 * len(preferences)
        assert result.counts.comparisons + result.counts.recalled == 4 * 2 * len(preferences)
        whole = demo_judge(max_tokens=TOKENS)
        expected = compare_strategies(whole, preferences, SPEC, variants)
        for row, other in zip(result.rows, expected.rows, strict=True):
            assert_same(row.evaluation.verdicts, other.evaluation.verdicts)
            assert row.evaluation.tokens_per_pair == other.evaluation.tokens_per_pair
        # Nothing is judged a third time; then seconds are not known.
        again = compare_strategies(judge, preferences, SPEC, variants)
        assert again.counts == JudgingCounts(0, 4 * 2 * len(preferences), 0)
        assert again.rows[0].to_json()["seconds_per_pair"] is None


def test_comparisons_of_eval_are_recalled(
    demo_judge: Callable[..., Judge], preferences: list[Preference], tmp_path: Path
) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        judge = replace(demo_judge(max_tokens=TOKENS), store=store)
        evaluate(judge, preferences, replace(SPEC, strategy="select"))
        result = compare_strategies(judge, preferences, SPEC, strategy_variants(["soft", "select"], [1], [True]))
        assert result.counts == JudgingCounts(comparisons=0, recalled=2 * len(preferences), tokens=0)


def test_tie_threshold_of_each_row(compared: Callable[..., StrategyComparison]) -> None:
    validation = [replace(p, p_people=0.5) for p in demo_preferences("test", 4, 6)]
    variants = [StrategyVariant("soft", False, 1), StrategyVariant("select", True, 1)]
    result = compared(variants, replace(SPEC, protocol="pickapic"), validation)
    # Everything was a tie where it was chosen: the least threshold with which everything is.
    at_once, written = (row.evaluation.spec.tie_threshold for row in result.rows)
    assert [len(row.evaluation.verdicts) for row in result.rows] == [6, 6]
    assert 0 < (at_once or 0) < 0.5, "at once nothing is sure"
    assert written == 1.0, "an answer in words is sure"
    given_spec = replace(SPEC, protocol="pickapic", tie_threshold=0.5)
    fixed = compared(strategy_variants(["soft"], [1], [False]), given_spec, validation)
    assert fixed.rows[0].evaluation.spec.tie_threshold == 0.5


def test_nothing_to_judge_is_an_error(demo_judge: Callable[..., Judge], preferences: list[Preference]) -> None:
    tied = [replace(p, p_people=0.5) for p in preferences]
    with pytest.raises(DataError, match=r"demo, split test: no preference to judge \(6 ties\)"):
        compare_strategies(demo_judge(), tied, SPEC, strategy_variants(["soft"], [1], [True]))


def test_difference_by_hand() -> None:
    rng = np.random.default_rng(0)
    groups = [str(i // 8) for i in range(400)]
    people = [1.0, 0.0] * 200
    # One is right of all of every second prompt, the other of none of these; elsewhere both are right or both wrong.
    right = np.array([[int(g) % 2 == 0 or rng.random() < 0.5] * 2 for g in groups]).T
    right[1] &= np.array([int(g) % 2 == 1 for g in groups])
    blank = demo_preferences("test", 1)[0]
    preferences = [replace(blank, p_people=p, group=g) for p, g in zip(people, groups, strict=True)]
    one, other = ([0.9 if good == (p > 0.5) else 0.1 for good, p in zip(row, people, strict=True)] for row in right)
    result = difference(one, other, preferences)
    assert result.accuracy == pytest.approx(0.5)
    # 50 prompts differ by 1 or by 0: the interval is that of 50 draws, not of 400.
    assert result.high - result.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 50), rel=0.15)
    assert difference(other, one, preferences).accuracy == -result.accuracy
    same = difference(one, one, preferences)
    assert (same.accuracy, -same.low) == (0, pytest.approx(same.high))
    assert 0 < same.high < 0.01
    # Bootstraps over one prompt have no width.
    alone = [replace(preference, group="one") for preference in preferences[:20]]
    gain = difference(one[:20], other[:20], alone)
    assert gain.low < gain.accuracy < gain.high
    assert gain.high - gain.low > 0.2
    # Ties have no better image: they are left out.
    tied = [*preferences, replace(blank, p_people=0.5)]
    assert difference([*one, 0.9], [*other, 0.9], tied) == result


def test_soft_is_compared_within_its_family(compared: Callable[..., StrategyComparison]) -> None:
    result = compared(strategy_variants(STRATEGIES, [1, 2], [True]))
    for row in result.rows:
        assert set(row.minus) == ({"select", "score"} if row.variant.strategy == "soft" else set())
        report = row.to_json()
        assert (report["think"], report["samples"]) == (True, row.variant.samples)
        for other, minus in row.minus.items():
            accuracy = {r.variant: r.evaluation.metrics.accuracy for r in result.rows}
            gained = accuracy[row.variant] - accuracy[replace(row.variant, strategy=other)]
            assert minus.accuracy == pytest.approx(gained)
            assert report[f"minus_{other}"] == {"accuracy": minus.accuracy, "low": minus.low, "high": minus.high}


@pytest.mark.parametrize("samples", [1, 4])
def test_families_end_alike(tiny_vlm: VLM, preferences: list[Preference], samples: int) -> None:
    """Random weights write nonsense, which is closed: the answer's probabilities are those read where it begins."""
    judge = Judge(tiny_vlm, JudgeSettings(max_tokens=5, samples=samples))
    variants = strategy_variants(["soft", "select"], [samples], [True])
    soft = compare_strategies(judge, preferences[:2], SPEC, variants).rows[0].evaluation
    assert_same(soft.verdicts, judge_pairs(preferences[:2], judge, "soft"))


def test_rows_of_a_calibrated_judge(
    demo_judge: Callable[..., Judge], preferences: list[Preference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = demo_judge(max_tokens=TOKENS, samples=2)
    variants = strategy_variants(["soft", "select"], [2], [True])
    plain = compare_strategies(judge, preferences, SPEC, variants)
    quality = CalibrationMetrics(0.0, 0.0, 0.0, 0.5)
    rescaling = TemperatureScaling(temperature=3.0, position_bias=0.5)
    calibration = Calibration(judge.conditions(), rescaling, "demo", "train", 1, 1, quality, quality)
    judge = replace(judge, calibration=CalibrationFile(tmp_path / "calibration.json", (calibration,)))
    result = compare_strategies(judge, preferences, SPEC, variants)
    for row, before in zip(result.rows, plain.rows, strict=True):
        for one, other in zip(row.evaluation.verdicts, before.evaluation.verdicts, strict=True):
            p = other.p_a_shown_first
            if row.variant.strategy == "soft" and p is not None:
                p = float(rescaling.p_first(p))
            assert one.p_a_shown_first == p
    # What it is not calibrated for is refused before anything is judged.
    monkeypatch.setattr(verdict_source, "roll_out", None)
    with pytest.raises(ConfigError, match="made for samples 2, not 3"):
        compare_strategies(judge, preferences, SPEC, strategy_variants(["soft"], [2, 3], [True]))

"""Test-time compute: every setting is what it is alone, nothing is judged twice, and the best of few tokens by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mlxpref.config import JudgeSettings
from mlxpref.demo.preferences import demo_preferences
from mlxpref.engine.profile import built_in_profiles
from mlxpref.errors import ConfigError
from mlxpref.judge import verdict_source
from mlxpref.judge.calibration import Calibration, CalibrationFile, CalibrationMetrics
from mlxpref.judge.compute_curve import ComputePoint, frontier, lines, settings_of_marks, varies_compute
from mlxpref.judge.evaluation import EvaluationSpec, evaluate
from mlxpref.judge.judge import Judge
from mlxpref.judge.store import Store
from mlxpref.judge.strategies import StrategyVariant, compare_strategies, strategy_variants
from mlxpref.preferences import Preference
from mlxpref.ranking.temperature import TemperatureScaling
from mlxpref.verdict import Strategy
from tests.conftest import tiny_model
from tests.engine.profile_models import asked_by
from tests.judge.test_strategies import assert_same

SPEC = EvaluationSpec("demo", "test")
MOST = 128
"""Tokens within which most of the demo judge's completions end."""


@pytest.fixture(scope="module")
def preferences() -> list[Preference]:
    return demo_preferences("test", 6, 5)


def point(samples: int, limit: int | None, tokens: float, accuracy: float, think: bool = True) -> ComputePoint:
    return ComputePoint(StrategyVariant("soft", think, samples, limit), tokens, accuracy, accuracy, accuracy)


@pytest.mark.parametrize("strategy", ["soft", "select"])
def test_each_setting_is_what_it_is_alone(
    demo_judge: Callable[..., Judge], preferences: list[Preference], strategy: Strategy
) -> None:
    spec = replace(SPEC, strategy=strategy)

    def alone(limit: int, samples: int) -> Sequence[int]:
        """The longest completion of each pair, MOST + 1 where one was closed."""
        verdicts = evaluate(demo_judge(max_tokens=limit, samples=samples), preferences, spec).verdicts
        return [max(MOST + 1 if each.closed else each.tokens for each in pair.verdicts) for pair in verdicts]

    # With this bound some pairs are as they were without it, and with one token less the same pair is not.
    middle = sorted(alone(MOST, 2))[len(preferences) // 2]
    limits = [5, middle - 1, middle, MOST]
    variants = strategy_variants([strategy], [1, 2], [True, False], limits)
    judge = demo_judge(max_tokens=MOST)
    result = compare_strategies(judge, preferences, spec, variants)
    assert [row.variant for row in result.rows] == variants
    for row in result.rows:
        settings = row.variant.settings(judge.settings)
        expected = evaluate(replace(judge, settings=settings), preferences, spec)
        assert_same(row.evaluation.verdicts, expected.verdicts)
        assert (row.evaluation.tokens, row.evaluation.metrics.accuracy) == (expected.tokens, expected.metrics.accuracy)
        assert row.evaluation.tokens_per_pair == expected.tokens_per_pair
        assert row.evaluation.seconds > 0
    # A pair is judged again with fewer tokens only where one of its completions was longer.
    again = sum(length > limit for n in (1, 2) for length in alone(MOST, n) for limit in limits[:-1])
    assert result.counts.comparisons == 2 * (3 * len(preferences) + again)
    assert again < 6 * len(preferences)


def test_a_store_has_every_setting(
    demo_judge: Callable[..., Judge], preferences: list[Preference], tmp_path: Path
) -> None:
    variants = strategy_variants(["soft"], [1, 2], [True], [7, MOST])
    with Store(tmp_path / "store.sqlite") as store:
        judge = replace(demo_judge(max_tokens=MOST), store=store)
        first = compare_strategies(judge, preferences, SPEC, variants)
        again = compare_strategies(judge, preferences, SPEC, variants)
    assert (again.counts.comparisons, again.counts.recalled) == (0, first.counts.comparisons)
    for row, before in zip(again.rows, first.rows, strict=True):
        assert row.evaluation.tokens_per_pair == before.evaluation.tokens_per_pair
        assert row.evaluation.metrics == before.evaluation.metrics


@pytest.mark.parametrize("name", [each.name for each in built_in_profiles().values() if each.thinks])
def test_judges_of_every_profile(name: str, preferences: list[Preference]) -> None:
    judge = Judge(asked_by(tiny_model("qwen3_vl"), name), JudgeSettings(max_tokens=9))
    pairs = [preferences[0], replace(preferences[0], b=preferences[1].b), preferences[1]]  # they share images
    variants = strategy_variants(["soft"], [1, 3], [True, False], [4, 9])
    for row in compare_strategies(judge, pairs, SPEC, variants).rows:
        expected = evaluate(replace(judge, settings=row.variant.settings(judge.settings)), pairs, SPEC)
        assert_same(row.evaluation.verdicts, expected.verdicts)
        assert row.evaluation.tokens_per_pair == expected.tokens_per_pair


def test_a_calibration_is_for_one_bound(
    demo_judge: Callable[..., Judge], preferences: list[Preference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = demo_judge(max_tokens=24)
    quality = CalibrationMetrics(0.0, 0.0, 0.0, 0.5)
    fit = Calibration(judge.conditions(), TemperatureScaling(3.0, 0.5), "demo", "train", 1, 1, quality, quality)
    judge = replace(judge, calibration=CalibrationFile(tmp_path / "calibration.json", (fit,)))
    monkeypatch.setattr(verdict_source, "roll_out", None)
    with pytest.raises(ConfigError, match="made for max_tokens 24, not 8"):
        compare_strategies(judge, preferences, SPEC, strategy_variants(["soft"], [1], [True], [8, 24]))


def test_variants() -> None:
    variants = strategy_variants(["soft"], [2, 1], [True, False], [16, 8, 16])
    assert [(each.think, each.samples, each.max_tokens) for each in variants] == [
        (False, 1, None), (True, 1, 8), (True, 1, 16), (True, 2, 8), (True, 2, 16),
    ]  # fmt: skip
    assert str(variants[-1]) == "soft, 2 samples of up to 16 tokens"
    assert str(variants[0]) == "soft, without thinking"
    assert varies_compute(variants)
    assert varies_compute(strategy_variants(["soft"], [1, 2], [True]))
    assert not varies_compute(strategy_variants(["soft", "select"], [4], [True, False]))
    assert not varies_compute(strategy_variants(["soft"], [1, 2], [False], [8, 16]))


def test_the_best_of_few_tokens_by_hand() -> None:
    at_once, short, long = point(1, None, 0, 0.6, think=False), point(1, 8, 16, 0.55), point(1, 16, 30, 0.7)
    two_short, two_long, equal = point(2, 8, 32, 0.7), point(2, 16, 60, 0.8), point(4, 8, 60, 0.75)
    points = [two_long, equal, at_once, short, two_short, long]
    assert frontier(points) == [at_once, long, two_long]
    assert frontier([]) == []
    assert lines(points) == {
        "1 sample, greedy": [short, long], "2 samples": [two_short, two_long], "4 samples": [equal],
    }  # fmt: skip
    assert list(settings_of_marks(points).values()) == ["up to 8 tokens"] * 3 + ["up to 16 tokens"] * 2


def test_with_one_bound_the_samples_are_one_line() -> None:
    one, four = point(1, None, 30, 0.7), point(4, None, 120, 0.8)
    written = point(1, None, 6, 0.6, think=False)  # an answer that is written, not read
    assert lines([four, written, one]) == {"without thinking": [written], "thinking": [one, four]}
    assert list(settings_of_marks([four, written, one]).values()) == ["1 sample, greedy", "4 samples"]

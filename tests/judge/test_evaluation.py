"""The metrics of `eval`, by hand-computed cases and by independent arithmetic; evaluations by every protocol."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxpref.cli import main
from mlxpref.demo.preferences import demo_preferences
from mlxpref.errors import ConfigError, DataError
from mlxpref.judge import verdict_source
from mlxpref.judge.evaluation import EvaluationSpec, evaluate, evaluation_of, evaluation_of_scores, tie_threshold_of
from mlxpref.judge.judge import Judge
from mlxpref.judge.metrics import Metrics, measure
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.preferences import Preference
from mlxpref.ranking.log_odds import soft_preference
from mlxpref.verdict import Verdict
from tests.conftest import GOLDEN
from tests.data_layouts import make_layout

CONTRACT = [
    "data", "split", "protocol", "strategy", "pairs", "ties_dropped", "accuracy", "accuracy_low", "accuracy_high",
    "accuracy_macro", "both_orders_accuracy", "position_consistency", "first_choice_rate", "first_image_baseline",
    "brier", "ece", "unreadable", "tokens", "seconds", "official", "human_ceiling", "tokens_per_pair",
    "seconds_per_pair", "left_out",
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


def test_perfect_calibration_has_no_error() -> None:
    people = np.array([0.1, 0.3, 0.6, 0.8, 0.95])
    metrics = measure(people, people, people, list("abcde"))
    assert metrics.brier == pytest.approx(0)
    assert metrics.ece == pytest.approx(0)
    assert metrics.accuracy == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0.01, 0.99)] * 3), min_size=1, max_size=30), st.randoms())
def test_metrics_are_symmetric(rows: list[tuple[float, float, float]], random: np.random.Generator) -> None:
    rows = [(x, y, 0.6 if z == 0.5 else z) for x, y, z in rows]
    turned = [random.random() < 0.5 for _ in rows]
    other = [(1 - y, 1 - x, 1 - z) if turn else (x, y, z) for turn, (x, y, z) in zip(turned, rows, strict=True)]
    one, two = (measured(*[list(column) for column in zip(*r, strict=True)]) for r in (rows, other))
    for name in Metrics.__dataclass_fields__:
        if name not in ("first_image_baseline", "ece"):  # a value on a bin's edge may change its bin by rounding
            assert getattr(one, name) == pytest.approx(getattr(two, name), nan_ok=True), name


def test_interval_over_groups() -> None:
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


def test_judge_that_prefers_the_first() -> None:
    people = np.array([1.0] * 59 + [0.0] * 41)
    metrics = measure(np.full(100, 0.9), np.full(100, 0.1), people, [str(i) for i in range(100)])
    assert metrics.first_image_baseline == pytest.approx(0.59)
    assert metrics.accuracy == 0  # both orders cancel: it has no opinion
    assert metrics.position_consistency == 0
    assert metrics.first_choice_rate == 1


def test_evaluation_json(demo_judge: Callable[..., Judge]) -> None:
    preferences = demo_preferences("test", 6)
    tied = [replace(preferences[0], p_people=0.5), *preferences[1:]]
    evaluation = evaluate(demo_judge(think=False), tied, EvaluationSpec("demo", "test"))
    report = evaluation.to_json()
    assert list(report) == CONTRACT
    assert report["pairs"] == 5
    assert report["ties_dropped"] == 1
    assert report["unreadable"] == 0
    with pytest.raises(DataError, match="no preference"):
        evaluate(demo_judge(), tied[:1], EvaluationSpec("demo", "test"))


def test_strategies_read_the_completions(demo_judge: Callable[..., Judge]) -> None:
    preferences = demo_preferences("test", 4)
    judge = demo_judge(max_tokens=60)
    for strategy in ("soft", "select", "score"):
        verdicts = list(judge.pairs([]))
        assert verdicts == []
        report = evaluate(judge, preferences, EvaluationSpec("demo", "test", strategy)).to_json()  # type: ignore[arg-type]
        assert report["strategy"] == strategy
        assert report["tokens"] > 0


def make_pairs(*orders: tuple[float | None, float | None], tokens: int = 3) -> list[PairVerdict]:
    """Verdicts of pairs by their preferences for a, where it was shown first and second."""

    def verdict(p_first: float | None) -> Verdict:
        return Verdict("", 0, 0) if p_first is None else Verdict("", p_first, 1 - p_first, tokens=tokens)

    return [
        PairVerdict((verdict(first),), (verdict(None if second is None else 1 - second),)) for first, second in orders
    ]


def of(*rows: tuple[float, str], label: Sequence[Any] = ()) -> list[Preference]:
    """Preferences of ten votes by the share for a and the group."""
    sides = [*label, *[None] * (len(rows) - len(label))]
    return [
        Preference(group, Path(f"{i}a"), Path(f"{i}b"), p_a, 10, group, side)
        for i, ((p_a, group), side) in enumerate(zip(rows, sides, strict=True))
    ]


def test_verdicts_are_measured_without_a_judge() -> None:
    preferences = of((1, "x"), (0.5, "x"), (0.5, "x"), (0.2, "y"), label=(None, "a", None, None))
    verdicts = make_pairs((0.8, 0.8), (0.4, None), (None, 0.3))
    result = evaluation_of(preferences, verdicts, EvaluationSpec("hpdv2", "test", protocol="hpdv2"), seconds=6.0)
    # The 5:5 pair with a label counts, the one without is dropped; the mean over prompts is that of 1/2 and 1.
    assert (result.metrics.pairs, result.metrics.ties_dropped) == (3, 1)
    assert result.metrics.accuracy == pytest.approx(2 / 3)
    assert result.official.value == pytest.approx((1 / 2 + 1) / 2)
    assert "1 - inversions" in result.official.definition
    assert result.metrics.brier == pytest.approx((0.2**2 + 0.1**2 + 0.1**2) / 3)
    assert result.human_ceiling == pytest.approx((1 + 20 / 45 + 29 / 45) / 3)
    assert result.unreadable == pytest.approx(2 / 6)
    assert (result.tokens, result.tokens_per_pair, result.seconds_per_pair) == (12, 12 / 3, 2.0)
    with pytest.raises(ValueError, match="3 preferences to judge, 2 that were judged"):
        evaluation_of(preferences, verdicts[:2], result.spec, seconds=0)


def test_recalled_pairs_take_no_seconds() -> None:
    def json_of(recalled: int) -> dict[str, Any]:
        verdicts = [
            replace(verdict, recalled=(number < recalled, number < recalled))
            for number, verdict in enumerate(make_pairs((0.8, 0.8), (0.6, 0.6)))
        ]
        return evaluation_of(of((1, "x"), (1, "y")), verdicts, EvaluationSpec("x", "y"), seconds=3.0).to_json()

    assert [json_of(recalled)["seconds_per_pair"] for recalled in (0, 1, 2)] == [1.5, 3.0, None]
    assert [json_of(recalled)["tokens"] for recalled in (0, 1, 2)] == [12, 6, 0]
    assert json_of(2)["tokens_per_pair"] == 6.0
    assert json.loads(json.dumps(json_of(2), allow_nan=False))["official"]["value"] == 1


def test_pickapic_counts_ties() -> None:
    preferences = of((1, "x"), (0.5, "y"), (0, "z"), (0.5, "w"))
    verdicts = make_pairs((0.9, 0.9), (0.55, 0.55), (0.45, 0.45), (0.9, 0.9))

    def found(threshold: float | None) -> Any:
        spec = EvaluationSpec("x", "y", protocol="pickapic", tie_threshold=threshold)
        return evaluation_of(preferences, verdicts, spec, seconds=0)

    assert found(0.0).official.value == pytest.approx((1 + 0.5 + 1 + 0.5) / 4)
    assert found(0.2).official.value == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    assert (found(0.2).metrics.pairs, found(0.2).metrics.ties_dropped, found(0.2).metrics.accuracy) == (2, 2, 1)
    assert found(0.2).to_json()["tie_threshold"] == 0.2
    with pytest.raises(ConfigError, match="give --tie-threshold"):
        found(None)
    # The tie at 0.8 from even is worth as much as the two right ones that it costs, so the smallest is taken.
    assert tie_threshold_of(preferences, verdicts) == 0.0
    assert tie_threshold_of(preferences[:2], verdicts[:2]) == 0.2
    with pytest.raises(DataError, match="all 2 preferences are ties"):
        evaluation_of_scores(preferences[1::2], np.ones(2), EvaluationSpec("x", "y", None, "pickapic"))


QUICK = ("--model", str(GOLDEN / "qwen2_5_vl"), "--max-tokens", "4")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in ("eval", *arguments, *QUICK)])


@pytest.fixture
def ones_own(tmp_path: Path) -> Path:
    """Six pairs, four of them of the split test, with one tie in each split."""
    rows = []
    for number, preference in enumerate(demo_preferences("test", 6)):
        for side, image in (("a", preference.a), ("b", preference.b)):
            image.save(tmp_path / f"{number}{side}.png")  # type: ignore[union-attr]
        split = "test" if number < 4 else "validation_unique"
        p_a = 0.5 if number in (3, 5) else 0.9
        rows.append({"prompt": preference.prompt, "a": f"{number}a.png", "b": f"{number}b.png", "p_a": p_a})
        rows[-1] |= {"split": split, "votes": 10}
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_missing_validation_split_names_the_option() -> None:
    result = run("--data", "demo", "--protocol", "pickapic", "--limit", "4")
    assert result.exit_code == 1
    assert "split 'validation_unique': the demo has train, test, heldout" in result.stderr
    assert "chooses its tie threshold there: or give --tie-threshold" in result.stderr


def test_eval_chooses_a_tie_threshold(ones_own: Path) -> None:
    result = run("--data", ones_own, "--protocol", "pickapic", "--json", "--limit", "4")
    assert result.exit_code == 0, result.output
    assert "the tie threshold is chosen on 2 preferences of validation_unique, which are judged first" in result.stderr
    assert "--limit 4: the official number is that of the whole split, this one of a part" in result.stderr
    actual = json.loads(result.stdout)
    keys = [*CONTRACT, "tie_threshold", "think", "samples", "max_tokens", "calibration", "learned_from"]
    assert list(actual)[: len(keys)] == list(actual["results"][0]) == keys
    assert (actual["protocol"], actual["pairs"], actual["ties_dropped"]) == ("pickapic", 3, 1)
    fixed = run("--data", ones_own, "--protocol", "pickapic", "--json", "--tie-threshold", actual["tie_threshold"])
    assert json.loads(fixed.stdout)["official"] == actual["official"]
    assert "validation_unique" not in fixed.stderr


def test_tie_threshold_needs_other_preferences(ones_own: Path) -> None:
    rows = [json.loads(line) for line in ones_own.read_text(encoding="utf-8").splitlines()]
    without = [json.dumps({key: value for key, value in row.items() if key != "split"}) for row in rows]
    ones_own.write_text("\n".join(without), encoding="utf-8")
    result = run("--data", ones_own, "--protocol", "pickapic")
    assert result.exit_code == 1
    assert "has none of its own; give --tie-threshold" in result.stderr


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--protocol", "accuracy"], "'accuracy'; known are pairs, imagereward, hpdv2, pickapic, hpdv3"),
        (["--tie-threshold", "0.1"], "--tie-threshold is for a judge and --protocol pickapic"),
        (["--tie-threshold", "2", "--protocol", "pickapic"], "is not in the range 0<=x<=1"),
    ],
)
def test_wrong_usage(ones_own: Path, more: list[str], problem: str) -> None:
    result = run("--data", ones_own, *more)
    assert result.exit_code == 2
    assert problem in result.stderr


def test_interrupted_evaluation_continues(ones_own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--data", ones_own, "--rows", "2", "--json")
    whole = json.loads(run(*arguments, "--no-store").stdout)
    batches = 0
    roll_out = verdict_source.roll_out

    def interrupted(*given: Any, **others: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise KeyboardInterrupt
        return roll_out(*given, **others)

    store = ("--store", tmp_path / "store.sqlite")
    monkeypatch.setattr(verdict_source, "roll_out", interrupted)
    assert run(*arguments, *store).exit_code == 130
    result = run(*arguments, *store)
    assert result.exit_code == 0, result.output
    assert "4 of 6 comparisons were judged before" in result.stderr
    assert batches == 3 + 1
    actual = json.loads(result.stdout)
    timed = {"tokens", "seconds", "seconds_per_pair", "vision_runs", "results"}
    assert {k: v for k, v in actual.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}
    assert actual["tokens"] < whole["tokens"] == 3 * whole["tokens_per_pair"]
    again = json.loads(run(*arguments, *store).stdout)
    assert (batches, again["tokens"], again["seconds_per_pair"]) == (4, 0, None)


@pytest.mark.parametrize("name", ["imagereward", "hpdv2", "pickapic", "pickapic_v1", "hpdv3"])
def test_public_data_sets_have_their_protocol(name: str, tmp_path: Path) -> None:
    make_layout(name, tmp_path, prompts=2)
    result = run("--data", name, "--data-dir", tmp_path, "--no-think", "--json", "--max-pixels", "4096")
    assert result.exit_code == 0, result.output
    actual = json.loads(result.stdout)
    assert actual["protocol"] == name.removesuffix("_v1")
    assert actual["pairs"] > 0
    assert ("tie_threshold" in actual) == ("validation_unique" in result.stderr) == name.startswith("pickapic")
    assert (actual["human_ceiling"] is not None) == (name == "hpdv2")
    if name in ("imagereward", "hpdv3"):
        assert actual["official"]["value"] == actual["accuracy"]

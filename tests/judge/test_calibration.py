"""Calibration: the fit against independent ones, its invariants, what its file holds for, and what it changes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import mlxpref
from mlxpref.cli import main
from mlxpref.demo.preferences import demo_preferences
from mlxpref.errors import ConfigError, DataError
from mlxpref.judge import verdict_source
from mlxpref.judge.calibrate import calibrate, calibration_metrics, calibration_of, cross_fitted
from mlxpref.judge.calibration import (
    CALIBRATION_FILE,
    Calibration,
    CalibrationFile,
    JudgeConditions,
    cached_calibrations,
    read_calibrations,
    write_calibration,
)
from mlxpref.judge.evaluation import EvaluationSpec, evaluate
from mlxpref.judge.judge import Judge
from mlxpref.judge.loading import calibrated, calibration_path, known_calibrations
from mlxpref.judge.metrics import Floats, both_orders
from mlxpref.judge.pair_verdict import PairVerdict
from mlxpref.judge.store import Store
from mlxpref.preferences import Pair, Preference
from mlxpref.ranking.temperature import COLDEST, HOTTEST, TemperatureScaling, fit_temperature
from mlxpref.verdict import Strategy, Verdict
from tests.conftest import picture, write_adapter
from tests.messages import messages

MakeJudge = Callable[..., Judge]
relaxed = settings(deadline=None, max_examples=20)  # a busy machine is not a failure
CONDITIONS = JudgeConditions("f" * 64, "words", 1, 1000, think=False, samples=1, max_tokens=0)


def log_odds(p: Any) -> Any:
    return np.log(p / (1 - p))


def probability(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def draw_answers(count: int, temperature: float, bias: float, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """A judge with a temperature and a bias of its own, noise in each order, and one vote a pair."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1.5, count)
    first, second = (truth + rng.normal(0, 0.3, (2, count))) * temperature + np.array([[bias], [-bias]])
    return probability(first), probability(second), (rng.random(count) < probability(truth)).astype(float)


def entropy(log_odds: Floats, p_people: Floats) -> float:
    return float(np.logaddexp(0, log_odds).sum() - p_people @ log_odds)


# The fit


@pytest.mark.parametrize(("temperature", "bias"), [(1, 0), (4, 3), (0.3, -0.2)])
def test_the_fit_is_that_of_plain_gradient_descent(temperature: float, bias: float) -> None:
    first, second, people = draw_answers(300, temperature, bias)
    fit = fit_temperature(first, second, people)
    pair = (log_odds(first) + log_odds(second)) / 2
    orders = np.concatenate([log_odds(first), -log_odds(second)])
    shares = np.concatenate([people, 1 - people])
    slope, shift = 0.0, 0.0
    for _ in range(3000):
        # Two more answers among the pairs, one for either side.
        pull = pair @ (probability(slope * pair) - people) + 2 * pair @ (probability(slope * pair) - 0.5) / 300
        slope -= 4 * pull / (pair @ pair)
        shift += 4 * float((probability(slope * (orders - shift)) - shares).sum()) / (slope * len(orders))
    assert fit.temperature == pytest.approx(1 / slope, rel=1e-6)
    assert fit.position_bias == pytest.approx(shift, abs=1e-6)


def test_no_other_temperature_or_bias_fits_better() -> None:
    first, second, people = draw_answers(200, 2, 1)
    fit = fit_temperature(first, second, people)
    pair, drawn_in = (log_odds(first) + log_odds(second)) / 2, (200 * people + 1) / 202
    orders, shares = np.concatenate([log_odds(first), -log_odds(second)]), np.concatenate([people, 1 - people])
    grid = np.linspace(0.5, 5, 451)
    best = grid[np.argmin([entropy(pair / t, drawn_in) for t in grid])]
    assert fit.temperature == pytest.approx(best, abs=0.011)
    grid = np.linspace(-1, 3, 401)
    best = grid[np.argmin([entropy((orders - b) / fit.temperature, shares) for b in grid])]
    assert fit.position_bias == pytest.approx(best, abs=0.011)


def test_many_pairs_give_the_truth() -> None:
    fit = fit_temperature(*draw_answers(20_000, 3, 2))
    assert fit.temperature == pytest.approx(3, rel=0.05)
    assert fit.position_bias == pytest.approx(2, abs=0.05)


@given(st.integers(0, 20), st.floats(-3, 3), st.floats(0.2, 4))
@relaxed
def test_constant_and_factor_are_undone(seed: int, constant: float, factor: float) -> None:
    first, second, people = draw_answers(60, 1, 0, seed)
    moved_first, moved_second = (
        probability(factor * log_odds(p) + sign * constant) for p, sign in ((first, 1), (second, -1))
    )
    plain, moved = fit_temperature(first, second, people), fit_temperature(moved_first, moved_second, people)
    assert moved.temperature == pytest.approx(factor * plain.temperature, rel=1e-6)
    assert moved.position_bias == pytest.approx(factor * plain.position_bias + constant, abs=1e-6)
    assert moved.p_first(moved_first) == pytest.approx(plain.p_first(first), abs=1e-7)


@given(st.integers(0, 20))
@relaxed
def test_fit_is_symmetric(seed: int) -> None:
    first, second, people = draw_answers(40, 2, 1, seed)
    exchanged = np.random.default_rng(seed).random(40) < 0.5
    turned = [np.where(exchanged, 1 - other, p) for p, other in ((first, second), (second, first), (people, people))]
    plain, other = fit_temperature(first, second, people), fit_temperature(*turned)
    assert other.temperature == pytest.approx(plain.temperature, rel=1e-9)
    assert other.position_bias == pytest.approx(plain.position_bias, abs=1e-9)


def test_hopeless_and_perfect_judges_are_bounded() -> None:
    first, second, _ = draw_answers(100, 1, 0.5)
    people = (both_orders(first, second) > 0.5).astype(float)
    right, wrong = fit_temperature(first, second, people), fit_temperature(first, second, 1 - people)
    assert COLDEST < right.temperature < 1
    rescaled = right.p_first(first), 1 - right.p_first(1 - second)
    assert calibration_metrics(*rescaled, people).nll < calibration_metrics(first, second, people).nll / 3
    assert wrong.temperature == HOTTEST
    even = fit_temperature(probability(np.full(30, 2.0)), probability(np.full(30, -2.0)), np.ones(30))
    assert even == TemperatureScaling(1.0, pytest.approx(2.0))
    assert fit_temperature([0.7], [0.7], [1.0]).temperature == pytest.approx(log_odds(0.7) / np.log(2))
    certain = fit_temperature([1.0, 0.0] * 10, [1.0, 1.0] * 10, [1.0, 0.0] * 10)
    assert np.isfinite([certain.temperature, certain.position_bias]).all()


def test_no_position_bias_after_calibration() -> None:
    first, second, people = draw_answers(50, 2, 4)
    fit = fit_temperature(first, second, people)
    assert fit.p_first(np.concatenate([first, 1 - second])).mean() == pytest.approx(0.5)


# What is measured


def test_metrics_are_cross_fitted() -> None:
    """The fit of a fold does not know its own people: turning all of them changes nothing there."""
    first, second, people = draw_answers(50, 2, 1)
    fold = np.arange(50) % 5
    turned = np.where(fold == 3, 1 - people, people)
    plain, other = cross_fitted(first, second, people, fold), cross_fitted(first, second, turned, fold)
    for one, two in zip(plain, other, strict=True):
        assert (one[fold == 3] == two[fold == 3]).all()
        assert (one[fold != 3] != two[fold != 3]).all()


def made_of(first: Floats, second: Floats, people: Floats, groups: Sequence[str]) -> Calibration:
    preferences = [
        Preference("x", picture(0), picture(1), float(p), group=group) for p, group in zip(people, groups, strict=True)
    ]
    verdicts = [
        PairVerdict((Verdict("", p, 1 - p),), (Verdict("", 1 - q, q),)) for p, q in zip(first, second, strict=True)
    ]
    return calibration_of(preferences, verdicts, CONDITIONS, "data", "test")


def test_calibration_reports_its_gain() -> None:
    first, second, people = draw_answers(1000, 4, 2)
    calibration = made_of(first, second, people, [f"prompt {i % 40}" for i in range(1000)])
    assert (calibration.pairs, calibration.folds, calibration.warnings) == (1000, 5, ())
    assert calibration.rescaling.temperature == pytest.approx(fit_temperature(first, second, people).temperature)
    pair = (log_odds(first) + log_odds(second)) / 2
    assert calibration.before.nll == pytest.approx(entropy(pair, people) / 1000)
    assert calibration.before.brier == pytest.approx(((probability(pair) - people) ** 2).mean())
    assert calibration.after.nll < calibration.before.nll - 0.3
    assert calibration.after.brier < calibration.before.brier
    assert calibration.after.ece < 0.05 < calibration.before.ece
    assert calibration.before.first_choice_rate > 0.6
    assert calibration.after.first_choice_rate == pytest.approx(0.5, abs=0.01)


def test_proper_scores_fall_where_the_error_in_bins_rises() -> None:
    """Most answers are as sure as they should be, and few far too sure: one temperature makes most of them too even."""
    first = np.tile([0.75] * 7 + [0.9999] * 3, 40)
    people = np.concatenate([[1, 1, 1, step % 4 > 0, 1, 1, step % 4 != 1, 1, 1, 0] for step in range(40)])
    calibration = made_of(first, first, people.astype(float), [f"prompt {i // 10}" for i in range(400)])
    assert calibration.after.nll < calibration.before.nll - 0.1
    assert calibration.after.ece > calibration.before.ece + 0.02
    assert calibration.warnings[-1].startswith(
        "the probabilities come nearer to people's, yet the calibration error rises"
    )


@pytest.mark.parametrize(
    ("count", "wrong", "groups", "problem"),
    [
        (20, False, 5, "20 pairs are few"),
        (60, True, 5, "no better than chance"),
        (60, True, 5, "it does not help"),
        (60, False, 1, "all are of one prompt"),
    ],
)
def test_doubtful_calibration_warns(count: int, wrong: bool, groups: int, problem: str) -> None:
    first, second, people = draw_answers(count, 0.02 if wrong else 1, 0)
    people = (both_orders(first, second) < 0.5).astype(float) if wrong else people
    if problem == "it does not help":
        first, second = np.full(count, 0.5), np.full(count, 0.5)
    calibration = made_of(first, second, people, [f"{i % groups}" for i in range(count)])
    assert any(problem in remark for remark in calibration.warnings), calibration.warnings


def test_unreadable_orders_are_left_out() -> None:
    preferences = demo_preferences("test", 12)
    pair = PairVerdict((Verdict("", 0.8, 0.2),), (Verdict("", 0.5, 0.5),))
    verdicts = [pair] * 11 + [replace(pair, a_shown_second=(Verdict("?"),))]
    calibration = calibration_of(preferences, verdicts, CONDITIONS, "demo", "test")
    assert calibration.pairs == 11
    assert calibration.warnings[0] == "1 pair could not be read in both orders: left out"
    with pytest.raises(DataError, match="9 pairs were judged and could be read in both orders; at least 10"):
        calibration_of(preferences[2:], verdicts[2:], CONDITIONS, "demo", "test")


# What it changes


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999), st.floats(0.05, 20), st.floats(-5, 5))
@relaxed
def test_calibrated_pairs_are_antisymmetric(p: float, q: float, temperature: float, b: float) -> None:
    orders = (Verdict("", p, 1 - p),), (Verdict("", q, 1 - q),)
    pair, exchanged = (
        PairVerdict(*each, rescaling=TemperatureScaling(temperature, b)) for each in (orders, orders[::-1])
    )
    assert pair.p_a == pytest.approx(1 - exchanged.p_a, abs=1e-9)
    assert pair.p_a_shown_first == pytest.approx(1 - (exchanged.p_a_shown_second or 0), abs=1e-12)
    assert pair.p_a_shown_first == pytest.approx(probability((log_odds(p) - b) / temperature), abs=1e-9)
    spread = max(abs(log_odds(p) - b), abs(log_odds(q) - b)) / temperature
    if spread < 20:
        assert log_odds(pair.p_a) == pytest.approx((log_odds(p) - log_odds(q)) / 2 / temperature, abs=1e-4)


def test_samples_are_averaged_before_rescaling() -> None:
    verdicts = (Verdict("", 0.9, 0.1), Verdict("", 0.5, 0.5), Verdict("?"))
    pair = PairVerdict(verdicts, (Verdict("?"),), rescaling=TemperatureScaling(2.0, 1.0))
    assert pair.p_a_shown_first == pytest.approx(probability((log_odds(0.7) - 1) / 2))
    assert pair.p_a_shown_second is None
    assert PairVerdict((Verdict("?"),), (Verdict("?"),), rescaling=TemperatureScaling(2.0, 1.0)).p_a == 0.5


def put_on(owner: Judge, path: Path, rescaling: TemperatureScaling, think: bool = False, **changes: Any) -> Judge:
    """Write a calibration for a judge, with conditions changed, and return the judge with it."""
    conditions = replace(owner.conditions(think), **changes)
    calibration = replace(made_of(*draw_answers(20, 1, 0), ["x"] * 20), conditions=conditions, rescaling=rescaling)
    write_calibration(path, [calibration])
    return calibrated(owner, path)


def test_store_keeps_raw_verdicts(demo_judge: MakeJudge, tmp_path: Path) -> None:
    images = [picture(i) for i in range(3)]
    with Store(tmp_path / "kept.sqlite") as store:
        plain = replace(demo_judge(think=False), store=store)
        judge = put_on(plain, tmp_path / "c.json", TemperatureScaling(3.0, 0.5))
        raw, rescaled = plain.compare(*images[:2], "a hat"), judge.compare(*images[:2], "a hat")
        assert rescaled.recalled == (True, True)
        assert rescaled.verdicts == raw.verdicts
        assert log_odds(rescaled.p_a) == pytest.approx(log_odds(raw.p_a) / 3)
        scores = judge.score(images, "a hat"), plain.score(images, "a hat")
        assert np.mean(scores[0]) == pytest.approx(0.5)
        assert np.ptp(scores[0]) < np.ptp(scores[1])
        ranked, before = judge.rank(images, "a hat", "none"), plain.rank(images, "a hat", "none")
    assert [i.index for i in ranked.strengths.images] == [i.index for i in before.strengths.images]
    assert ranked.pairs[0].verdict.verdicts == before.pairs[0].verdict.verdicts
    assert abs(ranked.pairs[0].verdict.p_a - 0.5) < abs(before.pairs[0].verdict.p_a - 0.5)


def test_only_soft_preferences_are_rescaled(demo_judge: MakeJudge, tmp_path: Path) -> None:
    judge = put_on(demo_judge(max_tokens=4), tmp_path / "c.json", TemperatureScaling(3.0, 0.5))
    pair = Pair(picture(1), picture(2), "a hat")
    strategies: tuple[Strategy, ...] = ("select", "score")
    for strategy in strategies:
        assert next(judge.pairs([pair], strategy, think=False)).rescaling is None
    assert next(judge.pairs([pair], "soft", think=False)).rescaling == TemperatureScaling(3.0, 0.5)


# Its file


def test_file_round_trip(tmp_path: Path) -> None:
    calibration = made_of(*draw_answers(60, 2, 1), [f"{i % 7}" for i in range(60)])
    path = tmp_path / "new folder" / CALIBRATION_FILE
    result = write_calibration(path, [calibration])
    assert read_calibrations(path) == result == CalibrationFile(path, (calibration,))
    thinking = replace(calibration, conditions=replace(CONDITIONS, think=True, max_tokens=256))
    assert write_calibration(path, [thinking]).calibrations == (calibration, thinking)
    again = replace(calibration, rescaling=TemperatureScaling(9.0, 0.0))
    assert write_calibration(path, [again]).calibrations == (again, thinking)
    other = replace(calibration, conditions=replace(CONDITIONS, judge="another"))
    assert write_calibration(path, [other]).calibrations == (other,)
    assert [file.name for file in path.parent.iterdir()] == [CALIBRATION_FILE]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"calibrations": [{}]}', '{"calibrations": 3}', "\xff"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"notes\.json: not a calibration"):
        read_calibrations(path)
    with pytest.raises(DataError, match=r"notes\.json: not a calibration"):
        write_calibration(path, [made_of(*draw_answers(20, 1, 0), ["x"] * 20)])
    assert path.read_text(encoding="latin-1") == text


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "two", None])
def test_impossible_temperature_is_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / CALIBRATION_FILE
    write_calibration(path, [made_of(*draw_answers(20, 1, 0), ["x"] * 20)])
    content = json.loads(path.read_text())
    content["calibrations"][0]["rescaling"]["temperature"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="not a calibration"):
        read_calibrations(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"judge": "0" * 64}, "another model or adapter"),
        ({"profile": "older"}, "other words of asking, or another criterion"),
        ({"method": 0}, "another way of judging"),
        ({"max_pixels": 1000}, "max_pixels 1000, not 7056"),
        ({"samples": 4}, "samples 4, not 1"),
        ({"max_tokens": 9}, "max_tokens 9, not 4"),
    ],
)
def test_calibration_of_another_judge_is_refused(
    demo_judge: MakeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], problem: str
) -> None:
    path = tmp_path / "c.json"
    judge = put_on(demo_judge(max_tokens=4), path, TemperatureScaling(2.0, 0.0), think=True, **changes)
    monkeypatch.setattr(verdict_source, "roll_out", None)  # nothing is judged
    with pytest.raises(ConfigError, match="or leave it out") as error:
        judge.compare(picture(1), picture(2), "a hat")
    assert str(error.value).startswith(f"{path}: made for {problem} (with thinking); ")


@pytest.mark.parametrize(("changes", "problem"), [({"samples": 4}, "samples 4, not 1"), ({"judge": "0"}, "another")])
def test_a_found_calibration_that_does_not_hold_is_left_off(
    demo_judge: MakeJudge, changes: dict[str, Any], problem: str
) -> None:
    judge = demo_judge(max_tokens=4)
    own = calibration_path(judge)
    put_on(judge, own, TemperatureScaling(2.0, 0.0), think=True, **changes)
    with messages() as lines:
        found = calibrated(judge)
    assert found.calibration is None
    assert len(lines) == 1
    assert problem in lines[0]
    assert found.rank([picture(i) for i in range(3)], "a hat").pairs[0].verdict.rescaling is None
    own.write_text("{}")
    with messages() as lines:
        assert calibrated(judge).calibration is None
    assert "not a calibration" in lines[0]


def test_a_ranking_has_one_scale(demo_judge: MakeJudge) -> None:
    judge = demo_judge(max_tokens=2)
    put_on(judge, calibration_path(judge), TemperatureScaling(2.0, 0.0))
    found, images = calibrated(judge), [picture(i) for i in range(11)]
    assert {p.verdict.rescaling for p in found.rank(images, "a hat", "none", pairs=3).pairs} != {None}
    with messages() as lines:
        pairs = found.rank(images, "a hat", "top", pairs=3).pairs
    assert {pair.verdict.rescaling for pair in pairs} == {None}
    assert any("has no calibration for judging with thinking" in line for line in lines)


def test_fitted_preferences_are_counted(demo_judge: MakeJudge) -> None:
    judge, preferences = demo_judge(), demo_preferences("heldout", 24)
    calibration = calibrate(judge, preferences[:14], "demo", "heldout", think=False)
    file = CalibrationFile(Path("c.json"), (calibration,))
    with messages() as lines:
        swapped = [replace(p, a=p.b, b=p.a, p_people=1 - p.p_people) for p in preferences[4:]]
        assert file.count_fitted(swapped) == 10
    assert "10 of 20 preferences are among those that c.json was fitted to" in lines[0]
    with messages() as lines:
        assert file.count_fitted(preferences[14:]) == 0
    assert lines == []


def test_each_mode_needs_its_calibration(
    demo_judge: MakeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = put_on(demo_judge(max_tokens=2), tmp_path / "c.json", TemperatureScaling(2.0, 0.0))
    images = [picture(i) for i in range(11)]
    with monkeypatch.context() as patch:
        patch.setattr(verdict_source, "roll_out", None)  # nothing is judged
        with pytest.raises(ConfigError, match="has no calibration for judging with thinking"):
            judge.rank(images, "a hat", "top")
    assert len(judge.rank(images[:3], "a hat", "none").pairs) == 3
    judge = put_on(judge, tmp_path / "c.json", TemperatureScaling(4.0, 0.0), think=True)
    pairs = judge.rank(images, "a hat", "top", pairs=5).pairs
    assert {pair.verdict.rescaling for pair in pairs} == {TemperatureScaling(2.0, 0.0), TemperatureScaling(4.0, 0.0)}


def test_each_criterion_has_its_calibration(tmp_path: Path) -> None:
    judge, preferences = mlxpref.load("demo", think=False), demo_preferences("heldout", 12)
    files = [
        mlxpref.calibrate(judge, preferences, think=False, criterion=criterion)
        for criterion in ("", "the sharper eyes", "the brighter one")
    ]
    assert len({file.path for file in files}) == 3
    assert {file.path for file in known_calibrations()} == {file.path for file in files}
    assert str(files[1].calibrations[0]).startswith("without thinking, by “the sharper eyes”: ")
    sharper = mlxpref.load("demo", think=False, criterion="the sharper eyes")
    assert sharper.calibration == replace(files[1], given=False)
    with pytest.raises(ConfigError, match="made for other words of asking, or another criterion"):
        calibrated(sharper, files[0].path).compare(picture(1), picture(2))
    adapter = write_adapter(tmp_path / "adapter", judge.vlm)
    other = mlxpref.load("demo", adapter, think=False, criterion="the sharper eyes")
    assert calibration_path(other).parent == adapter
    assert calibration_path(other).name not in (
        CALIBRATION_FILE,
        calibration_path(replace(other, settings=replace(other.settings, criterion="x"))).name,
    )
    put_on(other, calibration_path(other), TemperatureScaling(3.0, 0.0))
    assert calibration_path(other) in [file.path for file in known_calibrations(adapter)]


def test_default_calibration_file(tmp_path: Path) -> None:
    judge = mlxpref.load("demo", think=False)
    assert judge.calibration is None
    own = calibration_path(judge)
    assert own.parent == cached_calibrations()
    put_on(judge, own, TemperatureScaling(2.0, 0.25))
    with messages() as lines:
        loaded_judge = mlxpref.load("demo", think=False)
    assert loaded_judge.calibration == replace(read_calibrations(own), given=False)
    assert lines == [f"calibrated by {own} (without thinking: temperature 2, position bias +0.25)"]
    assert mlxpref.load("demo", calibration=False).calibration is None
    adapter = write_adapter(tmp_path / "adapter", judge.vlm)
    other = mlxpref.load("demo", adapter, think=False)
    assert other.calibration is None
    assert calibration_path(other) == adapter / CALIBRATION_FILE
    put_on(other, adapter / CALIBRATION_FILE, TemperatureScaling(3.0, 0.0))
    again = mlxpref.load("demo", adapter, think=False)
    assert again.compare(picture(1), picture(2), "a hat").rescaling == TemperatureScaling(3.0, 0.0)
    wrong = mlxpref.load("demo", adapter, calibration=own, think=False)
    with pytest.raises(ConfigError, match="another model or adapter"):
        wrong.compare(picture(1), picture(2), "a hat")


# The demo judge


def people_who_are(calmer: float, preferences: Sequence[Preference], judge: Judge) -> list[Preference]:
    """The preferences of ten people each who see what the judge sees and are less sure of it."""
    rng = np.random.default_rng(3)
    verdicts = judge.pairs(Pair(p.a, p.b, p.prompt) for p in preferences)
    sure = [probability(log_odds(pair.p_a) / calmer) for pair in verdicts]
    return [
        replace(p, p_people=float(rng.binomial(10, share)) / 10, votes=10)
        for p, share in zip(preferences, sure, strict=True)
    ]


def test_calibration_lowers_the_demo_judges_error(demo_judge: MakeJudge, tmp_path: Path) -> None:
    with Store(tmp_path / "kept.sqlite") as store:
        judge = replace(demo_judge(max_tokens=80), store=store)
        fitted, test = (people_who_are(5, demo_preferences(split, 80), judge) for split in ("train", "test"))
        calibration = calibrate(judge, fitted, "demo", "train", think=True)
        assert calibration.conditions == judge.conditions()
        assert calibration.rescaling.temperature == pytest.approx(5, rel=0.25)
        assert calibration.after.ece < calibration.before.ece / 2
        before = evaluate(judge, test, EvaluationSpec("demo", "test")).metrics
        judge = replace(judge, calibration=CalibrationFile(Path("c.json"), (calibration,)))
        after = evaluate(judge, test, EvaluationSpec("demo", "test")).metrics
    assert after.ece < before.ece / 2
    assert after.brier < before.brier
    assert after.accuracy == before.accuracy


def test_calibration_lowers_proper_scores(demo_judge: MakeJudge) -> None:
    """This judge is sure of what it wrote, and it checks too little: once it is less sure, it is nearer to people."""
    calibration = calibrate(demo_judge(max_tokens=80), demo_preferences("test", 80), "demo", "test", think=True)
    assert calibration.rescaling.temperature > 3
    assert calibration.after.nll < calibration.before.nll - 0.5
    assert calibration.after.brier < calibration.before.brier - 0.05
    assert calibration.after.ece < calibration.before.ece - 0.1


# The commands


def test_what_cannot_be_calibrated_is_said_before_judging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice never removes a file that is no calibration."""
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "x"}\n')
    demo = ("calibrate", "--data", "demo", "--model", "demo", "--no-think", "--no-store", "--limit")
    for arguments, problem in (
        ((*demo, "9"), "9 pairs without ties; at least 10 are needed"),
        ((*demo, "12", "--output", str(mine)), "not a calibration"),
        (("calibrate", "--remove", str(mine)), "not a calibration"),
    ):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 1
        assert problem in done.stderr
        assert "remove" not in done.stderr
        assert "judging" not in done.stderr
    assert mine.read_text() == '{"prompt": "x"}\n'
    monkeypatch.delattr(Judge, "pairs")
    with pytest.raises(DataError, match="not a calibration"):
        mlxpref.calibrate("demo", "demo", limit=12, think=False, output=mine)


def test_rank_applies_the_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "pictures"
    images.mkdir()
    for i, p in enumerate(demo_preferences("test", 2)):
        p.a.save(images / f"{i}a.png")  # type: ignore[union-attr]
        p.b.save(images / f"{i}b.png")  # type: ignore[union-attr]

    def run(command: str, *arguments: str) -> Any:
        return CliRunner().invoke(main, [command, "--model", "demo", *arguments])

    options = ("--data", "demo", "--split", "train", "--limit", "30", "--no-think")
    done = run("calibrate", *options, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    [calibration] = result["calibrations"]
    path = Path(result["file"])
    assert path.parent == tmp_path / "cache" / "calibrations"
    assert read_calibrations(path).calibrations[0].rescaling == TemperatureScaling(**calibration["rescaling"])
    assert (calibration["data"], calibration["split"], calibration["pairs"]) == ("demo", "train", 30)
    table = run("calibrate", *options).stdout
    assert f"written to {path}" in table
    assert "30 pairs are few" in table

    ranking = (str(images), "--prompt", "a red circle", "--json")
    with_it = run("rank", *ranking, "--no-think")
    assert f"calibrated by {path} (" in with_it.stderr
    applied = json.loads(with_it.stdout)
    assert applied["calibration"] == {
        "file": str(path), "modes": [{"think": False, **calibration["rescaling"], "pairs": 30}]
    }  # fmt: skip
    without = json.loads(run("rank", *ranking, "--no-think", "--no-calibration").stdout)
    assert without["calibration"] is None
    for one, other in zip(applied["pairs"], without["pairs"], strict=True):
        expected = log_odds(other["p_a"]) / calibration["rescaling"]["temperature"]
        assert log_odds(one["p_a"]) == pytest.approx(expected, abs=1e-6)
    thinking = run("rank", *ranking, "--think-about", "all")
    assert thinking.exit_code == 0
    assert "has no calibration for judging with thinking" in thinking.stderr
    assert json.loads(thinking.stdout)["calibration"] is None
    given = run("rank", *ranking, "--think-about", "all", "--calibration", str(path))
    assert given.exit_code == 1
    assert "has no calibration for judging with thinking" in given.stderr
    both = run("rank", *ranking, "--calibration", str(path), "--no-calibration")
    assert both.exit_code == 2


def test_calibrations_are_listed_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXPREF_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["calibrate", *arguments])

    assert run("--list").stdout == "no calibrations\n"
    assert "Missing option '--data'" in run().stderr
    path = json.loads(run("--data", "demo", "--model", "demo", "--limit", "12", "--no-think", "--json").stdout)["file"]
    [listed] = json.loads(run("--list", "--json").stdout)["files"]
    assert listed["file"] == path
    [one] = listed["calibrations"]
    assert (one["name"], one["data"], one["split"], one["pairs"]) == ("demo", "demo", "heldout", 12)
    assert len(one["fitted"].split()) == 12
    assert path in run("--list").stdout
    notes = tmp_path / "notes.json"
    notes.write_text("{}")
    assert run("--remove", str(notes)).exit_code == 1
    assert notes.exists()
    assert run("--remove", path).exit_code == 0
    assert not Path(path).exists()


def test_output_is_checked_first(tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "no" / "c.json"):
        done = CliRunner().invoke(main, ["calibrate", "--data", "demo", "--output", str(output)])
        assert done.exit_code == 1
        assert f"--output {output}" in done.stderr

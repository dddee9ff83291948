"""Held-out preferences: measured as `eval` measures, and training ends where they no longer get better."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxpref
from mlxpref.cli.demo import demo_settings
from mlxpref.config import JudgeSettings, TrainSettings, settings_from
from mlxpref.demo.preferences import demo_preferences
from mlxpref.engine.lora import adapter_weights
from mlxpref.engine.vlm import VLM, load_vlm
from mlxpref.errors import DataError
from mlxpref.judge.evaluation import EvaluationSpec, evaluate
from mlxpref.judge.judge import Judge
from mlxpref.training import held_out
from mlxpref.training import trainer as trainer_module
from mlxpref.training.trainer import Trainer
from tests.conftest import GOLDEN
from tests.tolerance import PROBABILITY

QUICK: dict[str, Any] = {
    "steps": 6, "comparisons": 3, "think": False, "learning_rate": 1e-2, "warmup_steps": 1,
    "held_out": 0.3, "held_out_limit": 5, "evaluate_every": 1,
}  # fmt: skip


def trainer(vlm: VLM | None = None, **changes: Any) -> Trainer:
    settings = settings_from(TrainSettings, QUICK | changes)
    return Trainer(vlm or load_vlm(GOLDEN / "qwen2_5_vl", 512 * 512), demo_preferences("train", 40), settings)


def weights_of(training: Trainer) -> dict[str, np.ndarray]:
    return {name: np.array(weight) for name, weight in adapter_weights(training.vlm.model).items()}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(np.array_equal(np.array(one[name]), np.array(other[name])) for name in one)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Accuracies that measurements find, one after the other."""
    accuracies = [0.5, 0.7, 0.6, 0.7, 0.9, 0.9]
    waiting = list(accuracies)
    original = held_out.evaluate

    def measured(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        return replace(result, metrics=replace(result.metrics, accuracy=waiting.pop(0)))

    monkeypatch.setattr(held_out, "evaluate", measured)
    return waiting


@pytest.mark.parametrize("think", [True, False])
def test_held_out_equals_eval(think: bool) -> None:
    vlm = mlxpref.load("demo").vlm
    settings = demo_settings(steps=2, comparisons=3, group=2, think=think, held_out=0.2, held_out_limit=6)
    preferences = demo_preferences("train", 60)
    training = Trainer(vlm, preferences, replace(settings, evaluate_every=1))
    assert {p.prompt for p in training.preferences}.isdisjoint({p.prompt for p in training.held_out.preferences})
    assert 48 <= len(training.preferences) < 60
    assert len(training.held_out.preferences) == 6
    *_, last = training.steps()
    assert {record.prompt for record in last.rollouts} <= {p.prompt for p in training.preferences}
    judge = Judge(vlm, JudgeSettings(think=think, max_tokens=settings.max_tokens))
    expected = evaluate(judge, training.held_out.preferences, EvaluationSpec("demo", "train")).metrics
    assert last.held_out is not None
    for name in ("pairs", "accuracy", "both_orders_accuracy", "position_consistency", "brier", "ece"):
        assert last.held_out[name] == pytest.approx(getattr(expected, name), abs=PROBABILITY), name


def test_measurements_are_due() -> None:
    reports = list(trainer(steps=5, evaluate_every=2).steps())
    assert [report.held_out is not None for report in reports] == [False, True, False, True, True]


def test_measuring_changes_nothing() -> None:
    training, other = trainer(), trainer(evaluate_every=99)
    for each in (training, other):
        list(each.steps())
    assert equal(weights_of(training), weights_of(other))
    assert not training.held_out.best


def test_patience_ends_with_the_best_adapter(scripted: list[float]) -> None:
    training = trainer(patience=2)
    states = []
    for report in training.steps():
        states.append(weights_of(training))
        assert training.held_out.should_stop == (report.step == 4)  # 0.7 again is not better
    assert len(states) == 4
    assert equal(weights_of(training), states[1])
    assert equal(training.held_out.best, states[1])
    assert not equal(states[1], states[3])


def test_patience_keeps_the_best_adapter(scripted: list[float]) -> None:
    training = trainer(patience=3)
    states = [weights_of(training) for _ in training.steps()]
    assert len(states) == 6
    assert not training.held_out.should_stop
    assert equal(weights_of(training), states[4])


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_patience_across_a_break(cut: int, scripted: list[float]) -> None:
    whole = trainer(patience=2)
    states, reports = [], []
    for report in whole.steps():
        arrays, numbers = whole.state
        states.append(({name: mx.array(array) for name, array in arrays.items()}, numbers))
        reports.append(report)
    scripted[:] = [0.5, 0.7, 0.6, 0.7][cut:]
    again = trainer(patience=2)
    again.restore(*states[cut - 1])
    rest = list(again.steps(cut))
    assert [report.step for report in rest] == list(range(cut + 1, 5))
    assert [report.loss for report in rest] == [report.loss for report in reports[cut:]]
    assert equal(weights_of(again), weights_of(whole))
    assert again.held_out.should_stop


def test_restore() -> None:
    training = trainer()
    arrays, numbers = training.state
    first = [report.loss for report in training.steps()]
    training.restore(arrays, numbers)
    assert [report.loss for report in training.steps()] == first


def test_failures_count_across_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer_module.policy_gradient
    training = trainer()
    reports = training.steps()
    monkeypatch.setattr(
        trainer_module, "policy_gradient", lambda *a: replace(original(*a), loss=mx.array(float("nan")))
    )
    next(reports)
    assert training.state[1]["failures"] == 1  # at the report, not after it


def test_ties_cannot_measure() -> None:
    tied = [replace(p, p_people=0.5) for p in demo_preferences("train", 40)]
    settings = settings_from(TrainSettings, QUICK | {"reward": "brier"})
    with pytest.raises(DataError, match=r"held-out preferences are ties"):
        Trainer(load_vlm(GOLDEN / "qwen2_5_vl", 512 * 512), tied, settings)

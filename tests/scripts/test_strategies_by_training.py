"""The experiment on strategies by training: what it measures, and its table."""

from dataclasses import replace

import pytest

from mlxpref.verdict import STRATEGIES
from scripts.learning_runs import Plan, settings_of
from scripts.strategies_by_training import READ_BY, SEEDS, gains_of, make_run, plans, rows_of, table_of


def test_each_strategy_is_trained_and_measured() -> None:
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


def test_table_has_each_strategy() -> None:
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

"""The learning curves: what is learned from, what a run measures, and the README's table."""

import json
import statistics
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlxpref.training.custom_reward import load_reward
from mlxpref.training.rewards import RewardMix
from scripts import learning_curves
from scripts.kept_runs import make_runs, read_runs
from scripts.learning_curves import REWARDS, SEEDS, STEPS, main, rows_of, table_of
from scripts.learning_runs import AGREEMENT, VOTES, Plan, Sizes, preferences_of, run, settings_of
from scripts.naive_soft import naive_soft

FOLDER = Path(learning_curves.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")
NEEDED = {"reward", "think", "seed", "steps", "accuracy", "held_out_prompts", "position_consistency", "ece", "seconds"}


def test_shares() -> None:
    test = preferences_of("votes", "test", 300, seed=0)
    assert {max(p.p_people, 1 - p.p_people) for p in test} == {max(x, 1 - x) for x in AGREEMENT.values()}
    learned = preferences_of("votes", "train", 600, seed=0)
    assert all(abs(VOTES * p.p_people - round(VOTES * p.p_people)) < 1e-9 for p in learned)
    # Nobody is told which is a, so that half prefer it; ties occur.
    assert statistics.fmean(p.p_people for p in learned) == pytest.approx(0.5, abs=0.05)
    assert any(p.is_tie for p in learned)


def test_seeds() -> None:
    first, second = (preferences_of("votes", "train", 4, seed) for seed in (0, 1))
    assert [p.prompt for p in first] != [p.prompt for p in second]
    assert settings_of(Plan("soft", "labels", True, 2, 30)).seed == 2


def test_naive_reward() -> None:
    settings = settings_of(Plan("naive soft", "labels", True, 0, 30))
    assert load_reward(settings.reward)
    for name in REWARDS:
        mix = RewardMix.parse(settings_of(Plan(name, "labels", True, 0, 30)).reward)
        assert mix.exact == (name != "hard" and name != "naive soft")
    assert naive_soft(["", "", ""], [0.75, 0.25, None], "", (), 1.0) == [0.95, 0.45, 0.0]


def test_a_run_is_measured() -> None:
    result = run(Plan("brier", "votes", False, 0, 1), Sizes(points=4, test=6, held_out=4))
    assert [point.step for point in result.curve] == [0, 1]
    assert result.judgements == 12
    assert 0 < result.ece < 1
    assert result.seconds > 0


def test_rows() -> None:
    runs = [
        {"reward": "soft", "labels": "labels", "think": True, "seed": seed, "steps": 30, "accuracy": accuracy,
         "held_out_prompts": 0.9, "position_consistency": 0.9, "ece": 0.1, "seconds": 10.0, "curve": []}
        for seed, accuracy in enumerate((0.9, 0.95, 1.0))
    ]  # fmt: skip
    (row,) = rows_of(runs)
    assert row["accuracy"] == (pytest.approx(0.95), 0.9, 1.0)
    assert "| soft | yes | 30 | 0.950 (0.900 to 1.000) |" in table_of([row])


def test_file_and_page_have_every_run() -> None:
    runs = json.loads((FOLDER / "learning_curves.json").read_text(encoding="utf-8"))["runs"]
    assert all(set(run) >= NEEDED for run in runs)
    result = {(run["reward"], run["think"], run["seed"], run["steps"]) for run in runs}
    assert result == {
        (r, think, seed, steps) for r in REWARDS for think in (True, False) for seed in SEEDS for steps in STEPS
    }
    printed = CliRunner().invoke(main, ["--table"], catch_exceptions=False).stdout
    assert printed.strip() in README


def test_only_missing_runs_are_run(tmp_path: Path) -> None:
    file, known = tmp_path / "folder" / "runs.json", {"n": 1, "double": "known"}
    runs: list[dict[str, Any]] = [known]
    (_, new), *more = make_runs([{"n": 1}, {"n": 0}], partial(dict, double=0), runs, file, 1, itemgetter("n"))
    assert not more
    assert new == {"n": 0, "double": 0}
    assert runs == read_runs(file) == [new, known]
    with pytest.raises(KeyError, match="none"):
        list(make_runs([{"n": 2}], itemgetter("none"), runs, file, 1, itemgetter("n")))
    assert read_runs(file) == [new, known]
    assert read_runs(tmp_path / "none.json") == []

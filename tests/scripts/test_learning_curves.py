"""The learning curves: what methods share, what a run measures, the tables, and that file and page have every run."""

import json
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from mlxpref.training.custom_reward import load_reward
from mlxpref.training.rewards import RewardMix
from scripts import learning_curves
from scripts.kept_runs import make_runs, read_runs
from scripts.learning_curves import BIAS, FAIR, LEANING, SEEDS, STEPS, draw, main, plans, rows_of, tables_of
from scripts.learning_runs import METHODS, Plan, Result, Sizes, run, stages_of
from scripts.naive_soft import naive_soft

FOLDER = Path(learning_curves.__file__).parent
TINY = Sizes(points=4, test=6, others=4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_same_budget(method: str) -> None:
    stages = stages_of(Plan(method, 0.0, 2, STEPS))
    soft = stages_of(Plan("soft", 0.0, 2, STEPS))[0]
    assert sum(each.steps * each.comparisons * each.group for each in stages) == STEPS * soft.comparisons * soft.group
    assert {(each.seed, each.limit, each.max_tokens, each.kl) for each in stages} == {
        (2, soft.limit, soft.max_tokens, 0)
    }


def test_methods_differ() -> None:
    stages = {method: stages_of(Plan(method, 0.0, 0, STEPS)) for method in METHODS}
    assert len(set(map(tuple, stages.values()))) == len(METHODS)
    assert not stages["soft, without thinking"][0].think
    assert stages["soft, agreement"][0].agreement > 0
    assert stages["soft, listener"][0].listener_weight > 0
    assert [each.method for each in stages["rejection, then soft"]] == ["rejection", "grpo"]
    assert [method for method in METHODS if stages[method][0].read_weight] == ["soft, read too"]


def test_naive_reward() -> None:
    settings = stages_of(Plan("naive soft", 0.0, 0, STEPS))[0]
    load_reward(settings.reward)
    is_exact = {name: RewardMix.parse(stages_of(Plan(name, 0.0, 0, STEPS))[0].reward).exact for name in METHODS}
    assert [name for name, exact in is_exact.items() if not exact] == ["hard", "naive soft"]
    assert naive_soft(["", "", ""], [0.75, 0.25, None], "", (), 1.0) == [0.95, 0.45, 0.0]


@pytest.fixture(scope="module")
def measured() -> list[Result]:
    plans = Plan("soft", BIAS, 0, 1), Plan("soft, without thinking", 0.0, 0, 1), Plan("rejection, then soft", 0.0, 0, 2)
    return [run(plan, TINY) for plan in plans]


def test_a_run_is_measured(measured: list[Result]) -> None:
    for each in measured:
        assert [point.step for point in each.curve] == [0, each.steps]
        names = ("accuracy", "select", "held_out", "four", "at_once", "both_orders", "position_consistency", "ece")
        assert all(0 <= share <= 1 for share in (*(getattr(each, name) for name in names), each.sampled["right"]))
        before, after = each.curve
        assert before.reward is None
        assert after.reward is not None
        assert each.seconds == pytest.approx(after.seconds, abs=0.1)
        assert after.seconds > before.seconds == 0
        thinks = each.method != "soft, without thinking"
        assert (after.sampled is None, after.tokens is None) == (not thinks, not thinks)
        assert (each.written["tokens"] > 1) == thinks


def test_without_thinking_nothing_is_written(measured: list[Result]) -> None:
    _, at_once, _ = measured
    assert at_once.written["facts"] is at_once.curve[-1].verdicts is None
    assert at_once.accuracy == at_once.at_once


def test_measured_runs_have_rows_and_curves(measured: list[Result], tmp_path: Path) -> None:
    runs = [asdict(each) for each in measured]
    tables = tables_of(rows_of(runs))
    assert [line.split(" | ")[0] for line in tables.splitlines() if line.startswith(("| soft", "| rejection"))] == 2 * [
        "| soft, without thinking", "| rejection, then soft", "| soft, bias 2"
    ]  # fmt: skip
    draw(runs, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 600


def made_up(method: str, bias: float, seed: int, accuracy: float, facts: float | None) -> dict[str, Any]:
    shares = dict.fromkeys(("select", "held_out", "four", "at_once", "position_consistency", "ece"), 0.5)
    written = {"tokens": 60.0 + seed, "right": 0.5, "complete": 0.9, "facts": facts, "verdicts": 0.8, "follows": 1.0}
    return {
        "method": method, "bias": bias, "seed": seed, "accuracy": accuracy, "seconds": 10.0, "sampled": {"right": 0.7},
        "written": written, "curve": [{"accuracy": 0.1}, {"accuracy": accuracy}, {"accuracy": 0.7}], **shares,
    }  # fmt: skip


def test_rows() -> None:
    runs = [made_up("soft", BIAS, 0, 0.6, None)]
    runs += [made_up("soft", 0.0, seed, accuracy, 0.9) for seed, accuracy in enumerate((0.9, 0.95, 1.0))]
    fair, leaning = rows_of(runs)
    assert fair["accuracy"] == (pytest.approx(0.95), 0.9, 1.0)
    assert (fair["seeds"], leaning["seeds"], leaning["colours true"]) == (3, 1, None)
    right, written = tables_of([fair, leaning]).split("\n\n")
    assert fair["mean over the steps"][0] == pytest.approx(0.825)
    shares = ("0.950 (0.900 to 1.000)", "0.825 (0.800 to 0.850)", "0.500 (0.500 to 0.500)", "0.700 (0.700 to 0.700)")
    assert f"| soft | {' | '.join(shares)} |" in right
    assert "| soft | 61 | 0.900 | 0.900 | 0.800 | 1.000 | 10 |" in written
    assert "| soft, bias 2 | 60 | 0.900 | - | 0.800 | 1.000 | 10 |" in written


def test_plans() -> None:
    assert set(FAIR) == set(METHODS)
    assert len(plans()) == len(SEEDS) * (len(FAIR) + len(LEANING))
    assert {plan["bias"] for plan in plans() if plan["method"] in LEANING} == {0.0, BIAS}


def test_file_and_page_have_every_run() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    if not (FOLDER / "learning_curves.json").exists():
        assert "Not measured with the present demo judge yet: `python -m scripts.learning_curves" in page
        return
    runs = json.loads((FOLDER / "learning_curves.json").read_text(encoding="utf-8"))["runs"]
    assert [{key: each[key] for key in plans()[0]} for each in runs] == plans()
    assert all(set(each) >= set(Result.__dataclass_fields__) for each in runs)
    printed = CliRunner().invoke(main, ["--table"], catch_exceptions=False).stdout
    assert all(table.strip() in page for table in printed.split("\n\n"))
    assert (FOLDER / "learning_curves.png").stat().st_size < 200_000


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

"""`mlxpref eval` with several ways to judge: options, table, JSON and drawing."""

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlxpref.cli import main
from mlxpref.cli.common import check_apart
from mlxpref.cli.eval_options import StrategyOptions
from mlxpref.demo.preferences import demo_preferences
from mlxpref.errors import ConfigError
from mlxpref.judge.strategies import StrategyVariant
from mlxpref.report.drawing import FORMATS
from tests.conftest import picture

DEMO = ("eval", "--data", "demo", "--model", "demo", "--limit", "3", "--max-tokens", "24")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*DEMO, *map(str, arguments)])


def test_several_strategies_are_one_table(tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store.sqlite")
    result = run("--strategy", "select,score,soft", "--samples", "2, 1", "--compare-thinking", *store)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "demo test: 3 pairs, each in both orders"
    rows = [line.split()[:3] for line in lines[2:11]]
    assert rows == [
        [strategy, think, count]
        for think, count in (("no", "1"), ("yes", "1"), ("yes", "2"))
        for strategy in ("soft", "select", "score")
    ]
    gains = [line.split()[:5] for line in lines[12:18]]
    assert gains[0] == ["soft", "-", "select", "no", "1"]
    assert gains[-1] == ["soft", "-", "score", "yes", "2"]
    assert "all rows together" in lines[-1]
    # It is all kept: nothing is judged again, so no seconds are known.
    again = run("--strategy", "select,score,soft", "--samples", "2,1", "--compare-thinking", *store)
    assert "36 of 36 comparisons were judged before" in again.stderr
    shares = [line.rsplit(None, 1)[0] for line in lines[2:11]]
    assert [line.rsplit(None, 1) for line in again.stdout.splitlines()[2:11]] == [[s, "recalled"] for s in shares]


def test_json_has_every_strategy() -> None:
    result = run("--strategy", "soft,select", "--samples", "1,2", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    assert [(row["strategy"], row["think"], row["samples"]) for row in rows] == [
        ("soft", True, 1), ("select", True, 1), ("soft", True, 2), ("select", True, 2),
    ]  # fmt: skip
    assert set(rows[0]["minus_select"]) == {"accuracy", "low", "high"}
    assert all(row["pairs"] == 3 and row["seconds"] > 0 and row["ece"] >= 0 for row in rows)
    one = json.loads(run("--think", "--samples", "2", "--json").stdout)
    assert (one["strategy"], one["pairs"]) == ("soft", 3)
    assert (one["model"], one["adapter"], one["limit"], one["seed"]) == ("demo", None, 3, 0)
    assert (one["think"], one["samples"], one["max_tokens"], one["max_pixels"]) == (True, 2, 24, 84 * 84)
    assert set(one["versions"]) == {"mlxpref", "mlx", "mlx-vlm", "transformers"}
    assert one["results"] == [{key: one[key] for key in one["results"][0]}], "one result stands in the object, too"
    assert json.loads(run("--no-think", "--json").stdout)["tokens"] == 0


@pytest.mark.parametrize("ending", FORMATS)
def test_drawing_is_written(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"drawing{ending}"
    result = run("--no-think", "--strategy", "soft,score", "--plot", path)
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == [path]
    if ending == ".svg":
        text = "".join(ElementTree.parse(path).getroot().itertext())
        assert "soft, without thinking" in text
        assert "score, without thinking" in text
    assert run("--no-think", "--plot", path).exit_code == 0


def test_predictions_are_written_for_each_pair(tmp_path: Path) -> None:
    paths = tmp_path / "p.csv", tmp_path / "p.jsonl"
    for path in paths:
        result = run("--compare-thinking", "--json", "--predictions", path)
        assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in paths[1].read_text(encoding="utf-8").splitlines()]
    assert [(row["think"], row["samples"]) for row in rows] == [(False, 1)] * 3 + [(True, 1)] * 3
    accuracy = [each["accuracy"] for each in json.loads(result.stdout)["results"]]
    assert [np.mean([row["correct"] for row in part]) for part in (rows[:3], rows[3:])] == pytest.approx(accuracy)
    assert [row["p_people"] for row in rows[:3]] == [p.p_people for p in demo_preferences("test", 3)]
    assert all(row["reasons_shown_first"][0] for row in rows[3:])
    with paths[0].open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(row["p_judge"]) for row in table] == [row["p_judge"] for row in rows]
    assert [row["reasons_shown_second"] for row in table] == [row["reasons_shown_second"][0] for row in rows]


def test_the_time_comes_first() -> None:
    arguments = ["eval", "--data", "demo", "--model", "demo", "--limit", "6", "--max-tokens", "24", "--samples", "2,3"]
    lines = CliRunner().invoke(main, [*arguments, "--compare-thinking"]).stderr.splitlines()
    assert lines[0].startswith("12 comparisons without thinking and 36 comparisons with thinking: about ")
    lines = CliRunner().invoke(main, ["calibrate", *arguments[1:6], "12", "--max-tokens", "9"]).stderr.splitlines()
    assert lines[0].startswith("24 comparisons without thinking and 24 comparisons with thinking: about ")


def test_predictions_of_scores(tmp_path: Path) -> None:
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    rows = [{"prompt": "=x", "a": "0.png", "b": f"{i}.png", "p_a": p} for i, p in ((1, 1.0), (2, 0.5))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scores.csv").write_text("image,score\n0.png,1\n1.png,2\n2.png,0\n")
    arguments = [
        "eval",
        "--data",
        tmp_path / "data.jsonl",
        "--scores",
        tmp_path / "scores.csv",
        "--protocol",
        "pickapic",
    ]
    done = CliRunner().invoke(main, [*map(str, arguments), "--json", "--predictions", str(tmp_path / "p.csv")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["scores"] == str(tmp_path / "scores.csv")
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(row["p_judge"], row["correct"], row["prompt"]) for row in table] == [
        ("0.0", "False", "'=x"),
        ("1.0", "", "'=x"),
    ]
    (tmp_path / "old.csv").write_text((tmp_path / "p.csv").read_text().replace("p_judge", "p_a"))
    for name in ("p.csv", "old.csv"):
        result = CliRunner().invoke(main, ["eval", "--model", "demo", "--data", str(tmp_path / name)])
        assert result.exit_code != 0, "a judge's predictions are nobody's preferences"
        assert "predictions by a judge; give the preferences" in result.stderr


@pytest.mark.parametrize(
    ("name", "problem"), [("p.txt", "ends with .csv or .jsonl"), ("no/p.csv", "folder that does not exist")]
)
def test_predictions_are_checked_first(tmp_path: Path, name: str, problem: str) -> None:
    result = run("--predictions", tmp_path / name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert problem in result.stderr
    assert "judging" not in result.stderr


@pytest.mark.parametrize(
    "outputs",
    [
        "--predictions {0}/data.jsonl",
        "--predictions {0}/../{0.name}/scores.csv --scores {0}/scores.csv",
        "--plot {0}/0.png",
        "--predictions {0}/kept.csv --store {0}/kept.csv",
    ],
)
def test_no_output_takes_the_place_of_an_input(tmp_path: Path, outputs: str) -> None:
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "x", "a": "0.png", "b": "1.png", "p_a": 1}))
    (tmp_path / "scores.csv").write_text("image,score\n0.png,1\n1.png,2\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = () if "--scores" in outputs else ("--model", "demo", "--no-think")
    arguments = ["eval", "--data", tmp_path / "data.jsonl", *model, *outputs.format(tmp_path).split()]
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 1
    assert "an input of this command" in result.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_outputs_are_two_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the file of --csv, too"):
        check_apart({"--csv": tmp_path / "x", "--html": tmp_path / "no" / ".." / "x"}, ())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--samples", "0,2"), "give numbers from 1"),
        (("--samples", "two"), "give numbers from 1"),
        (("--samples", "1,,2"), "give numbers from 1"),
        (("--strategy", "soft,hard"), "'hard'; known are soft, select, score"),
        (("--compare-thinking", "--no-think"), "takes the place of --think and --no-think"),
        (("--think", "never"), "unexpected extra argument (never)"),
        (("--plot", "drawing.pdf"), "ends with .svg or .png"),
        (("--plot", "no/such/folder/drawing.svg"), "in a folder that exists"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], problem: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert problem in " ".join(result.stderr.split())


def test_absent_options_change_no_setting() -> None:
    nothing = StrategyOptions(["soft"])
    assert nothing.settings({}) == {}
    assert nothing.settings({"think": False}) == {"think": False}
    assert nothing.variants(True) == [StrategyVariant("soft", True, 1)]
    assert nothing.variants(False) == [StrategyVariant("soft", False, 1)]
    both = StrategyOptions(["soft"], [4, 1], True)
    assert both.settings({}) == {"samples": 4, "think": True}
    assert both.variants(False) == [
        StrategyVariant("soft", False, 1),
        StrategyVariant("soft", True, 1),
        StrategyVariant("soft", True, 4),
    ]

"""`mlxpref eval` with several numbers of samples and bounds on tokens: table, JSON, files and the drawing."""

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from mlxpref.cli import main
from mlxpref.cli.eval_options import StrategyOptions
from mlxpref.judge.strategies import StrategyVariant

DEMO = ("eval", "--data", "demo", "--model", "demo", "--limit", "3", "--no-store")
GRID = ("--samples", "1,2", "--think", "both", "--max-tokens", "4,9")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*DEMO, *map(str, arguments)])


def results(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def drawn(path: Path) -> str:
    return "\n".join(ElementTree.parse(path).getroot().itertext())


def test_one_row_a_setting(tmp_path: Path) -> None:
    done = run(*GRID, "--plot", tmp_path / "curve.svg")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[1].split()[:6] == ["strategy", "thinking", "samples", "max", "tokens", "accuracy"]
    assert [line.split()[:4] for line in lines[2:7]] == [
        ["soft", "no", "1", "-"],
        *(["soft", "yes", samples, limit] for samples in "12" for limit in "49"),
    ]
    assert lines[7].startswith("the most accurate with so many tokens a pair, or fewer: ")
    assert "encoded images in" in lines[-1]
    text = drawn(tmp_path / "curve.svg")
    for words in ("1 sample, greedy", "2 samples", "up to 4 tokens", "up to 9 tokens", "no tokens, at once"):
        assert words in text
    # Only the longest completions are worth a warning that they were ended.
    assert "of up to 4 tokens:" not in done.stderr


def test_json_is_that_of_each_setting_alone() -> None:
    whole = results(*GRID)
    assert whole["max_tokens"] is None
    assert whole["vision_runs"] == 6
    rows = whole["results"]
    settings = [(row["think"], row["samples"], row["max_tokens"]) for row in rows]
    assert settings == [(False, 1, None), *((True, samples, limit) for samples in (1, 2) for limit in (4, 9))]
    for think, samples, limit in settings:
        ways = ("--think", "--samples", samples, "--max-tokens", limit) if think else ("--no-think",)
        alone = results(*ways)
        row = rows[settings.index((think, samples, limit))]
        for key in ("accuracy", "accuracy_low", "accuracy_high", "tokens", "tokens_per_pair", "unreadable"):
            assert row[key] == pytest.approx(alone[key]), (key, think, samples, limit)
        assert alone["max_tokens"] == (limit or alone["results"][0]["max_tokens"])


def test_values_may_be_given_one_by_one() -> None:
    rows = results("--max-tokens", "4", "--max-tokens", "9,4", "--samples", "1", "--samples", "2")["results"]
    assert [(row["samples"], row["max_tokens"]) for row in rows] == [(1, 4), (1, 9), (2, 4), (2, 9)]
    # One bound is the judge's setting, as ever.
    assert results("--max-tokens", "4", "--max-tokens", "4")["max_tokens"] == 4


def test_a_single_number_draws_how_reliable_it_is(tmp_path: Path) -> None:
    path = tmp_path / "drawing.svg"
    for arguments, is_curve in (
        (("--samples", "2", "--compare-thinking", "--max-tokens", "4"), False),
        (("--samples", "1,2", "--max-tokens", "4"), True),
        (("--max-tokens", "4,9"), True),
        (("--no-think", "--samples", "1,2", "--max-tokens", "4,9"), False),
    ):
        done = run(*arguments, "--plot", path)
        assert done.exit_code == 0, done.output
        assert ("best so far" in drawn(path)) == is_curve
        assert ("calibration" in drawn(path)) != is_curve
    assert "several --max-tokens are left off: without thinking" in done.stderr


def test_strategies_have_panels(tmp_path: Path) -> None:
    outputs = ("--plot", tmp_path / "curve.svg", "--predictions", tmp_path / "p.csv")
    done = run("--strategy", "soft,select", "--max-tokens", "4,9", *outputs)
    assert done.exit_code == 0, done.output
    texts = drawn(tmp_path / "curve.svg").splitlines()
    assert {"soft", "select"} <= {*texts}
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(row["strategy"], row["max_tokens"]) for row in table[::3]] == [
        ("soft", "4"), ("select", "4"), ("soft", "9"), ("select", "9"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--max-tokens", "8,0"), "'8,0': give numbers from 1"),
        (("--max-tokens", "8", "--max-tokens", "many"), "'8,many': give numbers from 1"),
        ((*GRID, "--plot", "curve.pdf"), "ends with .svg or .png"),
        ((*GRID, "--no-think"), "takes the place of --think and --no-think"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], problem: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert problem in " ".join(done.stderr.split())
    assert "judging" not in done.stderr


def test_options() -> None:
    one = StrategyOptions(["soft"], max_tokens=[8])
    assert (one.settings({}), one.variants(True)) == ({"max_tokens": 8}, [StrategyVariant("soft", True, 1)])
    several = StrategyOptions(["soft"], max_tokens=[8, 4])
    assert several.settings({}) == {"max_tokens": 8}
    assert [each.max_tokens for each in several.variants(True)] == [4, 8]
    assert [each.max_tokens for each in several.variants(False)] == [None]

"""`mlxpref eval` with several judges and scores: whose adapter it is, one table, one JSON, one judge in memory."""

import csv
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
from click.testing import CliRunner, Result

from mlxpref.checkpoints.files import ADAPTER_CONFIG
from mlxpref.cli import judges as cli_judges
from mlxpref.cli import main
from mlxpref.cli.eval_options import EvalCommand, MeasuredOptions, order_of_judges
from mlxpref.cli.options import JudgeOptions, option_group
from mlxpref.demo.preferences import demo_preferences
from mlxpref.judge.judge import Judge
from mlxpref.judge.loading import FoundJudge
from mlxpref.judge.store import Store
from mlxpref.preferences import image_name
from tests.conftest import write_adapter

DEMO = ("eval", "--data", "demo", "--limit", "4", "--no-think")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*DEMO, *map(str, arguments)])


@pytest.fixture
def adapter(demo_judge: Callable[..., Judge], tmp_path: Path) -> Path:
    """A random adapter for the demo judge, on which it says that it was trained, for smaller images."""
    folder = write_adapter(tmp_path / "taste", demo_judge().vlm)
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    config |= {"base_model": "demo", "trained": {"think": False, "max_pixels": 56 * 56}}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A tool that is always right about the demo's first four test pairs."""
    path = tmp_path / "clip.csv"
    pairs = demo_preferences("test", 4)
    rows = [f"{image_name(image)},{p}" for pair in pairs for image, p in ((pair.a, pair.p_people), (pair.b, 0.5))]
    path.write_text("\n".join(["image,score", *dict.fromkeys(rows)]))
    return path


@click.command(cls=EvalCommand, old={})
@option_group(MeasuredOptions, "measured")
def asked(measured: MeasuredOptions) -> None:
    """Prints the judges of its options."""
    for judge in measured.judges(JudgeOptions(), order_of_judges()):
        click.echo(f"{judge.model} {judge.adapter}")


@pytest.mark.parametrize(
    ("arguments", "judges"),
    [
        ("", ["None None"]),
        ("--scores s.csv", []),
        ("--model M", ["M None"]),
        ("--adapter A", ["None A"]),
        ("--model M --adapter A", ["M A"]),
        ("--adapter A --model M", ["M A"]),
        ("-a A -m M --scores s.csv", ["M A"]),
        ("--model M --model N", ["M None", "N None"]),
        ("--model M --model M --adapter A", ["M None", "M A"]),
        ("-m M -a A --scores s.csv -m M", ["M A", "M None"]),
        ("--model=M --adapter=A --model=M --adapter=B --model N", ["M A", "M B", "N None"]),
        ("--adapter A --scores s.csv --adapter B", ["None A", "None B"]),
    ],
)
def test_whose_adapter_it_is(arguments: str, judges: list[str]) -> None:
    done = CliRunner().invoke(asked, arguments.split())
    assert done.stdout.splitlines() == judges, done.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--adapter A --model M --model N", "--adapter A does not stand right after a --model"),
        ("--model M --adapter A --adapter B", "--adapter B does not stand right after a --model"),
        ("--model M --model M", "the same judge is given twice"),
        ("--adapter A --adapter A", "the same judge is given twice"),
        ("--scores A --scores A", "the same file of --scores is given twice"),
    ],
)
def test_judges_that_are_not_clear(arguments: str, problem: str) -> None:
    done = CliRunner().invoke(asked, arguments.split())
    assert (done.exit_code, done.stdout) == (2, "")
    assert problem in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--scores s.csv --plot p.svg", "--scores alone measures no judge"),
        ("--model demo --model x --calibration c.json", "--calibration is of one judge"),
    ],
)
def test_options_of_one_judge(arguments: str, problem: str) -> None:
    done = run(*arguments.split())
    assert (done.exit_code, done.stdout) == (2, "")
    assert problem in " ".join(done.stderr.split())


def test_a_judge_and_what_training_made_of_it(adapter: Path, scores: Path) -> None:
    judges = ("--model", "demo", "--model", "demo", "--adapter", adapter)
    done = run(*judges, "--scores", scores)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "demo test: 4 pairs, each in both orders, soft, without thinking"
    assert [line.split("  ")[0] for line in lines[2:5]] == ["demo", "demo + taste", "clip.csv"]
    assert lines[4].split()[1:3] == ["100.0", "%"]
    assert lines[4].split()[-4:] == ["-"] * 4
    assert "minus those of demo, on the same pairs" in lines[5]
    rows = json.loads(run(*judges, "--scores", scores, "--json").stdout)
    assert set(rows) == {"data", "split", "protocol", "limit", "versions", "results"}
    base, trained, tool = rows["results"]
    assert [base[key] for key in ("model", "adapter", "scores")] == ["demo", None, None]
    assert [trained[key] for key in ("model", "adapter", "scores")] == ["demo", str(adapter), None]
    assert [tool[key] for key in ("model", "adapter", "scores")] == [None, None, str(scores)]
    assert [row["profile"] for row in (base, trained, tool)] == ["mlxpref", "mlxpref", None]
    # Each has the settings that are its own.
    assert (base["max_pixels"], trained["max_pixels"]) == (84 * 84, 56 * 56)
    assert all(tool[key] is None for key in ("brier", "ece", "position_consistency", "tokens_per_pair", "learned_from"))
    assert base["minus_first"] is None
    for row in (trained, tool):
        assert row["minus_first"]["accuracy"] == pytest.approx(row["accuracy"] - base["accuracy"])
        assert row["minus_first"]["low"] < row["minus_first"]["accuracy"] < row["minus_first"]["high"]
    # Each is what it is alone.
    for row, arguments in ((base, judges[:2]), (trained, judges[2:])):
        alone = json.loads(run(*arguments, "--json").stdout)
        for key in ("accuracy", "ece", "brier", "tokens_per_pair", "warnings", "learned_from", "max_pixels", "think"):
            assert row[key] == alone[key], key


def test_adapters_are_on_their_own_bases_and_differ_in_thinking(adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "thinks"
    other.mkdir()
    for file in adapter.iterdir():
        other.joinpath(file.name).write_bytes(file.read_bytes())
    config = json.loads((other / ADAPTER_CONFIG).read_text())
    (other / ADAPTER_CONFIG).write_text(json.dumps(config | {"trained": {"think": True, "max_tokens": 9}}))
    arguments = ["eval", "--data", "demo", "--limit", "2", "--adapter", str(adapter), "--adapter", str(other)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    names = [line.split("  ")[0] for line in done.stdout.splitlines()[2:4]]
    assert names == ["demo + taste: soft, without thinking", "demo + thinks: soft, 1 sample"]


def test_every_variant_of_every_judge(adapter: Path, tmp_path: Path, scores: Path) -> None:
    drawing, predictions = tmp_path / "drawing.svg", tmp_path / "p.csv"
    outputs = ("--plot", drawing, "--predictions", predictions, "--scores", scores)
    done = run("--model", "demo", "--model", "demo", "-a", adapter, "--strategy", "soft,select", "--json", *outputs)
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    assert [(row["adapter"] is not None, row["strategy"]) for row in results] == [
        (False, "soft"), (False, "select"), (True, "soft"), (True, "select"), (False, None),
    ]  # fmt: skip
    text = "".join(ElementTree.parse(drawing).getroot().itertext())
    assert "demo + taste" in text
    assert "clip.csv" not in text
    with predictions.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["judge"] for row in table] == ["demo"] * 8 + ["demo + taste"] * 8 + ["clip.csv"] * 4
    for result, start in zip(results, range(0, 20, 4), strict=True):
        part = table[start : start + 4]
        assert {row["strategy"] or None for row in part} == {result["strategy"]}
        assert sum(row["correct"] == "True" for row in part) / 4 == result["accuracy"]


def test_every_bound_on_tokens_of_every_judge(adapter: Path, tmp_path: Path, scores: Path) -> None:
    drawing, judges = tmp_path / "curve.svg", ("--model", "demo", "--model", "demo", "-a", str(adapter))
    arguments = ("--scores", str(scores), "--max-tokens", "3,5", "--think", "--plot", str(drawing), "--json")
    done = CliRunner().invoke(main, [*DEMO[:-1], *judges, *arguments])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    assert [(row["adapter"] is not None, row.get("max_tokens")) for row in results] == [
        (False, 3), (False, 5), (True, 3), (True, 5), (False, None),
    ]  # fmt: skip
    assert all(row["vision_runs"] >= 0 for row in results[:4])
    texts = list(ElementTree.parse(drawing).getroot().itertext())
    assert {"demo", "demo + taste", "up to 3 tokens", "up to 5 tokens"} <= {*texts}
    assert "clip.csv" not in texts


def test_scores_alone_need_no_judge(scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_judges, "find_judge", None)
    other = tmp_path / "other.csv"
    other.write_text(scores.read_text().replace(",0.5", ",2"))
    done = CliRunner().invoke(main, [*DEMO[:-1], "--scores", str(scores), "--scores", str(other), "--json"])
    assert done.exit_code == 0, done.output
    first, second = json.loads(done.stdout)["results"]
    assert (first["accuracy"], first["minus_first"]) == (1, None)
    assert second["minus_first"]["accuracy"] == second["accuracy"] - 1 < 0


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (("--model", "nowhere"), "nowhere: no such model folder"),
        (("--model", "demo", "--adapter", "nowhere"), "nowhere"),
        (("--scores", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_every_judge_is_looked_for_before_the_first_one_judges(second: tuple[str, ...], problem: str) -> None:
    done = run("--model", "demo", *second)
    assert (done.exit_code, done.stdout) == (1, "")
    assert problem in done.stderr
    assert "judging" not in done.stderr


def test_every_judge_is_checked_before_the_first_one_judges(adapter: Path) -> None:
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    config["base"] = {"fingerprint": "0" * 32, "ancestors": []}
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config))
    done = run("--model", "demo", "--model", "demo", "--adapter", adapter)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "which this model is not" in done.stderr
    assert "judging" not in done.stderr


def test_one_judge_is_in_memory_at_a_time(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[Any]] = []
    load = FoundJudge.load

    def load_one(self: FoundJudge) -> Judge:
        assert not any(model() is not None for model in models), "an earlier judge is still in memory"
        judge = load(self)
        models.append(weakref.ref(judge.vlm.model))
        return judge

    monkeypatch.setattr(FoundJudge, "load", load_one)
    done = run("--model", "demo", "--model", "demo", "--adapter", adapter)
    assert done.exit_code == 0, done.output
    assert len(models) == 2


def test_an_interrupted_command_keeps_every_judge_so_far(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, batches = Store.put_many, list[int]()

    def interrupt(self: Store, items: Any, names: Any) -> None:
        put(self, items, names)
        batches.append(len(items))
        if len(batches) == 3:
            raise KeyboardInterrupt

    command = ("--model", "demo", "--model", "demo", "--adapter", adapter, "--rows", "4", "--store", tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_many", interrupt)
        done = run(*command)
    assert (done.exit_code, done.stdout) == (130, "")
    assert batches == [4, 4, 4]
    notes = [line for line in run(*command).stderr.splitlines() if "were judged before" in line]
    assert notes == ["8 of 8 comparisons were judged before", "4 of 8 comparisons were judged before"]


def test_what_official_numbers_are(adapter: Path, scores: Path) -> None:
    judges = ("--model", "demo", "--model", "demo", "--adapter", adapter, "--scores", scores)
    for protocol in ("hpdv2", "mmrb2", "genai_bench"):
        done = run(*judges, "--protocol", protocol, "--strategy", "soft")
        assert done.exit_code == 0, done.output
        lines = done.stdout.splitlines()
        assert lines[1].split()[:2] == ["judge", "official"]
        said = [line.partition(":")[0] for line in lines if line.startswith(("official", "beside"))]
        if protocol == "genai_bench":  # judges of equal numbers share a line
            said = [said[0], ", ".join(each.removeprefix("beside it, ") for each in said[1:])]
        assert (
            said
            == {
                "hpdv2": ["official"],
                "mmrb2": ["official, demo, demo + taste", "official, clip.csv", "beside it"],
                "genai_bench": ["official", "demo, demo + taste, clip.csv"],
            }[protocol]
        )
